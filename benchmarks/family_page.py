"""The page of model families, from the rows that the tests build them of and what is found in them.

Models are built on fake tensors at a width where default settings bite; refusals are what the check
before every run says.
"""

from __future__ import annotations

from collections.abc import Sequence

from memrt.compatibility import verdict_of
from memrt.profiling.fake import fake_initialisers, fake_tensors
from memrt.strategy import Strategy
from memrt.structure import Facts, RunSettings, discover
from memrt.testing import TINY_FAMILIES, tiny_model

__all__ = ["family_page"]

_HIDDEN = 512
_LAYERS = 8

_INTRODUCTION = """\
# Model families

memrt knows no model by name. Layers, attention, embeddings, head and tied weights are found by
structure (`memrt/structure.py`), so a model of another family, or a plain `nn.Module` with repeated
blocks, is served as well. The families below are those that the tests hold to it: every strategy
trains each of them or refuses it with a reason, and plans equal the counted run to the byte.

Adding a family to the tests is adding a row to `TINY_FAMILIES` in `memrt/testing.py`. A family that
scales or caps its logits after the head also needs a row of `FAMILIES` in `memrt/structure.py`;
`fused_loss` refuses a family that does so without one.

| `model_type` | what its structure brings | layers | head | tied names |
| --- | --- | --- | --- | --- |
"""

_REFUSALS = """
## What cannot be served

Alone and with default settings, before the model is touched. What runs on no family alone, because
it needs a partner, is in [compatibility.md](compatibility.md). Every other strategy trains every
family above.

"""

_EXCEPTIONS = """
## Where a plan depends on values

`mixtral`, `deepseek_v3` and their kin: which experts a router picks is not known before the run.
Plans take all experts equally often as expected and the most uneven routing as high. The bytes
differ only where experts are run one by one (`experts_implementation="eager"`); see
[accounts.md](accounts.md). No other family has an exception.
"""


def _facts() -> dict[str, Facts]:
    found = {}
    for family in TINY_FAMILIES:
        with fake_tensors(), fake_initialisers():
            model = tiny_model(family, hidden=_HIDDEN, layers=_LAYERS)
        found[family] = Facts(model=model, structure=discover(model), settings=RunSettings())
    return found


def _row(family: str, facts: Facts) -> str:
    structure = facts.structure
    layers = ", ".join(f"`{stack.name}`" for stack in structure.stacks)
    head = "none" if structure.head is None else f"`{structure.head}`"
    tied = ", ".join(f"`{name}`" for name in sorted(structure.tied)) or "none"
    return f"| `{family}` | {TINY_FAMILIES[family].brings} | {layers} | {head} | {tied} |\n"


def family_page(strategies: Sequence[Strategy]) -> str:
    """Every family: what it brings, where its parts are, and what refuses it."""
    facts = _facts()
    rows = "".join(_row(family, each) for family, each in facts.items())
    groups: dict[tuple[str, str], list[str]] = {}
    for strategy in strategies:
        found = verdict_of([strategy], facts)
        for family, reasons in found.reasons.items():
            for reason in reasons if found.runs_on else ():  # else no family's doing
                said = reason.removeprefix(f"{strategy.name}: ")
                groups.setdefault((family, said), []).append(strategy.name)
    lines = [
        f"- `{family}` by {', '.join(f'`{name}`' for name in names)}: {reason}\n"
        for (family, reason), names in sorted(groups.items())
    ]
    return _INTRODUCTION + rows + _REFUSALS + ("".join(lines) or "Nothing.\n") + _EXCEPTIONS
