"""A page for each strategy from its docstrings, their index, and "which strategy for my card".

Prose, formula, bytes, cost and source of a page are the strategy's module docstring, its table of
settings the class's; what it goes with is the matrix's, and the bytes are those of
`benchmarks/results/cards.json`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any

from benchmarks.cards import BATCH, CARDS, FILE, MODELS, PARTNERED, REFERENCE, STACKS, stack_of
from memrt.cli.stacks import split_stack
from memrt.compatibility import SETTINGS, Compatibility
from memrt.profiling.accounts import Account
from memrt.profiling.report import format_bytes
from memrt.registry import strategy_class
from memrt.strategy import Strategy

__all__ = ["cards_page", "frozen_stacks_table", "index_page", "options", "strategy_page"]

_SETTING = re.compile(r"^(\w+): (.+)$")
_CODE = re.compile(r"(`[^`]*`)")


# ---------------------------------------------------------------- one strategy


def strategy_page(name: str, found: Compatibility) -> str:
    """The whole page; a strategy that needs settings has no matrix."""
    cls = strategy_class(name)
    title, *paragraphs = _paragraphs(cls)
    parts = [f"# {name}", f"**{_prose(title)}**", *map(_paragraph, paragraphs)]
    parts.append(_facts(cls, found, name))
    table = _options_table(cls)
    if table:
        parts += ["## Settings", table]
    parts += ["## Bytes", _bytes(name)]
    if name not in found.unbuilt:
        parts += ["## What it goes with", *_partners(name, found)]
        words = (f'"{each}"' if "(" in each else each for each in split_stack(stack_of(name)))
        command = f"memrt plan --strategies {' '.join(words)}\nmemrt compat {name}"
        parts += ["## Try it", f"```bash\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def _paragraphs(cls: type[Strategy]) -> list[str]:
    docstring = inspect.cleandoc(import_module(cls.__module__).__doc__ or "")
    return docstring.split("\n\n")


def _paragraph(text: str) -> str:
    """Indented lines are formulas; between lines of prose they become a block of their own."""
    blocks: list[list[str]] = []
    for line in text.split("\n"):
        is_code = line.startswith("    ")
        if not blocks or blocks[-1][0].startswith("    ") != is_code:
            blocks.append([])
        blocks[-1].append(line)
    shown = []
    for block in blocks:
        if block[0].startswith("    "):
            shown.append("```text\n" + "\n".join(line[4:] for line in block) + "\n```")
        else:
            shown.append(_prose("\n".join(block)))
    return "\n\n".join(shown)


def _prose(text: str) -> str:
    """Text whose stars and angle brackets mean themselves."""
    parts = _CODE.split(text)
    for index in range(0, len(parts), 2):
        part = parts[index].replace("\\", "\\\\").replace("<", "&lt;")
        parts[index] = part.replace("*", r"\*").replace("_", r"\_")
    return "".join(parts)


def _facts(cls: type[Strategy], found: Compatibility, name: str) -> str:
    strategy = next((each for each in found.strategies if each.name == name), None)
    lowers = ", ".join(account.value for account in cls.lowers)
    exact = "yes, to the bit" if cls.exact else "no"
    rows = [("lowers", lowers), ("keeps the loss as it was", exact)]
    if strategy is not None:
        rows += [
            ("phase", strategy.phase.name.lower()),
            ("needs", "; ".join(sorted(p.value for p in strategy.needs)) or "nothing"),
            ("breaks", "; ".join(sorted(p.value for p in strategy.breaks)) or "nothing"),
        ]
    return _table(("", ""), rows)


def options(cls: type[Strategy]) -> dict[str, str]:
    """What the class's docstrings say of every setting, the nearest class's first."""
    found: dict[str, str] = {}
    for each in cls.__mro__:
        if each is Strategy or not issubclass(each, Strategy):
            continue
        name = None
        for line in inspect.cleandoc(each.__doc__ or "").split("\n"):
            match = _SETTING.match(line)
            if match is not None:
                name = match[1] if match[1] not in found else None
                if name is not None:
                    found[name] = match[2]
            elif line.startswith("    ") and name is not None:
                found[name] += f" {line.strip()}"
            else:
                name = None
    return found


def _options_table(cls: type[Strategy]) -> str:
    meanings = options(cls)
    rows = []
    for each in fields(cls):
        default = each.default
        if default is MISSING and each.default_factory is not MISSING:
            default = each.default_factory()
        shown = "needed" if default is MISSING else f"`{default!r}`"
        rows.append((f"`{each.name}`", shown, _prose(meanings.get(each.name, ""))))
    return _table(("setting", "default", "meaning"), rows) if rows else ""


def _partners(name: str, found: Compatibility) -> Iterator[str]:
    others = [each.name for each in found.strategies if each.name != name]
    together = [other for other in others if found.pair(name, other).text == "yes"]
    if together:
        yield "Together with: " + ", ".join(f"[`{o}`]({o}.md)" for o in together) + "."
    rows = []
    for other in others:
        for reason, kinds in found.pair(name, other).grouped():
            on = "" if len(kinds) == len(found.pair(name, other).reasons) else ", ".join(kinds)
            rows.append((f"[`{other}`]({other}.md)", on or "all", _prose(reason)))
    for setting in SETTINGS:
        for reason, _ in found.settings[(name, setting)].grouped():
            rows.append((f"`{setting}`", "all", _prose(reason)))
    for reason, kinds in found.alone[name].grouped():
        rows.append(("these models", ", ".join(kinds), _prose(reason)))
    if rows:
        yield _table(("refused with", "on", "because"), rows)
    yield "The whole matrix: [compatibility](../compatibility.md)."


# ---------------------------------------------------------------- bytes


def _rows() -> dict[tuple[str, str], Mapping[str, Any]]:
    if not FILE.is_file():
        return {}
    return {
        (row["model"], row["stack"]): row for row in json.loads(FILE.read_text("utf-8"))["rows"]
    }


def _workload() -> str:
    return f"bf16, {BATCH['batch_size']} × {BATCH['sequence_length']:,} tokens a step"


def _bytes(name: str) -> str:
    rows, partnered = _rows(), PARTNERED.get(name)
    without = "none" if partnered is None else partnered.without
    row, base = rows.get((REFERENCE, stack_of(name))), rows.get((REFERENCE, without))
    if row is None or base is None:
        return "Not planned yet; `python -m benchmarks.cards` plans it."
    for each in (row, base):
        if each["reason"] is not None:
            raise ValueError(f"{each['stack']} does not run on a Llama of {REFERENCE}: {each}")
    return f"{_how_planned(name, row, base)}\n\n{_accounts(name, row, base)}"


def _how_planned(name: str, row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    partnered = PARTNERED.get(name)
    how = "alone and with its default settings (GiB)"
    if partnered is not None:
        beside = "no strategy" if partnered.without == "none" else f"`{partnered.without}`"
        how = f"`{partnered.stack}` against {beside} (GiB): {_prose(partnered.why)}"
    return (
        f"A Llama of {REFERENCE}, {_workload()}, as `memrt plan` predicts it, {how}. The peak "
        f"comes in {base['region']['phase']} without it, and in {row['region']['phase']} with it; "
        "an account that falls elsewhere does not lower it."
    )


def _accounts(name: str, row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    names = [account.value for account in Account]
    return _table(
        ("at the peak", "without", f"with {name}"),
        [
            *(
                (account, _gib(base["accounts"][account]), _gib(row["accounts"][account]))
                for account in names
            ),
            ("**peak**", _gib(base["peak_bytes"]), _gib(row["peak_bytes"])),
            ("on the host", _gib(base["place_peaks"]["host"]), _gib(row["place_peaks"]["host"])),
        ],
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f}"


# ---------------------------------------------------------------- the index and the cards


def index_page(names: Sequence[str]) -> str:
    """All strategies, each with its page."""
    rows = _rows()
    shown = []
    for name in names:
        cls = strategy_class(name)
        row = rows.get((REFERENCE, stack_of(name)))
        peak = "" if row is None or row["reason"] is not None else _gib(row["peak_bytes"])
        if peak and name in PARTNERED:
            peak = f"{peak} (`{stack_of(name)}`)"
        lowers = ", ".join(account.value for account in cls.lowers)
        exact = "yes" if cls.exact else "no"
        title = _prose(_paragraphs(cls)[0].replace("\n", " ").rstrip("."))
        shown.append((f"[`{name}`]({name}.md)", title, lowers, exact, peak))
    head = ("strategy", "what it does", "lowers", "exact", f"peak on {REFERENCE}, GiB")
    base = rows.get((REFERENCE, "none"))
    without = "" if base is None else f" Without any strategy it is {_gib(base['peak_bytes'])} GiB."
    return (
        "# Strategies\n\nA page for each, made from its docstring: what it is, its formula, what "
        "it saves and costs, its paper, its settings, and what refuses it. Peaks are predicted by "
        f"`memrt plan`: a Llama of {REFERENCE}, {_workload()}, one strategy alone with default "
        f"settings, or the stack that is named.{without} "
        "Stacks save more: [which strategy for my card](../which-strategy.md).\n\n"
        f"{_table(head, shown)}\n"
    )


def cards_page() -> str:
    """For every card and model the first stack that fits, and the bytes of every stack."""
    rows = _rows()
    title = "# Which strategy for my card"
    if not rows:
        return f"{title}\n\nNot planned yet; run `python -m benchmarks.cards`.\n"
    models = tuple(f"{size} parameters" for size in MODELS)
    numbers = {stack: str(index + 1) for index, (stack, _) in enumerate(STACKS)}
    key = [(numbers[stack], f"`{stack}`", what) for stack, what in STACKS]
    fits = [
        (card, *(_first_that_fits(rows, size, total, numbers) for size in MODELS))
        for card, total in CARDS
    ]
    needs = [
        (numbers[stack], *(_needed(rows.get((size, stack))) for size in MODELS))
        for stack, _ in STACKS
    ]
    parts = [
        title,
        f"Llama shapes, {_workload()}, predicted by `memrt plan`; nothing here was measured on a "
        "card. A stack fits when the plan's high bound does, with the CUDA context and 5 % of "
        "fragmentation in it. Take the first that fits: it changes the training least. For your "
        "own model, batch and length:",
        "```bash\nmemrt plan --strategies galore fused_loss --gpu 24GiB\n```",
        "## Stacks, from the least change to the largest",
        _table(("", "stack", "what it changes"), key),
        "## The first that fits",
        _table(("card", *models), fits),
        "– means that none of these does. Longer sequences and larger batches raise activations "
        "and workspace alone.",
        "## What each needs (GiB on the device, high bound)",
        _table(("stack", *models), needs),
        _planned_on(),
    ]
    return "\n\n".join(parts) + "\n"


def frozen_stacks_table() -> str:
    """What the largest model takes with stacks that freeze it, and the first card that holds it."""
    rows = _rows()
    accounts = ("weights", "gradients", "optimizer", "activations", "workspace")
    found = []
    for stack, _ in STACKS:
        row = rows.get((MODELS[-1], stack))
        if stack.startswith("nf4") and row is not None and row["reason"] is None:
            high = row["device_bytes"]["high"]
            card = next((name for name, total in CARDS if high <= total), "none of these")
            bytes_of = [_gib(row["accounts"][account]) for account in accounts]
            found.append((f"`{stack}`", *bytes_of, _gib(row["peak_bytes"]), _gib(high), card))
    if not found:
        return "Not planned yet; run `python -m benchmarks.cards`."
    head = ("GiB at the peak", *accounts, "peak", "high bound", "first card that holds it")
    return f"{_table(head, found)}\n\nLlama 3's shape, {_workload()}. {_planned_on()}"


def _planned_on() -> str:
    conditions = json.loads(FILE.read_text("utf-8"))["conditions"]
    packages = conditions["packages"]
    return (
        f"Planned on {conditions['date'][:10]} at commit {conditions['commit']} with torch "
        f"{packages['torch']}, transformers {packages['transformers']}; `python -m "
        "benchmarks.cards` plans it again."
    )


def _first_that_fits(
    rows: Mapping[tuple[str, str], Mapping[str, Any]],
    size: str,
    total_bytes: int,
    numbers: Mapping[str, str],
) -> str:
    for stack, _ in STACKS:
        row = rows.get((size, stack))
        if row is None or row["reason"] is not None:
            continue
        if row["device_bytes"]["high"] <= total_bytes:
            return f"{numbers[stack]} ({format_bytes(row['device_bytes']['high'])})"
    return "–"


def _needed(row: Mapping[str, Any] | None) -> str:
    if row is None or row["reason"] is not None:
        return "not planned"
    host = row["place_peaks"]["host"]
    beside = f" + {_gib(host)} on the host" if host > 2**29 else ""
    return f"{_gib(row['device_bytes']['high'])}{beside}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        for row in lines
    )
