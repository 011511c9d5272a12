"""What a mixture of experts makes of its tokens: balanced as expected, the worst case as high.

Bytes depend on the routing where experts are run one by one (`experts_implementation="eager"`); the
grouped product that transformers takes by default has the same bytes for every routing.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memrt.gpus import Gpu
from memrt.planning import plan, simulate
from memrt.profiling.extrapolate import Simulation
from memrt.profiling.fake import Routing, fake_tensors, real_integers
from memrt.profiling.ledger import Ledger
from memrt.profiling.timeline import Timeline
from memrt.runner import start, train_step
from memrt.structure import RunSettings
from memrt.testing import tiny_batches, tiny_config, tiny_model

SETTINGS = RunSettings(max_grad_norm=1.0)


def _build(implementation: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = tiny_model("mixtral", layers=2)
    model.set_experts_implementation(implementation)
    return model


class _Forced(TorchDispatchMode):
    """Real routers pick what the plan's do."""

    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func is not torch.ops.aten.topk.default:
            return result
        size, choices = result[1].numel(), args[0].shape[-1]
        picks = [i % choices for i in range(size)]
        if self.routing == "worst":
            width = result[1].shape[-1]
            picks = [i if i < choices else (i - choices) % width for i in range(size)]
        return result[0], torch.tensor(picks).view(result[1].shape)


def _counted(implementation: str, *, seed: int = 0, routing: Routing | None = None) -> Timeline:
    window = tiny_batches("mixtral", count=1, seed=seed)
    ledger = Ledger()
    with nullcontext() if routing is None else _Forced(routing), ledger:
        run = start(_build(implementation), [], settings=SETTINGS, ledger=ledger)
        for _ in range(2):
            train_step(run, window)
    ledger.close()
    return ledger.timeline


def _planned(implementation: str, routing: Routing) -> Simulation:
    window = tiny_batches("mixtral", count=1)
    return simulate(lambda: _build(implementation), [], window, settings=SETTINGS, routing=routing)


@pytest.mark.parametrize("routing", ["balanced", "worst"])
def test_a_routing_is_planned_to_the_byte(routing: Routing) -> None:
    counted, planned = _counted("eager", routing=routing), _planned("eager", routing)
    assert planned.routed
    assert planned.peak.peak_bytes == counted.peak().peak_bytes
    assert planned.peak.accounts == counted.peak().accounts
    assert planned.phases() == counted.phase_peaks()
    assert planned.account_maxima == counted.account_maxima()


def test_runs_of_any_routing_stay_below_the_high_bound() -> None:
    bounds = [_planned("eager", r).phases()["backward"] for r in ("balanced", "worst")]
    assert bounds[0] < bounds[1]
    counted = [_counted("eager", seed=seed).phase_peaks()["backward"] for seed in range(4)]
    assert max(counted) <= bounds[1]


def test_the_grouped_product_needs_the_same_bytes_for_every_routing() -> None:
    balanced, worst = _planned("grouped_mm", "balanced"), _planned("grouped_mm", "worst")
    assert balanced.peak.accounts == worst.peak.accounts
    assert balanced.peak.accounts == _counted("grouped_mm").peak().accounts


def test_a_plan_takes_the_worst_routing_into_its_high_bound() -> None:
    stack = ["activation_checkpoint", "fused_loss"]
    options = {"batch_size": 2, "sequence_length": 256}
    found = plan(tiny_config("mixtral", layers=2, experts_implementation="eager"), stack, **options)
    assert found.worst is not None
    expected, worst = found.simulation.rounded_peak_bytes, found.worst.rounded_peak_bytes
    assert worst > expected
    lines = {each.name: each for each in Gpu.overheads(expected, worst)}
    assert (lines["routing"].low, lines["routing"].expected) == (0, 0)
    assert lines["routing"].high == worst - expected
    high = Gpu.required_bytes(expected)["high"] + worst - expected
    assert found.device_bytes == {**Gpu.required_bytes(expected), "high": high}
    assert found.to_json()["worst_rounded_peak_bytes"] == worst


def test_a_model_without_a_router_has_no_such_line() -> None:
    found = plan(tiny_config("llama", layers=1), batch_size=1, sequence_length=8)
    assert found.worst is None
    assert found.to_json()["worst_rounded_peak_bytes"] is None
    assert found.device_bytes == Gpu.required_bytes(found.simulation.rounded_peak_bytes)


@pytest.mark.parametrize("routing", ["balanced", "worst"])
def test_fewer_picks_than_choices_are_all_different(routing: Routing) -> None:
    with fake_tensors(), real_integers(routing):
        _, picked = torch.empty(2, 9).topk(3)
        assert picked.flatten().tolist() == list(range(6))


@pytest.mark.parametrize(("routing", "expected"), [("balanced", [2, 2, 2]), ("worst", [3, 2, 1])])
def test_what_a_router_picks(routing: Routing, expected: list[int]) -> None:
    with fake_tensors():
        scores = torch.empty(3, 3)
        with real_integers(routing) as integers:
            values, picked = scores.topk(2)
            assert integers.routed
            assert values.shape == picked.shape == (3, 2)
            assert torch.bincount(picked.flatten(), minlength=3).tolist() == expected
            assert all(len(set(row)) == 2 for row in picked.tolist())
