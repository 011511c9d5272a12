"""The HTML page: whole, self-contained, escaped, readable, with the numbers of the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from memrt.profiling.allocator import AllocatorPeaks, AllocatorReading
from memrt.profiling.render_figures import Areas, Bars, Lines, figures, ticks
from memrt.profiling.render_html import to_html
from memrt.profiling.render_html_style import DARK, LIGHT, STYLE
from tests.profiling.reports import KINDS, MIB, NASTY, accounts, monitor, plan, profile

_VOID = {"meta", "wbr", "br"}


def step(strategy: str, peak: int | None, step: int | None, **values: Any) -> dict[str, Any]:
    scaled = {key: None if value is None else value * MIB for key, value in values.items()}
    return {
        "strategy": strategy,
        "peak_bytes": None if peak is None else peak * MIB,
        "step_bytes": None if step is None else step * MIB,
        "saved_bytes": None if step is None else step * MIB,
        "reason": None,
        **scaled,
    }


WATERFALL = [
    step("none", 100, None, measured_peak_bytes=104),
    {**step("nf4(double_quant=True)", None, None), "reason": f"nothing is left to train {NASTY}"},
    step("peft(method='lora', rank=16, targets='all-linear')", 48, None, measured_peak_bytes=50),
    step("activation_checkpoint", 20, 28, measured_peak_bytes=19),
    step("offload_activations(min_bytes=0)", 22, -2, measured_peak_bytes=None),
]
PICTURED = {
    **KINDS,
    "plan with a waterfall": lambda: {**plan(), "waterfall": WATERFALL},
    "profile with a waterfall": lambda: profile(waterfall=WATERFALL),
    "train with a waterfall": lambda: _trained(waterfall=WATERFALL),
}


def _trained(**predicted: Any) -> dict[str, Any]:
    report = KINDS["train"]()
    return {**report, "predicted": {**report["predicted"], **predicted}}


class Page(HTMLParser):
    """Tags in order, attributes, text; fails where an element is not closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        return sum(
            name == tag and all(found.get(k) == v for k, v in attributes.items())
            for name, found in self.tags
        )


@pytest.mark.parametrize("kind", PICTURED)
def test_a_page_is_well_formed_and_loads_nothing(kind: str) -> None:
    text = to_html(PICTURED[kind]())
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "onload", "onclick"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in text
    assert "@import" not in text
    policy = next(a for tag, a in page.tags if "http-equiv" in a)["content"]
    assert str(policy).startswith("default-src 'none'")
    assert page.count("meta", name="viewport") == 1
    assert page.tags[0] == ("html", {"lang": "en"})
    assert page.count("h1") == 1
    text.encode("utf-8")


@pytest.mark.parametrize("kind", PICTURED)
def test_names_are_shown_and_change_nothing(kind: str) -> None:
    text = to_html(PICTURED[kind]())
    shown = "".join(Page(text).text)
    assert "<script>alert(1)</script>" in shown
    assert "\u202e" not in text
    assert "\x00" not in text


@pytest.mark.parametrize("kind", PICTURED)
def test_every_picture_has_a_heading_and_its_words(kind: str) -> None:
    page = Page(to_html(PICTURED[kind]()))
    identifiers = [a["id"] for tag, a in page.tags if tag == "h2" and "id" in a]
    pictures = [a["aria-labelledby"] for tag, a in page.tags if tag == "figure"]
    assert identifiers == pictures
    assert len(pictures) == len(figures(PICTURED[kind]())) >= 3
    assert page.count("figcaption") == len(pictures)
    images = [a for tag, a in page.tags if tag == "svg" and a.get("role") == "img"]
    assert all(a["aria-label"] for a in images)
    tables = [a for tag, a in page.tags if tag == "div" and a.get("class") == "scroll"]
    assert all(a["tabindex"] == "0" and a["role"] == "region" for a in tables)


def test_the_segments_of_a_bar_are_the_accounts() -> None:
    text = to_html(profile())
    bar = re.search(r"<span>counted</span>.*?<div class=bar>(.*?)</div>", text)
    assert bar is not None
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", bar[1])]
    # the longest bar is the growth of the resident set, 40 MiB
    assert widths == pytest.approx([value / (40 * MIB) * 100 for value in accounts().values()])
    assert 'title="optimizer state: 3.0 MiB"' in bar[1]


def test_what_the_driver_saw_stands_beside_it() -> None:
    reading = AllocatorReading(**dict.fromkeys((f.name for f in fields(AllocatorReading)), 0))
    allocator = AllocatorPeaks(
        peak_allocated_bytes=20 * MIB,
        peak_active_bytes=0,
        peak_reserved_bytes=0,
        num_alloc_retries=0,
        num_ooms=0,
        last=reading,
        phases={},
    ).to_json()
    seen = monitor(process_peak_bytes=300 * MIB, allocator=allocator)
    (bars,) = [f for f in figures(profile(monitor=seen)) if isinstance(f, Bars) and f.bars[:4]][:1]
    assert {bar.label: bar.total / MIB for bar in bars.bars} == {
        "predicted": 15.0,
        "counted": 15.0,
        "allocator": 20.0,
        "NVML": 300.0,
    }


