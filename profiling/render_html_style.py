"""The looks of the HTML page: colours for light and dark, and the style sheet.

Colours of the accounts start from Okabe and Ito's palette for colour-blind readers and are shifted
until each has a contrast of at least 3 against its background (WCAG 1.4.11), text of at least 4.5.
`tests/profiling/test_render_html.py` holds both. The same colours are matplotlib's in the PNG.
"""

from __future__ import annotations

__all__ = ["CURVES", "DARK", "LIGHT", "STYLE"]

LIGHT = {
    "page": "#ffffff",
    "text": "#1c2024",
    "quiet": "#596069",
    "rule": "#d9dde2",
    "band": "#f1f3f5",
    "weights": "#0072b2",
    "gradients": "#c25100",
    "optimizer": "#008060",
    "activations": "#a8448c",
    "workspace": "#8a6d00",
    "total": "#6b7480",
    "saved": "#008060",
    "added": "#c25100",
}
DARK = {
    "page": "#14171a",
    "text": "#e8eaed",
    "quiet": "#a4abb3",
    "rule": "#3a4048",
    "band": "#1e2226",
    "weights": "#56b4e9",
    "gradients": "#f0914a",
    "optimizer": "#2fc79a",
    "activations": "#e08cc6",
    "workspace": "#d9bd4a",
    "total": "#98a1ac",
    "saved": "#2fc79a",
    "added": "#f0914a",
}

CURVES = ("weights", "gradients", "optimizer", "activations", "workspace", "total")
"""Colours of curves in turn; from the seventh on they come again, dashed."""


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


_RULES = """\
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem 1rem 3rem; max-width: 72rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
p, ul { margin: .5rem 0; }
ul { padding-left: 1.2rem; }
.quiet, figcaption { color: var(--quiet); font-size: .875rem; }
figure { margin: 0; }
figcaption { margin-top: .5rem; }
dl.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .5rem;
  margin: 1rem 0 0; }
dl.key div { border: 1px solid var(--rule); border-radius: .4rem; padding: .5rem .75rem; }
dl.key dt { color: var(--quiet); font-size: .8rem; }
dl.key dd { margin: 0; font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; padding: 0;
  margin: .25rem 0 .75rem; font-size: .875rem; }
.legend li { display: flex; align-items: center; gap: .4rem; }
.legend i { flex: none; width: .85rem; height: .85rem; border-radius: .15rem;
  background: var(--c); }
.legend svg { flex: none; width: 1.6rem; height: .85rem; }
.bars { display: grid; grid-template-columns: minmax(0, 1fr); gap: .55rem; }
.bar-label { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem;
  font-size: .875rem; }
.bar-label b { font-weight: 600; margin-left: auto; text-align: right;
  font-variant-numeric: tabular-nums; }
.bar { display: flex; position: relative; height: 1.1rem; background: var(--band);
  border-radius: .2rem; overflow: hidden; }
.bar span { background: var(--c); min-width: 1px; }
.bar span + span { border-left: 1px solid var(--page); }
.bar .saved, .legend .saved i { background: repeating-linear-gradient(135deg, var(--c) 0 3px,
  var(--band) 3px 6px); box-shadow: inset 0 0 0 1px var(--c); }
.bar b { position: absolute; top: 0; bottom: 0; width: 0; transform: translateX(-1px);
  border-left: 2px dashed var(--text); }
.legend .mark i { width: 0; background: none; border-left: 2px dashed var(--text);
  border-radius: 0; margin: 0 .4rem; }
.plot { display: grid; grid-template-columns: 4.4rem minmax(0, 1fr); gap: .2rem .4rem;
  font-size: .75rem; color: var(--quiet); }
.plot .y { position: relative; font-variant-numeric: tabular-nums; }
.plot .y span { position: absolute; right: 0; transform: translateY(50%); white-space: nowrap; }
.plot svg { display: block; width: 100%; height: 16rem; overflow: visible; }
.plot .x { grid-column: 2; position: relative; display: flex; }
.plot .x > span { flex-basis: 0; min-width: 0; overflow: hidden; white-space: nowrap;
  text-overflow: ellipsis; border-left: 1px solid var(--rule); padding-left: .2rem; }
.plot .x.at { display: block; height: 1.2rem; }
.plot .x.at > span { position: absolute; transform: translateX(-50%); border: 0; padding: 0; }
.grid { stroke: var(--rule); stroke-width: 1; vector-effect: non-scaling-stroke; }
.peak { stroke: var(--text); stroke-width: 1.5; stroke-dasharray: 4 3;
  vector-effect: non-scaling-stroke; }
.area { stroke: var(--page); stroke-width: .75; vector-effect: non-scaling-stroke; fill: var(--c); }
.band { fill: var(--band); }
.curve { fill: none; stroke: var(--c); stroke-width: 2; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; }
.dot { stroke: var(--c); stroke-width: 7; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: .4rem; }
.scroll:focus-visible { outline: 2px solid var(--weights); }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem;
  border-bottom: 1px solid var(--rule); overflow-wrap: break-word; }
td:not(.number) { min-width: 6.5rem; }
td:first-child:not(.number) { min-width: 9rem; }
td.long { min-width: 14rem; }
tr:last-child td { border-bottom: 0; }
th { font-weight: 600; background: var(--band); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: .75rem; }
@media (max-width: 30rem) { th, td { padding: .3rem .4rem; font-size: .8125rem; }
  td:first-child:not(.number) { min-width: 6.5rem; } }
@media print { body { max-width: none; } .scroll { overflow: visible; } }
"""

STYLE = (
    f":root {{ color-scheme: light dark; {_variables(LIGHT)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}\n{_RULES}"
)
