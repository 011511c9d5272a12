// Opens a page in headless Chromium at several widths and in both colour schemes, and prints what
// it found as JSON. Usage: node browser_check.mjs BROWSER_FOLDER PAGE PICTURE_FOLDER
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';
import path from 'node:path';

const [, , browserFolder, pagePath, pictures] = process.argv;
const require = createRequire(path.join(browserFolder, 'index.js'));
const load = async (name) => (await import(pathToFileURL(require.resolve(name)))).default;
const chromium = await load('@sparticuz/chromium');
const puppeteer = await load('puppeteer-core');

const browser = await puppeteer.launch({
  args: chromium.args,
  executablePath: await chromium.executablePath(),
  headless: 'shell',
});
const found = [];
for (const width of [390, 1280]) {
  for (const scheme of ['light', 'dark']) {
    const page = await browser.newPage();
    const problems = [];
    const requests = [];
    page.on('console', (message) => problems.push(message.text()));
    page.on('pageerror', (error) => problems.push(String(error)));
    page.on('request', (request) => requests.push(request.url()));
    await page.setViewport({ width, height: 800 });
    await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }]);
    await page.goto(pathToFileURL(pagePath).href);
    await page.screenshot({
      path: path.join(pictures, `${width}-${scheme}.png`),
      fullPage: true,
    });
    const seen = await page.evaluate(() => ({
      scroll_width: document.documentElement.scrollWidth,
      background: getComputedStyle(document.body).backgroundColor,
      smallest_text: Math.min(
        ...[...document.querySelectorAll('body *')]
          .filter((each) => [...each.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
          .filter((each) => each.tagName !== 'title')
          .map((each) => parseFloat(getComputedStyle(each).fontSize)),
      ),
      plots: [...document.querySelectorAll('.plot svg')].map((svg) => {
        const box = svg.getBoundingClientRect();
        return [box.width, box.height];
      }),
      sticking_out: [...document.querySelectorAll('h1, h2, p, li, figcaption, .bar, .plot')]
        .filter((each) => each.getBoundingClientRect().right > innerWidth + 0.5)
        .map((each) => each.outerHTML.slice(0, 80)),
      area_colours: [...document.querySelectorAll('.area')].map((e) => getComputedStyle(e).fill),
    }));
    found.push({ width, scheme, problems, num_requests: requests.length, ...seen });
    await page.close();
  }
}
await browser.close();
process.stdout.write(JSON.stringify(found));
