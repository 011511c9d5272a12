"""The pictures of a report as one PNG, for slides and issues; matplotlib draws it.

matplotlib is not a dependency of memrt: `pip install "memrt[png]"` brings it. Colours are those of
the HTML page.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from memrt.profiling.render_figures import (
    ACCOUNTS,
    KEYS,
    SAVED,
    TOTAL,
    Areas,
    Bars,
    Figure,
    Lines,
    figures,
    key_title,
    ticks,
)
from memrt.profiling.render_html_style import CURVES, DARK, LIGHT
from memrt.profiling.render_sections import account_title, sections

__all__ = ["can_draw", "to_png"]

_WIDTH_INCHES = 10.0
_DPI = 120
_LABEL_CHARACTERS = 44
_CHARACTER_INCHES = 0.07


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def to_png(report: Mapping[str, Any], *, dark: bool = False) -> bytes:
    """The figures of a report, one below the other, as the bytes of a PNG file."""
    if not can_draw():
        raise ValueError(
            'a PNG needs matplotlib, which is not installed; run: pip install "memrt[png]"'
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    colours = DARK if dark else LIGHT
    drawn = figures(report)
    heights = [_height(figure) for figure in drawn]
    canvas = Canvas(
        figsize=(_WIDTH_INCHES, sum(heights) + 0.6),
        dpi=_DPI,
        facecolor=colours["page"],
        layout="constrained",
    )
    FigureCanvasAgg(canvas)
    title = sections(report)[0].title
    canvas.suptitle(_plain(title), color=colours["text"], fontsize=13, x=0.01, ha="left")
    axes = canvas.subplots(len(drawn), 1, height_ratios=heights, squeeze=False)[:, 0]
    for ax, figure in zip(axes, drawn, strict=True):
        _dress(ax, figure.title, colours)
        if isinstance(figure, Bars):
            _bars(ax, figure, colours)
        elif isinstance(figure, Areas):
            _areas(ax, figure, colours)
        else:
            _lines(ax, figure, colours)
    stream = io.BytesIO()
    canvas.savefig(stream, format="png", facecolor=colours["page"])
    return stream.getvalue()


def _height(figure: Figure) -> float:
    """Inches."""
    if isinstance(figure, Bars):
        return 1.2 + 0.32 * len(figure.bars)
    return 3.4 if isinstance(figure, Areas) else 3.2 + 0.12 * len(figure.series)


def _plain(text: str) -> str:
    """Without the dollar signs that matplotlib reads as formulas, on lines that fit."""
    text = "".join(c for c in text if c.isprintable()).replace("$", r"\$")
    return text if len(text) <= 100 else f"{text[:97]}..."


def _dress(ax: Any, title: str, colours: Mapping[str, str]) -> None:
    ax.set_title(title, loc="left", color=colours["text"], fontsize=11)
    ax.set_facecolor(colours["page"])
    ax.tick_params(colors=colours["quiet"], labelsize=9)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colours["rule"])


def _legend(ax: Any, colours: Mapping[str, str], *, num_columns: int) -> None:
    """Between title and plot."""
    handles, _ = ax.get_legend_handles_labels()
    if handles:
        ax.legend(
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            borderaxespad=0.2,
            ncols=num_columns,
            frameon=False,
            fontsize=9,
            labelcolor=colours["text"],
        )
        num_rows = -(-len(handles) // num_columns)
        ax.set_title(ax.get_title("left"), loc="left", fontsize=11, pad=8 + 15 * num_rows)


def _short(label: str) -> str:
    label = _plain(label)
    return label if len(label) <= _LABEL_CHARACTERS else f"{label[: _LABEL_CHARACTERS - 3]}..."


def _bars(ax: Any, figure: Bars, colours: Mapping[str, str]) -> None:
    rows = range(len(figure.bars))
    left = [0.0] * len(figure.bars)
    split = any(key not in (*ACCOUNTS, TOTAL) for bar in figure.bars for key, _ in bar.segments)
    for key in KEYS:
        widths = [sum(value for name, value in bar.segments if name == key) for bar in figure.bars]
        if any(widths):
            label = None if key == TOTAL and not split else key_title(key)
            style = {"edgecolor": colours["page"], "linewidth": 0.8, "height": 0.7}
            ground = colours["page"] if key == SAVED else colours[key]
            if key == SAVED:  # it is not there any more
                style = {**style, "edgecolor": colours[key], "hatch": "////"}
            ax.barh(rows, widths, left=left, color=ground, label=label, **style)
        left = [x + width for x, width in zip(left, widths, strict=True)]
    longest = figure.longest
    _marks(ax, figure, colours)
    for row, (bar, end) in enumerate(zip(figure.bars, left, strict=True)):
        place = (max(end, bar.mark or 0) + 0.01 * longest, row)
        ax.annotate(bar.text, place, va="center", fontsize=9, color=colours["text"])
    ax.set_yticks(rows, [_short(bar.label) for bar in figure.bars], color=colours["text"])
    ax.invert_yaxis()
    room = _room(figure)
    ax.set_xlim(0, room)
    scale = ticks(0, longest, in_bytes=figure.in_bytes)
    shown = [(value, text) for value, text in scale if value <= room]
    ax.set_xticks([value for value, _ in shown], [text for _, text in shown])
    _legend(ax, colours, num_columns=len(ACCOUNTS))


def _room(figure: Bars) -> float:
    """The axis's end: every bar's number has to fit beside it."""
    characters = _WIDTH_INCHES * 0.65 / _CHARACTER_INCHES
    ends = [
        max(bar.total, bar.mark or 0) / max(0.4, 0.98 - len(bar.text) / characters)
        for bar in figure.bars
    ]
    return max([1.14 * figure.longest, *ends])


def _marks(ax: Any, figure: Bars, colours: Mapping[str, str]) -> None:
    """A dashed line across every bar that has a second reading."""
    marked = [(row, bar.mark) for row, bar in enumerate(figure.bars) if bar.mark is not None]
    if marked:
        ax.vlines(
            [mark for _, mark in marked],
            [row - 0.42 for row, _ in marked],
            [row + 0.42 for row, _ in marked],
            colors=colours["text"],
            linestyles="dashed",
            linewidth=1.4,
            label=figure.mark,
        )


def _areas(ax: Any, figure: Areas, colours: Mapping[str, str]) -> None:
    x = range(len(figure.samples))
    shown = [a for a in ACCOUNTS if any(sample[a] for sample in figure.samples)]
    ax.stackplot(
        x,
        [[sample[account] for sample in figure.samples] for account in shown],
        colors=[colours[account] for account in shown],
        labels=[account_title(account) for account in shown],
        edgecolor=colours["page"],
        linewidth=0.4,
    )
    for band in figure.bands[::2]:
        ax.axvspan(band.begin, band.end, color=colours["band"], zorder=0)
    ax.axvline(figure.peak, color=colours["text"], linestyle="--", linewidth=1)
    scale = ticks(0, sum(figure.samples[figure.peak].values()), in_bytes=True)
    ax.set_yticks([value for value, _ in scale], [text for _, text in scale])
    wide = [band for band in figure.bands if (band.end - band.begin) * 16 > len(figure.samples)]
    ax.set_xticks(
        [(band.begin + band.end) / 2 for band in wide],
        [f"{band.phase}\nstep {band.step + 1}" for band in wide],
    )
    ax.set_xlim(0, max(len(figure.samples) - 1, 1))
    _legend(ax, colours, num_columns=len(ACCOUNTS))


def _lines(ax: Any, figure: Lines, colours: Mapping[str, str]) -> None:
    for index, (name, points) in enumerate(figure.series):
        y = [float("nan") if value is None else value for _, value in points]
        ax.plot(
            [step for step, _ in points],
            y,
            color=colours[CURVES[index % len(CURVES)]],
            linestyle="--" if index >= len(CURVES) else "-",
            marker="o" if len(points) < 3 else None,
            linewidth=1.6,
            label=_short(name) if len(figure.series) > 1 else None,
        )
    ax.grid(axis="y", color=colours["rule"], linewidth=0.6)
    ax.set_axisbelow(True)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_xlabel("optimizer step", color=colours["quiet"], fontsize=9)
    _legend(ax, colours, num_columns=2)
