"""The GPU suite's cases at full scale, without a GPU: none is refused, every strategy bites."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import operator_layers, operator_steps, operators
from benchmarks.gpu.common import Setting, stack_of
from benchmarks.gpu.correctness import HIDDEN, Case, cases, refusal
from benchmarks.gpu.speed import LEFT_OUT
from benchmarks.gpu.workloads import (
    DTYPE,
    SETTINGS,
    memory_models,
    seventy_b_stacks,
    speed_model,
    stacks,
    strategies_of,
)
from benchmarks.record import ROOT
from benchmarks.shapes import llama_config
from memrt import registry, testing
from memrt.compose import conflicts
from memrt.planning import facts_of
from memrt.profiling.ledger import Ledger
from memrt.runner import start, train_step
from memrt.structure import RunSettings
from memrt.testing import PARTNERS, tiny_batches, tiny_model

FULL = Setting(device=torch.device("cpu"), scale="full", output=Path("unused"))
CASES = cases(FULL)

REFUSED = {"plain fused_loss"}
"""A plain module has no language-model head."""


def test_every_strategy_and_every_stack_is_there_on_every_family() -> None:
    for family in testing.FAMILIES:
        stacks = [stack for found, stack in CASES.values() if found == family]
        assert {"none", *registry.names()} <= {*stacks}
        assert len(stacks) == 1 + len(registry.names()) + len(testing.STACKS)


def test_no_case_is_refused_but_those_that_cannot_run() -> None:
    assert {key for key, case in CASES.items() if refusal(*case) is not None} == REFUSED


@pytest.mark.parametrize("family", testing.FAMILIES)
def test_what_is_not_refused_begins(family: str) -> None:
    """With the settings that cases train with, and partners."""
    for key, (of, stack) in CASES.items():
        if of == family and key not in REFUSED:
            names = testing.specs(stack_of(stack))
            run = Case(family=family, specs=tuple(names), device=FULL.device).begin()
            assert {type(a.settings).name for a in run.session.attachments} >= {
                name for name in stack_of(stack) if "(" not in name
            }, key
            run.session.detach()


def _accounts(names: list[str]) -> dict[str, int]:
    """Each account's maximum over two steps of a Llama as narrow as the suite's."""
    torch.manual_seed(0)
    model = tiny_model("llama", hidden=HIDDEN)
    ledger = Ledger()
    strategies = registry.parse_all(testing.specs(names))
    with ledger:
        run = start(model, strategies, settings=RunSettings(), ledger=ledger)
        for step in range(2):
            train_step(run, tiny_batches("llama", seed=step, length=32))
    ledger.close()
    return dict(ledger.timeline.account_maxima())


def test_every_strategy_bites_where_the_suite_tries_it() -> None:
    """A weight is really projected, state and weights really packed: the accounts are lower."""
    known: dict[tuple[str, ...], dict[str, int]] = {}
    idle = []
    for name in registry.names():
        partners = tuple(PARTNERS.get(name, []))
        if partners not in known:
            known[partners] = _accounts([*partners])
        plain, lowered = known[partners], _accounts([name])
        accounts = [account.value for account in registry.parse(testing.SPECS[name]).lowers]
        assert accounts, name
        if name == "fused_loss":  # logits are part of the peak at the head, not of the maximum
            accounts.remove("workspace")
        idle += [f"{name}: {a}" for a in accounts if not lowered[a] < plain[a]]
    assert not idle


def test_every_operator_with_a_kernel_of_its_own_is_held_to_plain_pytorch() -> None:
    """`launching` launches the others; steps and codes of FP8 are inside `adamw_fp8`'s kernel.

    Kernels for many parameters at a time are the optimizer's own way, which steps there too.
    """
    inside = {"__init__", "launching", "adamw_step", "expanded_fp8"}
    files = {path.stem for path in (ROOT / "kernels/_triton").glob("*.py")}
    kernels = {name for name in files - inside if not name.endswith("_foreach")}
    layers = {"frozen_linear", "nf4", "int8_weights", "gated_product", "cross_entropy"}
    modules = (operators, operator_layers, operator_steps)
    imported = {
        node.module.removeprefix("memrt.kernels.")
        for module in modules
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.ImportFrom) and node.module is not None
    }
    assert kernels | layers <= imported


def test_no_stack_that_is_measured_is_refused() -> None:
    """On a small Llama whose side networks can be built; every strategy is measured once."""
    facts = facts_of(llama_config("0.004B"), dtype=DTYPE, settings=SETTINGS)
    found = {stack for model in memory_models(FULL) for stack in stacks(FULL, model.size)}
    found |= {*seventy_b_stacks(FULL).values(), *seventy_b_stacks(FULL, packed="int8").values()}
    refused = {stack: conflicts(strategies_of(stack), facts) for stack in sorted(found)}
    assert not {stack: reasons for stack, reasons in refused.items() if reasons}
    names = {part.partition("(")[0] for stack in found for part in stack_of(stack)}
    assert names == {*registry.names()}
    assert {*stacks(FULL, speed_model(FULL).size)} >= {*LEFT_OUT}
