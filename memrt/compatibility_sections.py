"""The compatibility matrix as sections of a page: for a terminal and for docs/compatibility.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from memrt.compatibility import KINDS, SETTINGS, Compatibility, Verdict
from memrt.compose import explain
from memrt.profiling.render import Column, Section, Table

if TYPE_CHECKING:
    from memrt.strategy import Strategy
    from memrt.structure import Facts

__all__ = ["matrix_sections", "partner_sections", "stack_sections"]

SYMBOLS = {"yes": "✓", "no": "✗", "some": "±", "none": "–"}

_LEGEND = (
    "✓ together, ✗ refused, ± on some kinds of models, – refused for what one of them lacks alone."
)
_INTRODUCTION = """\
Made from the code by `memrt compat`: what the check before every run says of each pair, with the \
default settings of both, on a model of each kind. A refusal comes before the model is touched. \
`memrt compat A B C` asks about one stack, with settings: `memrt compat "galore(rank=64)" lisa`."""


def matrix_sections(found: Compatibility) -> list[Section]:
    """Everything, the page's title first."""
    sections = [
        Section(title="Which strategies go together", before=[_INTRODUCTION]),
        _pairs(found),
        *_pair_reasons(found, [strategy.name for strategy in found.strategies]),
        *_models(found),
        *_settings(found),
    ]
    if found.unbuilt:
        lines = [f"- {name}: {reason}" for name, reason in found.unbuilt.items()]
        sections.append(Section(title="Not shown: these need settings", before=["\n".join(lines)]))
    return sections


def partner_sections(found: Compatibility, name: str) -> list[Section]:
    """One strategy beside all others."""
    others = [strategy.name for strategy in found.strategies if strategy.name != name]
    rows = [[other, _symbol(found.pair(name, other))] for other in others]
    rows += [[setting, _symbol(found.settings[(name, setting)])] for setting in SETTINGS]
    table = Table(columns=[Column(title="with"), Column(title=name)], rows=rows)
    return [
        Section(title=f"What goes with {name}", before=[_LEGEND], table=table),
        *_pair_reasons(found, others, only=name),
        *_models(found, only=name),
        *_setting_reasons(found, [name]),
    ]


def stack_sections(
    strategies: Sequence[Strategy], facts: Mapping[str, Facts], verdict: Verdict
) -> list[Section]:
    """One stack: its order, what each owns, and on which kinds of models it runs."""
    label = " + ".join(map(str, strategies))
    shown = next(iter(verdict.runs_on), next(iter(facts)))
    answer = {
        "yes": "They go together on every kind of model.",
        "no": "They do not go together on any kind of model.",
        "some": f"They go together on: {', '.join(verdict.runs_on)}.",
    }[verdict.text]
    rows = [[kind, "✗" if verdict.reasons[kind] else "✓", KINDS[kind].example] for kind in facts]
    columns = [Column(title="kind of model"), Column(title="runs"), Column(title="such as")]
    sections = [
        Section(title=label, before=[answer], table=Table(columns=columns, rows=rows)),
        Section(
            title=f"In this order (on a {shown} model)",
            before=["\n".join(_order(explain(strategies, facts[shown])))],
        ),
    ]
    lines = [f"- on {_kinds(kinds, verdict)}: {reason}" for reason, kinds in verdict.grouped()]
    if lines:
        sections.append(Section(title="Why not", before=["\n".join(lines)]))
    return sections


def _order(explained: str) -> Iterator[str]:
    """The lines of `explain` as a list; its conflicts are told by kind of model."""
    for line in explained.splitlines():
        if line.startswith(" "):
            yield f"  - {' '.join(line.split())}"
        elif not line.startswith("conflict: "):
            phase, _, rest = line.partition(" ")
            yield f"- {phase}: {rest.strip()}"


# ---------------------------------------------------------------- parts


def _symbol(verdict: Verdict) -> str:
    return SYMBOLS[verdict.text]


def _pairs(found: Compatibility) -> Section:
    names = [strategy.name for strategy in found.strategies]
    columns = [
        Column(title="strategy"),
        *(Column(title=str(index + 1)) for index in range(len(names))),
    ]
    rows = [
        [
            f"{index + 1} {name}",
            *("" if other == name else _symbol(found.pair(name, other)) for other in names),
        ]
        for index, name in enumerate(names)
    ]
    return Section(title="Pairs", before=[_LEGEND], table=Table(columns=columns, rows=rows))


def _pair_reasons(
    found: Compatibility, names: Sequence[str], *, only: str | None = None
) -> list[Section]:
    rows = []
    for (one, other), verdict in found.pairs.items():
        if only is not None and only not in (one, other):
            continue
        if only is None and not {one, other} <= set(names):
            continue
        rows += [
            [f"{one} + {other}", _kinds(kinds, verdict), reason]
            for reason, kinds in verdict.grouped()
        ]
    if not rows:
        return []
    columns = [Column(title="pair"), Column(title="on"), Column(title="reason")]
    return [Section(title="Why a pair is refused", table=Table(columns=columns, rows=rows))]


def _kinds(kinds: Sequence[str], verdict: Verdict) -> str:
    return "all kinds" if len(kinds) == len(verdict.reasons) else ", ".join(kinds)


def _models(found: Compatibility, *, only: str | None = None) -> list[Section]:
    chosen = [s.name for s in found.strategies if only in (None, s.name)]
    columns = [Column(title="strategy"), *(Column(title=kind) for kind in KINDS)]
    rows = [
        [name, *("✗" if found.alone[name].reasons[kind] else "✓" for kind in KINDS)]
        for name in chosen
    ]
    kinds = "\n".join(f"- {name}: {kind.brings} ({kind.example})" for name, kind in KINDS.items())
    sections = [
        Section(title="Kinds of models", before=[kinds], table=Table(columns=columns, rows=rows))
    ]
    reasons = [
        f"- {reason}. On: {', '.join(kinds)}."
        for name in chosen
        for reason, kinds in found.alone[name].grouped()
    ]
    if reasons:
        sections.append(Section(title="Why a kind is refused", before=["\n".join(reasons)]))
    return sections


def _settings(found: Compatibility) -> list[Section]:
    names = [strategy.name for strategy in found.strategies]
    columns = [Column(title="strategy"), *(Column(title=setting) for setting in SETTINGS)]
    rows = [
        [name, *(_symbol(found.settings[(name, setting)]) for setting in SETTINGS)]
        for name in names
    ]
    matrix = Section(
        title="The trainer's own settings",
        before=["They take part in the check as strategies do."],
        table=Table(columns=columns, rows=rows),
    )
    return [matrix, *_setting_reasons(found, names)]


def _setting_reasons(found: Compatibility, names: Sequence[str]) -> list[Section]:
    """A reason that holds for several strategies is told once."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        for setting in SETTINGS:
            for reason, _ in found.settings[(name, setting)].grouped():
                key = (setting, reason.removeprefix(f"{name}: ").replace(name, "the strategy"))
                groups.setdefault(key, []).append(name)
    if not groups:
        return []
    rows = [[setting, ", ".join(who), reason] for (setting, reason), who in groups.items()]
    columns = [Column(title="setting"), Column(title="refuses"), Column(title="reason")]
    return [Section(title="Why a setting is refused", table=Table(columns=columns, rows=rows))]
