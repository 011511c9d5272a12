"""Allocator peaks at phase edges, and the split of the driver's number."""

from __future__ import annotations

import itertools

import pytest
import torch

from memrt.profiling.allocator import (
    AllocatorPhases,
    AllocatorReading,
    AllocatorUnavailable,
    CudaAllocator,
    reconcile,
)

MIB = 2**20
BLOCK = 512


class CountingAllocator:
    """Counts as the caching allocator does: blocks of 512 bytes, nothing given back."""

    def __init__(self) -> None:
        self.allocated = self.requested = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self.num_alloc_retries = 3

    def allocate(self, num_bytes: int) -> None:
        self.requested += num_bytes
        self.allocated += -(-num_bytes // BLOCK) * BLOCK
        self.reserved = max(self.reserved, self.allocated)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def free(self, num_bytes: int) -> None:
        self.requested -= num_bytes
        self.allocated -= -(-num_bytes // BLOCK) * BLOCK

    def read(self) -> AllocatorReading:
        return AllocatorReading(
            allocated_bytes=self.allocated,
            requested_bytes=self.requested,
            active_bytes=self.allocated,
            reserved_bytes=self.reserved,
            inactive_split_bytes=0,
            peak_allocated_bytes=self.peak_allocated,
            peak_active_bytes=self.peak_allocated,
            peak_reserved_bytes=self.peak_reserved,
            num_alloc_retries=self.num_alloc_retries,
            num_ooms=0,
        )

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved


def test_each_phase_has_its_own_peak_and_the_run_keeps_the_largest() -> None:
    source = CountingAllocator()
    source.allocate(8 * MIB)
    source.free(8 * MIB)  # before the run: nobody's peak
    phases = AllocatorPhases(source)
    for forward, backward in ((3, 5), (4, 2)):
        with phases.phase("step"):
            with phases.phase("forward"):
                source.allocate(forward * MIB)
            with phases.phase("backward"):
                source.allocate(backward * MIB)
                source.free(backward * MIB)  # a spike within the phase
            source.free(forward * MIB)
    source.num_alloc_retries += 2
    peaks = phases.peaks()
    assert peaks is not None
    allocated = {name: values["peak_allocated_bytes"] for name, values in peaks.phases.items()}
    assert allocated == {"step": 8 * MIB, "forward": 4 * MIB, "backward": 8 * MIB}
    assert peaks.peak_allocated_bytes == peaks.peak_reserved_bytes == 8 * MIB
    assert peaks.num_alloc_retries == 2
    assert peaks.last.allocated_bytes == 0


def test_what_lies_between_phases_counts_for_the_run_alone() -> None:
    source = CountingAllocator()
    phases = AllocatorPhases(source)
    with phases.phase("load"):
        source.allocate(BLOCK)
    source.allocate(MIB)
    source.free(MIB)
    with phases.phase("step"):
        pass
    peaks = phases.peaks()
    assert peaks is not None
    assert peaks.phases["step"]["peak_allocated_bytes"] == BLOCK
    assert peaks.phases["load"]["peak_allocated_bytes"] == BLOCK
    assert peaks.peak_allocated_bytes == MIB + BLOCK


def test_phases_end_in_the_reverse_order_of_their_beginning() -> None:
    phases = AllocatorPhases(CountingAllocator())
    phases.begin("step")
    phases.begin("forward")
    with pytest.raises(ValueError, match="'step' cannot end: the innermost open phase is 'forw"):
        phases.end("step")
    phases.end("forward")
    phases.end("step")
    with pytest.raises(ValueError, match="open phase is None"):
        phases.end("step")
    with pytest.raises(ValueError, match="give the phase a name"):
        phases.begin("")


def test_without_an_allocator_phases_go_on_and_the_reason_is_kept() -> None:
    phases = AllocatorPhases(None, unavailable="no device")
    with phases.phase("step"):
        assert phases.edge() is None
    assert phases.peaks() is None
    assert phases.unavailable == "no device"
    with pytest.raises(ValueError, match="give a source, or None and the reason"):
        AllocatorPhases(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_machine_without_cuda_is_told_apart_from_a_torch_without_it() -> None:
    with pytest.raises(AllocatorUnavailable) as caught:
        CudaAllocator()
    without = "this torch is built without CUDA"
    expected = without if torch.version.cuda is None else "torch sees no CUDA device"
    assert caught.value.reason == expected
    assert AllocatorPhases.for_device().unavailable == expected


def test_the_lines_sum_to_what_the_driver_shows() -> None:
    split = reconcile(
        allocated_bytes=10,
        reserved_bytes=14,
        process_used_bytes=19,
        device_used_bytes=30,
    )
    assert split.lines() == {
        "allocated": 10,
        "cached and fragmented": 4,
        "context and other": 5,
        "other processes and driver": 11,
    }
    assert split.total_bytes == split.nvml_bytes == 30
    assert (split.shortfall_bytes, split.flags) == (0, ())


def test_a_process_alone_and_a_device_alone_are_split_as_far_as_known() -> None:
    process = reconcile(allocated_bytes=10, reserved_bytes=14, process_used_bytes=19)
    assert (process.scope, process.nvml_bytes, process.other_processes_bytes) == (
        "process",
        19,
        None,
    )
    device = reconcile(allocated_bytes=10, reserved_bytes=14, device_used_bytes=30)
    assert device.lines() == {
        "allocated": 10,
        "cached and fragmented": 4,
        "context, other and other processes": 16,
    }
    assert device.total_bytes == 30


def test_a_baseline_stands_in_for_the_processes_that_are_not_listed() -> None:
    arguments = {"allocated_bytes": 10, "reserved_bytes": 14, "device_used_bytes": 30}
    split = reconcile(**arguments, others_baseline_bytes=9)
    assert (split.context_and_other_bytes, split.other_processes_bytes) == (7, 9)
    assert (split.total_bytes, split.flags) == (30, ())
    freed = reconcile(**arguments, others_baseline_bytes=25)
    assert (freed.context_and_other_bytes, freed.other_processes_bytes) == (0, 16)
    assert freed.total_bytes == 30
    assert freed.flags == ("stale: other processes have freed memory since the baseline",)


def test_a_driver_below_the_allocator_is_flagged_and_never_negative() -> None:
    split = reconcile(
        allocated_bytes=10, reserved_bytes=14, process_used_bytes=12, device_used_bytes=13
    )
    assert split.context_and_other_bytes == 0
    assert split.other_processes_bytes == 0
    assert split.total_bytes == 14
    assert split.shortfall_bytes == 1
    assert split.flags == ("stale: NVML's used bytes are below the allocator's reserved bytes",)


def test_no_combination_of_readings_gives_a_negative_line_or_an_unexplained_sum() -> None:
    sizes = [0, 1, 2, 5]
    optional = [None, *sizes]
    for allocated, reserved, process, device, others in itertools.product(
        sizes, sizes, optional, optional, optional
    ):
        if process is None and device is None:
            continue
        split = reconcile(
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            process_used_bytes=process,
            device_used_bytes=device,
            others_baseline_bytes=others,
        )
        assert all(value >= 0 for value in split.lines().values()), split
        assert split.total_bytes == split.nvml_bytes + split.shortfall_bytes
        assert split.shortfall_bytes >= 0
        assert bool(split.flags) or split.shortfall_bytes == 0, split
        assert split.to_json()["total_bytes"] == split.total_bytes
        shown = [value for value in (process, device) if value is not None]
        if others is None and sorted([allocated, reserved, *shown]) == [
            allocated,
            reserved,
            *shown,
        ]:
            assert split.flags == ()


def test_reconcile_needs_a_number_of_the_driver() -> None:
    with pytest.raises(ValueError, match="needs one of them from NVML"):
        reconcile(allocated_bytes=1, reserved_bytes=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_allocator_has_a_peak_for_each_phase() -> None:
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    phases = AllocatorPhases.for_device()
    start = phases.edge()
    assert start is not None
    with phases.phase("small"):
        torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
    with phases.phase("large"):
        torch.empty(64 * MIB, dtype=torch.uint8, device="cuda")
    peaks = phases.peaks()
    assert peaks is not None
    for name, size in (("small", 4 * MIB), ("large", 64 * MIB)):
        grown = peaks.phases[name]["peak_allocated_bytes"] - start.allocated_bytes
        assert size <= grown < 2 * size
    assert peaks.peak_allocated_bytes == peaks.phases["large"]["peak_allocated_bytes"]
    assert peaks.peak_reserved_bytes >= peaks.peak_allocated_bytes
