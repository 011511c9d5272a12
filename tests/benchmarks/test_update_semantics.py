"""The table of what in-backward and layerwise forms keep: what it says, and that it can fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import update_semantics
from benchmarks.update_semantics import (
    COLUMNS,
    FORMS,
    KEPT,
    LOST,
    REFUSED,
    semantics,
    updates_in_backward,
)
from memrt.backward_updates import BackwardUpdates

Table = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def table() -> Table:
    return semantics()


def test_nothing_is_lost_without_a_word(table: Table) -> None:
    assert len(table) == len(FORMS)
    assert not [(s, c) for s, cells in table.items() for c, cell in cells.items() if cell == LOST]


@pytest.mark.parametrize(
    "column",
    [
        "schedulers",
        "options of groups",
        "embeddings and head switchable",
        "tied weights",
        "checkpointing",
        "mixed dtypes",
    ],
)
def test_every_form_keeps(table: Table, column: str) -> None:
    assert {cells[column] for cells in table.values()} == {KEPT}


def test_every_form_accumulates_but_rules_that_never_have_the_sum(table: Table) -> None:
    for form, cells in zip(FORMS, table.values(), strict=True):
        expected = REFUSED if form in (("lomo",), ("adalomo",)) else KEPT
        assert cells["accumulation"] == expected, form
        assert (cells["2 micro-batches"] == REFUSED) is (expected == REFUSED), form


def test_in_backward_forms_refuse_what_needs_all_gradients(table: Table) -> None:
    for form, cells in zip(FORMS, table.values(), strict=True):
        backward = updates_in_backward(form)
        one_pass = backward and "two_pass" not in form[-1]
        assert cells["max_grad_norm"] == (REFUSED if one_pass else KEPT), form
        assert cells["fp16 scaling"] == (REFUSED if backward else KEPT), form
        assert cells["reentrant"] == (REFUSED if backward else KEPT), form
        assert cells["DDP"] == REFUSED, form


@pytest.mark.parametrize("form", [f for f in FORMS if len(f) > 1], ids="+".join)
def test_two_passes_clip_whatever_the_update_is(form: tuple[str, ...]) -> None:
    assert update_semantics.clipping((*form[:-1], "in_backward(clip='two_pass')")) == KEPT


def test_gradients_are_held_as_the_accounts_say(table: Table) -> None:
    """All of them with two micro-batches (projected ones are small); a fraction with one."""
    for form, cells in zip(FORMS, table.values(), strict=True):
        one = int(cells["gradients held, 1 micro-batch"].removesuffix(" %"))
        assert one < 60, form
        if updates_in_backward(form) and cells["2 micro-batches"] != REFUSED:
            two = int(cells["2 micro-batches"].removesuffix(" %"))
            projected = cells["grad_norm"] == "projected"
            assert (two >= one + 5) if projected else (two == 100), form


def test_the_trials_find_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """In-backward updates with faults put in: half a gradient, and a factor that is left out."""
    one, two = ("in_backward",), ("in_backward(clip='two_pass')",)
    arrived = BackwardUpdates._arrived

    def halved(self: BackwardUpdates, parameter: torch.nn.Parameter) -> None:
        if parameter.grad is not None and not self.run.micro_batch_index:
            parameter.grad.mul_(0.5)
        arrived(self, parameter)

    monkeypatch.setattr(BackwardUpdates, "_arrived", halved)
    for trial in ("accumulation", "grad_norm", "tied weights"):
        assert COLUMNS[trial](one) == LOST, trial
    monkeypatch.setattr(BackwardUpdates, "_arrived", arrived)

    def without(norm: Tensor, max_norm: float) -> Tensor:
        return torch.ones(())

    monkeypatch.setattr("memrt.backward_updates.clip_factor", without)
    assert update_semantics.clipping(two) == LOST


@pytest.mark.parametrize("form", [("lisa(layers=2, every=1)",), ("in_backward",)], ids="+".join)
def test_the_trial_of_the_switch_finds_one_without_effect(
    form: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update_semantics, "SWITCHES", ())
    assert update_semantics.embeddings_and_head(form) == LOST