def test_the_growth_of_the_host_stands_beside_a_cpu_run_alone() -> None:
    def labels(**seen: Any) -> list[str]:
        (bars,) = [f for f in figures(profile(monitor=monitor(**seen))) if "everyone" in f.title]
        assert isinstance(bars, Bars)
        return [bar.label for bar in bars.bars]

    assert "RSS, by how much it grew" in labels()
    on_a_gpu = labels(allocator={"peak_allocated_bytes": 20 * MIB})  # and NVML was not there
    assert on_a_gpu == ["predicted", "counted", "allocator"]


def test_the_waterfall_shows_what_every_strategy_takes_away() -> None:
    (figure,) = [f for f in figures(profile(waterfall=WATERFALL)) if "strategy saves" in f.title]
    assert isinstance(figure, Bars)
    none, stuck, _, checkpoint, worse = figure.bars
    assert (none.label, none.segments) == ("no strategy", [("total", 100 * MIB)])
    assert (stuck.segments, stuck.text) == ([], "cannot run so")
    assert checkpoint.segments == [("total", 20 * MIB), ("saved", 28 * MIB)]
    assert checkpoint.text == "20.0 MiB (−28.0 MiB), measured 19.0 MiB"
    # the strategy before it left 20: two more are an addition on top of them
    assert worse.segments == [("total", 20 * MIB), ("added", 2 * MIB)]
    assert worse.text == "22.0 MiB (+2.0 MiB)"
    assert figure.longest == 104 * MIB
    text = to_html(profile(waterfall=WATERFALL))
    bar = re.search(r"<span>\+ activation_checkpoint</span>.*?<div class=bar>(.*?)</div>", text)
    assert bar is not None
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", bar[1])]
    assert widths == pytest.approx([20 / 104 * 100, 28 / 104 * 100], abs=1e-3)
    assert f'left:min({19 / 104 * 100:.3f}%,100% - 1px)" title="measured: 19.0 MiB"' in bar[1]
    table = text.split("What every strategy saves (MiB)</h2>")[1].split("</table>")[0]
    assert "<th scope=col class=number>measured</th>" in table
    unmeasured = [{**row, "measured_peak_bytes": None} for row in WATERFALL]
    plain = to_html({**plan(), "waterfall": unmeasured})
    assert "measured</th>" not in plain
    assert "dashed line" not in plain


def test_a_training_run_shows_what_every_strategy_was_planned_to_save() -> None:
    drawn, expected = (
        next(f for f in figures(report) if "strategy saves" in f.title)
        for report in (_trained(waterfall=WATERFALL), profile(waterfall=WATERFALL))
    )
    assert drawn == expected
    text = to_html(_trained(waterfall=WATERFALL))
    assert "memrt plan of every stack before the run" in text
    for part in ("What every strategy saves (MiB)", "Largest at the peak", "Conditions"):
        assert f"{part}" in text.split("In numbers</h2>")[1], part
    assert "<dt>tokens per second</dt>" in text
    late = _trained(waterfall=None, waterfall_left_out="7 more plans would keep it waiting")
    assert "Not planned: 7 more plans would keep it waiting." in to_html(late)
    assert not [figure for figure in figures(late) if "strategy saves" in figure.title]


def test_an_ablation_is_a_waterfall_with_measured_peaks() -> None:
    numbers = ("peak_bytes", "step_bytes", "saved_bytes")
    counted = dict.fromkeys(numbers)
    rows = [
        {
            "strategy": row["strategy"],
            "predicted": {key: row[key] for key in numbers},
            "counted": {**counted, "peak_bytes": row["measured_peak_bytes"]},
            "allocated": None,
            "difference_bytes": counted,
            "reason": None,
        }
        for row in [{"measured_peak_bytes": None, **each} for each in WATERFALL]
    ]
    drawn, expected = (
        next(f for f in figures(report) if "strategy saves" in f.title)
        for report in (profile(ablation=rows), profile(waterfall=WATERFALL))
    )
    assert drawn == expected
    on_a_card = [{**row, "allocated": {"peak_bytes": 7 * MIB}} for row in rows]
    (bars,) = [f for f in figures(profile(ablation=on_a_card)) if "strategy saves" in f.title]
    assert isinstance(bars, Bars)
    assert {bar.mark for bar in bars.bars} == {7 * MIB}


