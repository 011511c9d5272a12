"""Refresh times, and intervals that grow where the subspace rests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from memrt.optimizers.refresh import WINDOW, RefreshSchedule, overlap


def times(schedule: RefreshSchedule, last: int, shared: float | None = None) -> list[int]:
    found = []
    for step in range(last):
        if schedule.due(step):
            found.append(step)
            if shared is not None and step > 0:
                schedule.note(torch.tensor(shared))
    return found


@pytest.mark.parametrize(
    ("every", "offset", "expected"),
    [(4, 0, [0, 4, 8, 12]), (4, 3, [0, 3, 7, 11]), (1, 0, list(range(14))), (50, 0, [0])],
)
def test_every_interval_from_the_offset(every: int, offset: int, expected: list[int]) -> None:
    assert times(RefreshSchedule(every=every, offset=offset), 14) == expected
    # overlaps change nothing where nobody asked to be lazy
    assert times(RefreshSchedule(every=every, offset=offset), 14, shared=1.0) == expected


def test_a_subspace_that_rests_is_refreshed_half_as_often_after_five_overlaps() -> None:
    """A first basis has no overlap: six refreshes, five overlaps, then the interval doubles."""
    schedule = RefreshSchedule(every=2, lazy=0.4)
    found = times(schedule, 60, shared=0.9)
    assert found == [0, 2, 4, 6, 8, 10, 14, 18, 22, 26, 30, 38, 46, 54]
    assert schedule.every == 8
    assert WINDOW == 5


def test_one_good_run_doubles_once() -> None:
    """The count begins anew: the overlaps of the old interval do not count for the next."""
    schedule = RefreshSchedule(every=1, lazy=0.4)
    assert times(schedule, 6, shared=0.9) == [0, 1, 2, 3, 4, 5]
    found = []
    for step in range(6, 30):
        if schedule.due(step):
            found.append(step)
            schedule.note(torch.tensor(0.1))
    assert found == list(range(7, 30, 2))


def test_a_subspace_that_moves_keeps_its_interval() -> None:
    assert times(RefreshSchedule(every=2, lazy=0.4), 40, shared=0.39) == list(range(0, 40, 2))


def test_the_state_goes_on_in_the_middle() -> None:
    whole = times(RefreshSchedule(every=2, lazy=0.4), 60, shared=0.9)
    for stop in (0, 3, 10, 11, 12, 29):
        first, second = RefreshSchedule(every=2, lazy=0.4), RefreshSchedule(every=2, lazy=0.4)
        found = times(first, stop, shared=0.9)
        second.load_state_dict(first.state_dict(), device=torch.device("cpu"))
        for step in range(stop, 60):
            if second.due(step):
                found.append(step)
                if step > 0:
                    second.note(torch.tensor(0.9))
        assert found == whole


def test_a_step_that_is_asked_for_again_refreshes_once() -> None:
    schedule = RefreshSchedule(every=4, offset=1)
    asked = (0, 0, 1, 1, 2, 5, 5)
    assert [step for step in asked if schedule.due(step)] == [0, 1, 5]


def orthonormal(size: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator)).Q


def test_the_overlap_is_of_spaces_and_corrected_for_chance() -> None:
    basis = orthonormal(40, 30, seed=0)
    rotation = orthonormal(30, 30, seed=1)
    assert float(overlap(basis, -basis)) == pytest.approx(1.0, abs=1e-5)
    assert float(overlap(basis, basis @ rotation)) == pytest.approx(1.0, abs=1e-5)
    strangers = [overlap(basis, orthonormal(40, 30, seed=seed)) for seed in range(2, 42)]
    assert abs(float(torch.stack(strangers).mean())) < 0.02
    half = torch.eye(40)
    assert float(overlap(half[:, :10], half[:, 5:15])) == pytest.approx((0.5 - 0.25) / 0.75)


@pytest.mark.parametrize("lazy", [0.0, 1.5, -1.0])
def test_wrong_thresholds_are_named(lazy: float) -> None:
    with pytest.raises(ValueError, match="lazy is"):
        RefreshSchedule(every=3, lazy=lazy)
