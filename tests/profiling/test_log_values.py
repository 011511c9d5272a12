"""What a training log says of memory: the names, and what each value is taken from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memrt.profiling.allocator import AllocatorReading
from memrt.profiling.log_values import LogReader, SinceLastLine, is_log_value
from memrt.profiling.monitor import Monitor
from memrt.profiling.monitor_report import RunningStatistics

RunWithDriver = Any  # the fixture's type lives in conftest.py, which tests do not import

GIB = 2**30
ALLOCATOR = {
    "memory/max_allocated (GiB)",
    "memory/max_active (GiB)",
    "memory/device_reserved (GiB)",
}


class Counters:
    """An allocator whose peaks are 3 and 4 GiB until they are reset."""

    def __init__(self) -> None:
        self.num_reads = 0
        self.peak = 3 * GIB

    def read(self) -> AllocatorReading:
        self.num_reads += 1
        return AllocatorReading(
            allocated_bytes=GIB,
            requested_bytes=GIB,
            active_bytes=GIB,
            reserved_bytes=6 * GIB,
            inactive_split_bytes=0,
            peak_allocated_bytes=self.peak,
            peak_active_bytes=self.peak + GIB,
            peak_reserved_bytes=7 * GIB,
            num_alloc_retries=0,
            num_ooms=0,
        )

    def reset_peaks(self) -> None:
        self.peak = GIB


def test_the_largest_of_the_run_outlives_a_reset_and_takes_one_reading() -> None:
    counters = Counters()
    with Monitor(device="cpu", allocator=counters, interval_seconds=60) as monitor:
        counters.peak = 3 * GIB
        with monitor.phase("step"):
            pass
        before = counters.num_reads
        values = monitor.log_values()
        assert counters.num_reads == before + 1
    assert {name: values[name] for name in ALLOCATOR} == {
        "memory/max_allocated (GiB)": 3.0,
        "memory/max_active (GiB)": 4.0,
        "memory/device_reserved (GiB)": 6.0,
    }
    assert values.keys() == {*ALLOCATOR, "memory/rss (GiB)"}
    assert all(map(is_log_value, values))
    assert monitor.log_values() == {}  # stopped


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_on_the_cpu_there_is_host_memory_alone() -> None:
    with Monitor(device="cpu") as monitor:
        watched = monitor.log_values()
    alone = LogReader(torch.device("cpu")).values()
    for values in (watched, alone):
        assert values.keys() == {"memory/rss (GiB)"}
        assert 0.01 < values["memory/rss (GiB)"] < 1024
    assert alone["memory/rss (GiB)"] == pytest.approx(watched["memory/rss (GiB)"], rel=0.2)
    assert LogReader(torch.device("cuda")).values().keys() == {"memory/rss (GiB)"}


def test_means_are_of_the_samples_since_the_last_line() -> None:
    series = {n: RunningStatistics() for n in ("power_watts", "utilization_percent")}
    line = SinceLastLine()
    for watts in (100.0, 300.0):
        series["power_watts"].add(watts)
    series["utilization_percent"].add(50.0)
    assert line.values(series) == {"power/avg (W)": 200.0, "gpu/util (%)": 50.0}
    series["power_watts"].add(700.0)
    assert line.values(series) == {"power/avg (W)": 700.0}
    assert line.values(series) == {}


def test_the_driver_s_numbers_are_those_that_were_sampled(run_with_driver: RunWithDriver) -> None:
    body = """
    from memrt.profiling.monitor import Monitor
    with Monitor(device=DeviceAddress(index=0), interval_seconds=60) as monitor:
        answer([monitor.log_values(), monitor.log_values()])
    """
    card = {
        "0.total": 80 * GIB,
        "0.used": 7 * GIB,
        "0.utilization": 50,
        "0.milliwatts": 300_000,
        "0.millijoules": 1_000_000,
        "0.celsius": 40,
    }
    first, second = run_with_driver(body, card)
    used = {"memory/nvml_used (GiB)": 7.0}
    sampled = {"power/avg (W)": 300.0, "gpu/util (%)": 50.0}
    rss = first.pop("memory/rss (GiB)")
    assert first == {**used, **sampled}
    assert second.keys() == {*used, "memory/rss (GiB)"}  # no sample since, and none was taken
    assert second["memory/rss (GiB)"] == pytest.approx(rss, rel=0.2)
