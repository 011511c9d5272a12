"""One self-contained HTML page from the JSON of a report: pictures, and every table.

No script, no font, no image and no address is loaded: the page's own policy forbids it, so a report
can be mailed and opened anywhere. Text never scales with a picture (axes are HTML around an SVG),
so that it is readable on a phone; wide tables scroll in a frame of their own. Light or dark follows
the reader's system. Every name from a model, a path or a configuration is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from memrt.profiling.render import Section, Table
from memrt.profiling.render_figures import Areas, Bars, Figure, Lines, figures
from memrt.profiling.render_html_plots import areas_html, bars_html, clean, lines_html
from memrt.profiling.render_html_style import STYLE
from memrt.profiling.render_sections import sections
from memrt.profiling.report import format_bytes

__all__ = ["to_html"]

Report = Mapping[str, Any]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def to_html(report: Report) -> str:
    """The whole report as one HTML page."""
    title, *rest = sections(report)
    body = "\n".join(_body(report, title, rest))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{clean(title.title)}</title>\n<style>\n{STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _body(report: Report, title: Section, rest: Sequence[Section]) -> Iterator[str]:
    yield f"<header>\n<h1>{_breakable(title.title)}</h1>\n{_key_numbers(report)}\n</header>\n<main>"
    for index, figure in enumerate(figures(report)):
        yield _figure(figure, name=f"figure-{index}")
    yield "<h2>In numbers</h2>"
    yield from _section(Section(before=title.before, table=title.table, after=title.after))
    for section in rest:
        yield from _section(section)
    yield f"</main>\n<footer class=quiet>{_footer(report)}</footer>"


# ---------------------------------------------------------------- the first screen


def _key_numbers(report: Report) -> str:
    shown = list(_keys(report))
    cells = "\n".join(
        f"<div><dt>{clean(name)}</dt><dd>{clean(value)}</dd></div>" for name, value in shown
    )
    return f"<dl class=key>\n{cells}\n</dl>" if shown else ""


def _keys(report: Report) -> Iterator[tuple[str, str]]:
    if report["kind"] == "compare":
        yield from _keys_of_comparison(report)
        return
    if report["peak_bytes"] is not None:
        name = "predicted peak" if report["kind"] == "plan" else "counted peak"
        yield name, format_bytes(report["peak_bytes"])
    predicted = report.get("predicted")
    if predicted is not None:
        yield "predicted peak", format_bytes(predicted["peak_bytes"])
    if report["kind"] == "plan":
        yield "on a GPU, at most", format_bytes(report["device_bytes"]["high"])
    gpu, host = report.get("gpu"), report.get("host")
    if gpu is not None:
        fits = report["device_bytes"]["high"] <= gpu["total_bytes"]
        yield f"fits {gpu['text']}", "yes" if fits else "no"
    if host is not None:
        yield f"fits {host['text']} of host memory", "yes" if report["fits_host"] else "no"
    if report["tokens_per_second"] is not None:
        yield "tokens per second", f"{report['tokens_per_second']:,.0f}"
    if report["loss"] is not None:
        yield "training loss", f"{report['loss']:.3f}"
    if report.get("evaluation_loss") is not None:
        yield "evaluation loss", f"{report['evaluation_loss']:.3f}"


def _keys_of_comparison(report: Report) -> Iterator[tuple[str, str]]:
    done = [run for run in report["runs"] if run["status"] == "ok"]
    yield "stacks that ran", f"{len(done)} of {len(report['runs'])}"
    if done:
        least = min(done, key=lambda run: run["peak_bytes"])
        fastest = max(done, key=lambda run: run["tokens_per_second"])
        change = (least["peak_bytes"] / done[0]["peak_bytes"] - 1) * 100
        yield f"lowest peak ({change:+.0f} %)", format_bytes(least["peak_bytes"])
        yield "most tokens per second", f"{fastest['tokens_per_second']:,.0f}"


def _footer(report: Report) -> str:
    conditions = report["conditions"]
    packages = conditions.get("packages") or {}
    parts = [
        conditions.get("date"),
        conditions.get("device"),
        f"commit {conditions['commit']}" if conditions.get("commit") else None,
        *(f"{name} {version}" for name, version in packages.items()),
    ]
    return clean(" · ".join(str(part) for part in parts if part))


# ---------------------------------------------------------------- figures and sections


def _figure(figure: Figure, *, name: str) -> str:
    if isinstance(figure, Bars):
        drawn = bars_html(figure)
    elif isinstance(figure, Areas):
        drawn = areas_html(figure)
    else:
        assert isinstance(figure, Lines)
        drawn = lines_html(figure)
    return (
        f'<h2 id="{name}">{clean(figure.title)}</h2>\n<figure aria-labelledby="{name}">\n{drawn}\n'
        f"<figcaption>{clean(figure.note)}</figcaption>\n</figure>"
    )


def _section(section: Section) -> Iterator[str]:
    if section.title:
        yield f"<h2>{clean(section.title)}</h2>"
    for text in section.before:
        yield _text(text)
    if section.table is not None:
        yield _table(section.table, section.title)
    for text in section.after:
        yield _text(text, quiet=True)


def _text(text: str, *, quiet: bool = False) -> str:
    """Paragraphs, and lines that begin with a dash as a list."""
    mark = " class=quiet" if quiet else ""
    lines = text.split("\n")
    if all(line.lstrip().startswith("- ") for line in lines):
        items = "\n".join(f"<li>{clean(line.lstrip()[2:])}</li>" for line in lines)
        return f"<ul{mark}>\n{items}\n</ul>"
    return "\n".join(f"<p{mark}>{clean(line)}</p>" for line in lines if line)


def _table(table: Table, title: str) -> str:
    numeric = [column.kind != "text" for column in table.columns]
    head = "".join(
        f"<th scope=col{' class=number' if right else ''}>{clean(column.title)}</th>"
        for column, right in zip(table.columns, numeric, strict=True)
    )
    rows = "\n".join(
        "<tr>"
        + "".join(
            f"<td{_class(cell, right)}>{_breakable(cell)}</td>"
            for cell, right in zip(row, numeric, strict=True)
        )
        + "</tr>"
        for row in table.cells()
    )
    label = clean(title or "In numbers")
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{label}">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _class(cell: str, is_number: bool) -> str:
    if is_number:
        return " class=number"
    return " class=long" if len(cell) > 40 else ""


def _breakable(cell: str) -> str:
    """A long name may break at its dots, slashes and pluses."""
    text = clean(cell)
    if len(text) < 24:
        return text
    for mark in ("/", "+", "_"):
        text = text.replace(mark, f"{mark}<wbr>")
    return text.replace(".", ".<wbr>")
