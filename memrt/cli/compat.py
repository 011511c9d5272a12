"""`memrt compat`: which strategies go together, and why others do not, from the code itself."""

from __future__ import annotations

import argparse
import io
import json
import sys
from typing import TYPE_CHECKING, Any

from memrt.cli.arguments import STACK_HELP, add_command

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from memrt.compatibility import Verdict
    from memrt.profiling.render import Section
    from memrt.strategy import Strategy
    from memrt.structure import Facts

__all__ = ["REFUSED", "add_parser", "run"]

REFUSED = 2

_DESCRIPTION = f"""\
Which strategies go together, with which settings of the trainer, on which kinds of models.

  memrt compat                                  the whole matrix, with a reason for every refusal
  memrt compat lisa                             what goes with lisa
  memrt compat lisa int8_states "galore(rank=64)"    whether this stack runs, and in which order

Nothing is trained and no weight is loaded: it is the check that comes before every run.
{STACK_HELP}
Exit codes: 0 (a stack: runs on at least one kind of model), 2 a stack that runs on none, 1 error.
"""


def add_parser(subparsers: Any) -> None:
    """Declare the command."""
    parser = add_command(
        subparsers,
        "compat",
        summary="which strategies go together, and why others do not",
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "strategies", nargs="*", metavar="STRATEGY", help="one: its partners; several: this stack"
    )
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.add_argument(
        "--traceback", action="store_true", help="show where an error was raised in the code"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask, print."""
    from memrt import registry
    from memrt.cli.stacks import parse_stack
    from memrt.compatibility import buildable, facts_of_kinds, survey
    from memrt.compatibility_sections import matrix_sections, partner_sections

    strategies = list(parse_stack(arguments.strategies or ["none"]).strategies)
    if len(strategies) > 1:
        return _stack(strategies, as_json=arguments.json)
    others, unbuilt = buildable(
        [name for name in registry.names() if name not in {s.name for s in strategies}]
    )
    found = survey(
        sorted([*strategies, *others], key=lambda strategy: strategy.name),
        facts_of_kinds(),
        unbuilt=unbuilt,
    )
    if not strategies:
        _show(matrix_sections(found), found.to_json(), as_json=arguments.json)
    else:
        name = strategies[0].name
        whole = found.to_json()
        whole["pairs"] = [pair for pair in whole["pairs"] if name in pair["strategies"]]
        whole["settings"] = [each for each in whole["settings"] if each["strategy"] == name]
        _show(partner_sections(found, name), whole, as_json=arguments.json)
    return 0


def _stack(strategies: Sequence[Strategy], *, as_json: bool) -> int:
    from memrt.compatibility import SCHEMA, facts_of_kinds, verdict_of
    from memrt.compatibility_sections import stack_sections

    facts = facts_of_kinds()
    verdict = verdict_of(strategies, facts)
    report = {
        "schema": SCHEMA,
        "stack": [strategy.to_json() for strategy in strategies],
        **verdict.to_json(),
        **_order(strategies, facts, verdict),
    }
    _show(stack_sections(strategies, facts, verdict), report, as_json=as_json)
    return REFUSED if verdict.text == "no" else 0


def _order(
    strategies: Sequence[Strategy], facts: Mapping[str, Facts], verdict: Verdict
) -> dict[str, Any]:
    """What the text says under "In this order", of the same participants."""
    from memrt.compose import participants

    kind = next(iter(verdict.runs_on), next(iter(facts)))
    parties = participants(strategies, facts[kind])[-len(strategies) :]
    order = [
        {
            "strategy": str(strategy),
            "phase": strategy.phase.name.lower(),
            "owns": [
                {"slot": claim.slot.value, "scope": sorted(claim.scope)} for claim in party.claims
            ],
            "breaks": [promise.value for promise in party.breaks],
        }
        for strategy, party in zip(strategies, parties, strict=True)
    ]
    return {"kind": kind, "order": order}


def _show(sections: Sequence[Section], report: Mapping[str, Any], *, as_json: bool) -> None:
    from memrt.profiling.render import print_sections

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a ✓
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_sections(sections)
