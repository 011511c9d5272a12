"""The ledger against PyTorch's own profiler, and its rules one by one."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from memrt.profiling.accounts import Account, Place
from memrt.profiling.ledger import Ledger, register_workspace
from memrt.runner import start, train_step
from memrt.structure import RunSettings
from memrt.testing import FAMILIES, tiny_batches, tiny_model


def _profiler_peak_rise(work: object) -> int:
    """Highest live bytes above the start, from the profiler's memory events."""
    assert callable(work)
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiled:
        work()
    live = best = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        best = max(best, live)
    return best


@pytest.mark.parametrize("family", FAMILIES)
def test_peak_rise_agrees_with_pytorch_profiler_in_fp32(family: str) -> None:
    def run(ledger: Ledger | None) -> object:
        torch.manual_seed(0)
        model = tiny_model(family)
        return start(model, [], settings=RunSettings(), ledger=ledger)

    batches = tiny_batches(family)
    plain = run(None)
    profiled = _profiler_peak_rise(lambda: train_step(plain, batches))  # type: ignore[arg-type]

    ledger = Ledger()
    observed = run(ledger)
    gc.collect()
    with ledger:
        before = sum(r.num_bytes for r in ledger.timeline.records if r.alive)
        train_step(observed, batches)  # type: ignore[arg-type]
    counted = ledger.timeline.peak().peak_bytes - before
    ledger.close()
    assert counted == pytest.approx(profiled, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_accounts_sum_to_the_peak_and_match_what_is_alive(family: str) -> None:
    model = tiny_model(family)
    ledger = Ledger()
    with ledger:
        run = start(model, [], settings=RunSettings(), ledger=ledger)
        train_step(run, tiny_batches(family))
        train_step(run, tiny_batches(family))
    ledger.close()
    peak = ledger.timeline.peak()
    parameters = {p.untyped_storage()._cdata: p.nbytes for p in model.parameters()}
    buffers = {b.untyped_storage()._cdata: b.untyped_storage().nbytes() for b in model.buffers()}
    assert sum(peak.accounts.values()) == peak.peak_bytes
    assert peak.accounts["weights"] == sum({**parameters, **buffers}.values())
    # two fp32 moments and one 4-byte step counter for every parameter
    assert peak.accounts["optimizer"] == 2 * sum(parameters.values()) + 4 * len(parameters)
    assert sum(peak.owners.values()) == peak.peak_bytes


def test_gradients_and_optimizer_state_reach_back_to_their_birth() -> None:
    """The first step's new state must not be called workspace at the instant of the peak."""
    model = nn.Linear(64, 64, bias=False)
    ledger = Ledger()
    with ledger:
        run = start(model, [], settings=RunSettings(), ledger=ledger, loss_of=_square_loss)
        train_step(run, [{"x": torch.ones(1, 64)}])
    ledger.close()
    peak = ledger.timeline.peak()
    assert peak.region.phase == "step"
    assert peak.accounts["gradients"] == 64 * 64 * 4
    assert peak.accounts["optimizer"] == 2 * 64 * 64 * 4 + 4
    assert peak.accounts["workspace"] < 64 * 64 * 4


def _square_loss(model: nn.Module, batch: object) -> Tensor:
    assert isinstance(batch, dict)
    out: Tensor = model(batch["x"]).square().sum()
    return out


def test_saved_tensors_are_activations_until_autograd_drops_them() -> None:
    ledger = Ledger()
    with ledger, ledger.phase("forward"):
        tensor = torch.ones(1024)
        token = ledger.save(tensor)
        (record,) = ledger.records_of(tensor)
        assert record.account is Account.ACTIVATIONS
        second = ledger.save(tensor.view(2, 512))
        del token
        assert record.account is Account.ACTIVATIONS
        del second
        assert record.account is Account.WORKSPACE


def test_views_count_once_and_death_frees() -> None:
    ledger = Ledger()
    with ledger:
        tensor = torch.ones(256)
        view = tensor.view(16, 16)
        del tensor
        (record,) = ledger.records_of(view)
        assert record.alive
        assert record.num_bytes == 1024
        del view
        assert not record.alive
    assert [live for _, live, _ in ledger.timeline.live_bytes()] == [1024, 0]


def test_places_are_kept_apart_from_the_device() -> None:
    ledger = Ledger()
    with ledger:
        on_device = torch.ones(256)
        with ledger.placing(Place.HOST):
            on_host = torch.ones(512)
    peak = ledger.timeline.peak()
    assert peak.peak_bytes == on_device.nbytes
    last = ledger.timeline.breakdown(ledger.timeline.now - 1)
    assert last.places == {"device": 1024, "host": on_host.nbytes, "disk": 0}


def test_declared_scratch_of_an_operator_is_counted() -> None:
    @torch.library.custom_op("memrt::scratch_for_test", mutates_args=())
    def scratch(x: Tensor) -> Tensor:
        return x + 1

    register_workspace("memrt::scratch_for_test", lambda x: 10 * x.nbytes)
    ledger = Ledger()
    with ledger:
        x = torch.ones(256)
        y = torch.ops.memrt.scratch_for_test(x)
    assert ledger.timeline.peak().peak_bytes == x.nbytes + y.nbytes + 10 * x.nbytes


def test_backward_is_attributed_to_the_module_of_the_forward() -> None:
    model = nn.Sequential(nn.Linear(8, 1000, bias=False), nn.Tanh(), nn.Linear(1000, 8, bias=False))
    ledger = Ledger()
    with ledger:
        run = start(model, [], settings=RunSettings(), ledger=ledger, loss_of=_square_loss)
        train_step(run, [{"x": torch.ones(4, 8)}])
    ledger.close()
    born = {
        (r.module, r.operator)
        for r in ledger.timeline.records
        if r.operator == "aten.tanh_backward.default"
    }
    assert born == {("1", "aten.tanh_backward.default")}
    assert set(ledger.timeline.phase_peaks()) - {"other"} == {"load", "forward", "backward", "step"}


def test_account_maxima_are_at_least_the_breakdown_at_the_peak() -> None:
    model = tiny_model("llama")
    ledger = Ledger()
    with ledger:
        run = start(model, [], settings=RunSettings(), ledger=ledger)
        train_step(run, tiny_batches("llama"))
    ledger.close()
    peak, maxima = ledger.timeline.peak(), ledger.timeline.account_maxima()
    assert all(maxima[name] >= num_bytes for name, num_bytes in peak.accounts.items())
    samples = ledger.timeline.samples(count=20)
    assert max(sample["bytes"] for sample in samples) == peak.peak_bytes
    assert len(samples) <= 20
