"""How to hold a strategy of your own to its promises, with memrt's tiny models.

Run it where memrt and this package are installed: python -m pytest test_last_layers.py
"""

from __future__ import annotations

import pytest
import torch
from last_layers import LastLayers

import memrt
from memrt import registry
from memrt.errors import ConflictError
from memrt.profiling.ledger import Ledger
from memrt.runner import model_loss
from memrt.testing import tiny_batches, tiny_config, tiny_model


def train(
    strategies: list[str], *, steps: int = 2, ledger: Ledger | None = None
) -> tuple[memrt.Session, list[float]]:
    """A few steps on a tiny Llama."""
    torch.manual_seed(0)
    model = tiny_model("llama").train()
    run = memrt.prepare(model, strategies, lr=1e-2, ledger=ledger)
    losses = []
    for batch in tiny_batches("llama", count=steps):
        with run.micro_batch():
            loss = model_loss(model, batch)
            run.backward(loss)
        run.step()
        losses.append(float(loss.detach()))
    return run, losses


def test_it_is_found_by_its_name() -> None:
    assert registry.parse("last_layers(count=3)") == LastLayers(count=3)


def test_only_the_last_layers_change() -> None:
    torch.manual_seed(0)
    before = tiny_model("llama").state_dict()
    after = train(["last_layers(count=1)"])[0].model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.layers.3.") for name in changed)


def test_detach_leaves_every_parameter_trainable() -> None:
    run, _ = train(["last_layers(count=1)"])
    run.detach()
    assert all(parameter.requires_grad for parameter in run.model.parameters())


def accounts(strategies: list[str]) -> dict[str, int]:
    """Each account's own maximum over a run of two steps."""
    ledger = Ledger()
    with ledger:
        train(strategies, ledger=ledger)
    return ledger.timeline.account_maxima()


def test_it_lowers_the_accounts_that_it_claims() -> None:
    plain, ours = accounts([]), accounts(["last_layers(count=1)"])
    assert all(ours[account.value] < plain[account.value] for account in LastLayers.lowers)


def test_the_plan_knows_it() -> None:
    shape = {"batch_size": 2, "sequence_length": 16}
    plain = memrt.plan(tiny_config("llama"), **shape)
    ours = memrt.plan(tiny_config("llama"), ["last_layers(count=1)"], **shape)
    assert ours.peak_bytes < plain.peak_bytes


def test_it_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(ConflictError, match=r"count=9 is more than the 4 layers"):
        train(["last_layers(count=9)"])
    with pytest.raises(ConflictError, match=r"both own the active set"):
        train(["last_layers", "lisa"])
