"""Bars, stacked areas and curves as HTML and inline SVG, without a script.

The SVG holds shapes only, stretched to the width there is; labels are HTML around it, so they keep
their size. Every shape has its number as a tooltip.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from memrt.profiling.render_figures import (
    ACCOUNTS,
    KEYS,
    SAVED,
    TOTAL,
    Areas,
    Bar,
    Bars,
    Lines,
    key_title,
    ticks,
)
from memrt.profiling.render_html_style import CURVES
from memrt.profiling.render_sections import account_title
from memrt.profiling.report import format_bytes

__all__ = ["areas_html", "bars_html", "clean", "lines_html"]

_WIDTH, _HEIGHT = 1000.0, 400.0
_MAX_X_LABELS = 6

# marks that turn the reading direction of what follows them
_DIRECTIONS = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)))


def clean(text: str) -> str:
    """Escaped for text and quoted attributes, without characters that HTML forbids."""
    kept = "".join(c for c in str(text) if c in "\n\t" or (ord(c) >= 32 and ord(c) != 127))
    kept = kept.translate(_DIRECTIONS)
    return escape(kept.encode("utf-8", "replace").decode())  # a path may hold lone surrogates


def _legend(keys: Sequence[str], *, mark: str = "") -> str:
    items = [
        f'<li{_kind(key)} style="--c:var(--{key})"><i></i>{clean(key_title(key))}</li>'
        for key in keys
    ]
    if mark:
        items.append(f"<li class=mark><i></i>{clean(mark)}</li>")
    return f"<ul class=legend>{''.join(items)}</ul>" if items else ""


def _kind(key: str) -> str:
    """What was saved is not there: it is drawn with stripes."""
    return " class=saved" if key == SAVED else ""


# ---------------------------------------------------------------- bars


def bars_html(figure: Bars) -> str:
    """Bars as boxes, each with its label and number above it."""
    keys = {key for bar in figure.bars for key, value in bar.segments if value}
    plain = keys <= {TOTAL}
    rows = [
        f"<div><div class=bar-label><span>{clean(_spaced(bar.label))}</span>"
        f"<b>{clean(bar.text)}</b></div><div class=bar>{_segments(bar, figure)}</div></div>"
        for bar in figure.bars
    ]
    split = [key for key in KEYS if key in keys and not (key == TOTAL and keys & set(ACCOUNTS))]
    legend = _legend([] if plain else split, mark=figure.mark)
    return f"{legend}\n<div class=bars>\n" + "\n".join(rows) + "\n</div>"


def _segments(bar: Bar, figure: Bars) -> str:
    drawn = "".join(
        f'<span{_kind(key)} style="--c:var(--{key});width:{value / figure.longest * 100:.3f}%" '
        f'title="{clean(_tooltip(key, value, in_bytes=figure.in_bytes))}"></span>'
        for key, value in bar.segments
        if value
    )
    if bar.mark is None:
        return drawn
    title = f"{figure.mark}: {_number(bar.mark, in_bytes=figure.in_bytes)}"
    left = bar.mark / figure.longest * 100
    return f'{drawn}<b style="left:min({left:.3f}%,100% - 1px)" title="{clean(title)}"></b>'


def _tooltip(key: str, value: float, *, in_bytes: bool) -> str:
    number = _number(value, in_bytes=in_bytes)
    return number if key == TOTAL else f"{key_title(key)}: {number}"


def _number(value: float, *, in_bytes: bool) -> str:
    return format_bytes(value) if in_bytes else f"{value:,.0f}"


def _spaced(label: str) -> str:
    """A stack breaks at its pluses."""
    return " ".join(label.replace("+", " + ").split())


# ---------------------------------------------------------------- areas


def areas_html(figure: Areas) -> str:
    """The accounts stacked over the run, phases as bands below."""
    last = max(len(figure.samples) - 1, 1)
    peak_bytes = sum(figure.samples[figure.peak].values())
    scale = ticks(0, peak_bytes, in_bytes=True)
    top = scale[-1][0] or 1
    lower = [0.0] * len(figure.samples)
    shapes = []
    for account in ACCOUNTS:
        heights = [sample[account] for sample in figure.samples]
        if not any(heights):
            continue
        upper = [low + height for low, height in zip(lower, heights, strict=True)]
        edge = [(i / last, value / top) for i, value in enumerate(upper)]
        base = [(i / last, value / top) for i, value in enumerate(lower)]
        points = " ".join(map(_point, (*edge, *reversed(base))))
        most = format_bytes(max(heights))
        shapes.append(
            f'<polygon class=area style="--c:var(--{account})" points="{points}">'
            f"<title>{clean(account_title(account))}, at most {most}</title></polygon>"
        )
        lower = upper
    x = figure.peak / last * _WIDTH
    peak = f'<line class=peak x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT:.0f}"/>'
    label = f"Stacked bytes of every account; the peak is {format_bytes(peak_bytes)}"
    shown = [a for a in ACCOUNTS if any(sample[a] for sample in figure.samples)]
    svg = _svg([*_bands(figure, last), *_grid(scale, 0, top), *shapes, peak], label)
    return (
        f"{_legend(shown)}\n<div class=plot>\n{_y_labels(scale, 0, top)}\n{svg}\n"
        f"{_steps(figure)}\n{_phases(figure)}\n</div>"
    )


def _bands(figure: Areas, last: int) -> Iterator[str]:
    """Every other phase on a ground of its own."""
    for band in figure.bands[::2]:
        x, width = band.begin / last * _WIDTH, (band.end - band.begin) / last * _WIDTH
        yield (
            f'<rect class=band x="{x:.1f}" y="0" width="{width:.1f}" height="{_HEIGHT:.0f}">'
            f"<title>{clean(band.phase)}</title></rect>"
        )


def _phases(figure: Areas) -> str:
    cells = "".join(
        f'<span style="flex-grow:{band.end - band.begin + 1}" title="{clean(band.phase)}">'
        f"{clean(band.phase)}</span>"
        for band in figure.bands
    )
    return f"<div class=x>{cells}</div>"


def _steps(figure: Areas) -> str:
    widths: list[tuple[int, int]] = []
    for band in figure.bands:
        width = band.end - band.begin + 1
        if widths and widths[-1][0] == band.step:
            widths[-1] = (band.step, widths[-1][1] + width)
        else:
            widths.append((band.step, width))
    cells = "".join(
        f'<span style="flex-grow:{width}">{f"step {step + 1}" if step >= 0 else "before"}</span>'
        for step, width in widths
    )
    return f"<div class=x>{cells}</div>"


# ---------------------------------------------------------------- curves


def lines_html(figure: Lines) -> str:
    """Curves over optimizer steps; a gap where a value is missing, a dot where one is alone."""
    points = [(x, y) for _, series in figure.series for x, y in series if y is not None]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    scale = ticks(low, high, in_bytes=False)
    bottom, top = scale[0][0], scale[-1][0]
    width = (right - left) or 1.0
    shapes, keys = [], []
    for index, (name, series) in enumerate(figure.series):
        colour, dash = CURVES[index % len(CURVES)], _dash(index // len(CURVES))
        keys.append((name, colour, dash))
        for run in _runs(series):
            drawn = [((x - left) / width, (y - bottom) / (top - bottom)) for x, y in run]
            shapes.append(_curve(name, drawn, colour=colour, dash=dash))
    label = f"{figure.title} from step {left:.0f} to {right:.0f}, between {low:.3g} and {high:.3g}"
    svg = _svg([*_grid(scale, bottom, top), *shapes], label)
    named = len(figure.series) > 1
    return (
        f"{_curve_legend(keys) if named else ''}\n<div class=plot>\n"
        f"{_y_labels(scale, bottom, top)}\n{svg}\n{_x_labels(left, right)}\n</div>"
    )


def _curve(name: str, points: Sequence[tuple[float, float]], *, colour: str, dash: str) -> str:
    title = f"<title>{clean(name)}</title>"
    style = f'style="--c:var(--{colour})"'
    if len(points) == 1:
        x, _, y = _point(points[0]).partition(",")
        return f'<line class=dot {style} x1="{x}" x2="{x}" y1="{y}" y2="{y}">{title}</line>'
    path = " ".join(map(_point, points))
    return f'<polyline class=curve {style}{dash} points="{path}">{title}</polyline>'


def _runs(
    series: Sequence[tuple[float, float | None]],
) -> Iterator[list[tuple[float, float]]]:
    """Stretches without a missing value."""
    run: list[tuple[float, float]] = []
    for x, y in series:
        if y is not None:
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _dash(turn: int) -> str:
    return "" if turn == 0 else f' stroke-dasharray="{6 // turn + 2} 3"'


def _curve_legend(keys: Sequence[tuple[str, str, str]]) -> str:
    items = "".join(
        f'<li style="--c:var(--{colour})"><svg viewBox="0 0 26 14" aria-hidden=true>'
        f'<line class=curve{dash} x1="0" x2="26" y1="7" y2="7"/></svg>{clean(_spaced(name))}</li>'
        for name, colour, dash in keys
    )
    return f"<ul class=legend>{items}</ul>"


def _x_labels(left: float, right: float) -> str:
    """Whole steps, evenly apart, each below its place."""
    every = max(1, -(-int(right - left) // _MAX_X_LABELS))
    cells = "".join(
        f'<span style="left:{(step - left) / ((right - left) or 1) * 100:.2f}%">{step}</span>'
        for step in range(int(left), int(right) + 1, every)
    )
    return f"<div class='x at'>{cells}</div>"


# ---------------------------------------------------------------- shared


def _point(point: tuple[float, float]) -> str:
    """From fractions of the plot, y upwards, to the SVG's coordinates."""
    return f"{point[0] * _WIDTH:.1f},{(1 - point[1]) * _HEIGHT:.1f}"


def _svg(shapes: Sequence[str], label: str) -> str:
    drawn = "\n".join(shapes)
    return (
        f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{clean(label)}">\n{drawn}\n</svg>'
    )


def _grid(scale: Sequence[tuple[float, str]], bottom: float, top: float) -> Iterator[str]:
    for value, _ in scale:
        y = (1 - (value - bottom) / (top - bottom)) * _HEIGHT
        yield f'<line class=grid x1="0" x2="{_WIDTH:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _y_labels(scale: Sequence[tuple[float, str]], bottom: float, top: float) -> str:
    labels = "".join(
        f'<span style="bottom:{(value - bottom) / (top - bottom) * 100:.2f}%">{clean(text)}</span>'
        for value, text in scale
    )
    return f"<div class=y>{labels}</div>"