def test_the_areas_are_stacked_up_to_the_peak() -> None:
    (areas,) = [figure for figure in figures(profile()) if isinstance(figure, Areas)]
    assert sum(areas.samples[areas.peak].values()) == 15 * MIB
    assert [(band.step, band.phase) for band in areas.bands] == [
        (-1, "load"),
        (0, "backward"),
        (0, "forward"),
        (0, "step"),
        (1, "backward"),
    ]
    assert areas.bands[0].begin == 0
    assert areas.bands[-1].end == len(areas.samples) - 1
    text = to_html(profile())
    polygons = re.findall(r"<polygon[^>]*points=\"([^\"]+)\"", text)
    assert len(polygons) == 5
    points = [tuple(map(float, point.split(","))) for point in polygons[-1].split()]
    top = ticks(0, 15 * MIB, in_bytes=True)[-1][0]
    assert min(y for _, y in points) == pytest.approx((1 - 15 * MIB / top) * 400, abs=0.1)
    assert {x for x, _ in points} == {round(i / 14 * 1000, 1) for i in range(15)}


def test_a_loss_that_is_not_finite_is_a_gap() -> None:
    (loss, times) = [figure for figure in figures(profile()) if isinstance(figure, Lines)]
    assert loss.series == [("training", [(1, 8.0), (2, 7.75), (3, None), (4, 7.5), (5, 7.25)])]
    assert times.series == [("seconds", [(3, 0.25), (4, 0.5), (5, 0.25)])]
    drawn = to_html(profile()).split('id="figure-3"')[1].split("</figure>")[0]
    assert drawn.count("<polyline") == 2


def test_reports_without_a_part_are_still_shown() -> None:
    old = profile()
    for sample in old["timeline"]:
        del sample["accounts"]  # as an earlier version wrote it
    assert not [figure for figure in figures(old) if isinstance(figure, Areas)]
    Page(to_html(old))
    bare = {**KINDS["train"](), "monitor": None, "predicted": None, "losses": []}
    bare.update(dict.fromkeys(("peak_bytes", "accounts", "owners", "timeline")))
    Page(to_html({**bare, "evaluation_losses": [], "loss": None}))


@pytest.mark.parametrize(
    ("low", "high", "in_bytes", "expected"),
    [
        (0, 15 * MIB, True, ["0 MiB", "5 MiB", "10 MiB", "15 MiB"]),
        (0, 1.5 * 2**30, True, ["0.0 GiB", "0.5 GiB", "1.0 GiB", "1.5 GiB"]),
        (7.1, 7.9, False, ["7.0", "7.2", "7.4", "7.6", "7.8", "8.0"]),
        (3, 3, False, ["3.0", "3.5"]),
        (0, 0, True, ["0.0 B", "0.5 B"]),
    ],
)
def test_scales_are_round(low: float, high: float, in_bytes: bool, expected: list[str]) -> None:
    found = ticks(low, high, in_bytes=in_bytes)
    assert [text for _, text in found] == expected
    assert found[0][0] <= low
    assert found[-1][0] >= high


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_told_from_their_ground(colours: dict[str, str]) -> None:
    """WCAG 2.2: 4.5 for text (1.4.3), 3 for what a picture needs (1.4.11)."""
    for ground in ("page", "band"):
        for text in ("text", "quiet"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for name in (*accounts(), "total", "saved", "added"):
            assert _contrast(colours[name], colours[ground]) >= 3, (name, ground)
    assert all(f"--{name}: {value};" in STYLE for name, value in colours.items())


def test_a_page_is_small() -> None:
    report = profile(timeline=timeline_of(500))
    assert len(to_html(report)) < 300_000


def timeline_of(count: int) -> list[dict[str, Any]]:
    held = accounts()
    return [
        {"instant": i, "bytes": 15 * MIB, "step": 0, "phase": "forward", "accounts": held}
        for i in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", PICTURED)
def test_in_a_real_browser(kind: str, tmp_path: Path) -> None:
    """Headless Chromium at phone and desk width, light and dark."""
    folder = os.environ.get("MEMRT_BROWSER", "")
    node = shutil.which("node")
    if node is None or not Path(folder, "node_modules", "@sparticuz", "chromium").is_dir():
        pytest.skip(
            "MEMRT_BROWSER names no folder in which "
            "`npm install @sparticuz/chromium puppeteer-core` was run"
        )
    page = tmp_path / "report.html"
    page.write_text(to_html(PICTURED[kind]()), encoding="utf-8")
    script = Path(__file__).with_name("browser_check.mjs")
    done = subprocess.run(
        [node, str(script), folder, str(page), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for seen in json.loads(done.stdout):
        assert seen["scroll_width"] == seen["width"], "the page scrolls sideways"
        assert seen["sticking_out"] == []
        assert seen["problems"] == []
        assert seen["num_requests"] == 1  # the page itself
        assert seen["smallest_text"] >= 12
        assert all(width > 200 and height > 200 for width, height in seen["plots"])
        colours = DARK if seen["scheme"] == "dark" else LIGHT
        assert seen["background"] == _rgb(colours["page"])
        areas = [_rgb(colours[name]) for name in accounts()]
        assert seen["area_colours"] in ([], areas)
        assert (tmp_path / f"{seen['width']}-{seen['scheme']}.png").stat().st_size > 10_000


def _rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"
