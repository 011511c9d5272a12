"""The light monitor: RSS, NVML through a driver stand-in, and for real where there is a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from memrt.profiling.allocator import AllocatorPhases
from memrt.profiling.monitor import Monitor
from memrt.profiling.monitor_probes import DeviceProbe, HostProbe, PowerIntegral
from memrt.profiling.monitor_report import RunningStatistics
from memrt.profiling.monitor_run import MonitoredRun, pause_seconds
from memrt.profiling.phase_peaks import PhasePeaks

RunWithDriver = Any  # the fixture's type lives in conftest.py, which tests do not import

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20
GIB = 2**30
CARD = {
    "0.total": 80 * GIB,
    "0.used": 7 * GIB,
    "0.utilization": 50,
    "0.milliwatts": 300_000,
    "0.millijoules": 1_000_000,
    "0.celsius": 40,
}

DRIVEN = """
import time
from memrt.profiling.monitor import Monitor
GIB = 2**30
def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the sampler did not get there in a minute"
        time.sleep(0.005)
def samples(monitor, column):
    series = monitor.report().series
    return series[column].num_samples if column in series else 0
def new_samples(monitor, column):
    # More than the two that asking itself takes.
    before = samples(monitor, column)
    asked = [0]
    def enough():
        asked[0] += 1
        return samples(monitor, column) - before - asked[0] >= 2
    wait_for(enough)
monitor = Monitor(
    device=DeviceAddress(index=0), interval_seconds=0.005, sensor_interval_seconds=0.01
)
"""


def test_without_a_device_rss_is_watched_and_the_report_says_so() -> None:
    with Monitor(device="cpu", interval_seconds=0.01) as monitor:
        time.sleep(0.05)
    report = monitor.report()
    reason = "the run is on 'cpu', so host memory (RSS) is what is watched"
    assert report.source == "rss"
    assert report.unavailable == {"nvml": reason, "allocator": reason, "energy_joules": reason}
    assert set(report.series) == {"rss_bytes", "cpu_percent"}
    assert report.energy_joules is None
    assert report.joules_per_token(7) is None
    assert report.process_peak_bytes is None
    assert report.at_end is None
    assert report.failure is None
    assert report.num_samples == report.series["rss_bytes"].num_samples >= 2
    assert report.series["rss_bytes"].max <= report.rss_peak_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_default_device_without_cuda_is_the_host() -> None:
    with Monitor() as monitor:
        pass
    assert "torch sees no CUDA device" in monitor.report().unavailable["nvml"]
    assert monitor.report().interval_seconds == 0.25


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux keeps this mark")
def test_the_mark_is_not_that_of_the_process_that_started_this_one() -> None:
    held = bytearray(2**30)
    held[::4096] = b"1" * (len(held) // 4096)  # every page
    code = "from memrt.profiling.monitor_probes import HostProbe as H; print(H().rss_and_peak()[1])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(done.stdout) < len(held)


def test_a_spike_between_samples_is_found_in_its_phase(run_with_driver: RunWithDriver) -> None:
    # In a process of its own: the kernel's high-water mark counts from the start of the process.
    body = """
    import torch
    from memrt.profiling.monitor import Monitor
    def spike(num_bytes):
        torch.empty(num_bytes, dtype=torch.uint8)[::512] = 1
    size = 96 * 2**20
    spike(2 * size)  # an earlier, larger spike must not be taken for this run's
    with Monitor(device="cpu", interval_seconds=60) as monitor:
        with monitor.phase("quiet"):
            pass
        with monitor.phase("step"), monitor.phase("forward"):
            before = monitor.report().series["rss_bytes"].last
            held = torch.ones(size, dtype=torch.uint8)
        with monitor.phase("spike"):
            spike(8 * size)  # well above the mark, also where cold pages were reclaimed
        del held
    answer([before, size, monitor.report().to_json()])
    """
    before, size, report = run_with_driver(_dedent(body), driver="none")
    peaks = {name: phase["rss_peak_bytes"] for name, phase in report["phases"].items()}
    slack = 8 * MIB  # the interpreter's own traffic
    assert abs(peaks["step"] - before - size) < slack
    assert peaks["step"] == peaks["forward"]
    assert peaks["quiet"] < before + slack
    # The spike is over before anything samples it: only the kernel's mark has seen it.
    assert 8 * size - slack < peaks["spike"] - before < 9 * size + slack
    assert report["rss_peak_bytes"] == peaks["spike"]
    grown = report["peak_delta_bytes"]["rss_bytes"]
    assert grown == peaks["spike"] - report["baseline"]["rss_bytes"]


def test_a_process_that_shrinks_has_grown_by_nothing(run_with_driver: RunWithDriver) -> None:
    # In a process of its own: other tests' libraries change what malloc gives back.
    body = """
    import torch
    from memrt.profiling.monitor import Monitor
    held = torch.ones(64 * 2**20, dtype=torch.uint8)
    monitor = Monitor(device="cpu", interval_seconds=60)
    monitor.start()
    baseline = monitor.report().baseline["rss_bytes"]
    del held
    report = monitor.stop()
    delta = report.peak_delta_bytes["rss_bytes"]
    answer([baseline, report.series["rss_bytes"].last, delta, report.rss_peak_bytes])
    """
    baseline, last, delta, peak = run_with_driver(_dedent(body), driver="none")
    assert last < baseline - 32 * MIB
    assert delta >= 0
    assert peak >= baseline


def test_stopping_twice_and_starting_again() -> None:
    monitor = Monitor(device="cpu", interval_seconds=0.01)
    with pytest.raises(RuntimeError, match="has not been started"):
        monitor.stop()
    with pytest.raises(RuntimeError, match="is not running"):
        monitor.begin_phase("step")
    monitor.start()
    with pytest.raises(RuntimeError, match="stop\\(\\) it before"):
        monitor.start()
    monitor.begin_phase("step")
    first = monitor.stop()
    assert first is monitor.stop() is monitor.report()
    assert first.phases["step"].num_times == 1  # left open: closed by stop
    assert "memrt-monitor" not in {thread.name for thread in threading.enumerate()}
    monitor.start()
    second = monitor.stop()
    assert second is not first
    assert second.phases == {}


def test_an_exception_in_the_run_still_ends_the_thread_and_reports() -> None:
    monitor = Monitor(device="cpu", interval_seconds=0.01)
    with pytest.raises(KeyError), monitor, monitor.phase("step"):
        raise KeyError
    assert monitor.report().phases["step"].num_times == 1
    assert "memrt-monitor" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_the_thread_stops_sampling_and_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitor = Monitor(device="cpu", interval_seconds=0.005)
    monitor.start()
    with monkeypatch.context() as patch:
        patch.setattr(HostProbe, "cpu_percent", lambda self: 1 // 0)
        (thread,) = [one for one in threading.enumerate() if one.name == "memrt-monitor"]
        thread.join(timeout=60)
        assert not thread.is_alive()
    with monitor.phase("step"):  # the run itself goes on
        pass
    report = monitor.stop()
    assert report.failure is not None
    assert "sampling stopped: ZeroDivisionError" in report.failure
    assert report.phases["step"].num_times == 1


@pytest.mark.parametrize("name", ["interval_seconds", "sensor_interval_seconds"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_an_interval_that_is_not_positive_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}=.*not positive"):
        Monitor(**{name: value})


def test_the_sampler_rests_until_it_is_within_its_share_of_a_core() -> None:
    assert pause_seconds(interval=0.02, cpu=0.001, elapsed=10.0) == 0.02
    # 1 ms of work is 0.5 % of 200 ms, of which 50 have passed.
    assert pause_seconds(interval=0.02, cpu=0.001, elapsed=0.05) == pytest.approx(0.15)
    assert pause_seconds(interval=0.02, cpu=1.0, elapsed=1.0) == 2.0
    assert pause_seconds(interval=5.0, cpu=1.0, elapsed=1.0) == 5.0


def test_the_power_integral_of_a_ramp_is_its_area() -> None:
    power = PowerIntegral()
    for seconds, watts in ((1.0, 100.0), (2.0, 300.0), (4.0, 300.0)):
        power.add(watts, seconds=seconds)
    assert power.joules == pytest.approx(200.0 + 600.0)


def test_statistics_of_a_series() -> None:
    statistics = RunningStatistics()
    for value in (5.0, 1.0, 3.0):
        statistics.add(value)
    result = statistics.result()
    assert (result.mean, result.min, result.max, result.last) == (3.0, 1.0, 5.0, 3.0)


def test_a_slow_reading_counts_only_for_phases_open_at_both_its_ends() -> None:
    peaks = PhasePeaks()
    peaks.begin("step")
    peaks.begin("forward")
    open_before = peaks.open_phases()
    peaks.end("forward")
    peaks.begin("backward")
    peaks.fold({"device_used_bytes": 9}, only=open_before)
    assert peaks.phases["step"].maxima == peaks.overall.maxima == {"device_used_bytes": 9}
    assert peaks.phases["forward"].maxima == peaks.phases["backward"].maxima == {}


def test_a_reading_during_which_the_phase_changes_is_neither_phases_peak() -> None:
    begun, reading, changed = threading.Event(), threading.Event(), threading.Event()

    class SlowDriver(DeviceProbe):
        num_reads = 0

        def read(self, *, sensors: bool) -> dict[str, float]:
            # The first reading that sees the phases begun may itself have begun before them.
            self.num_reads += begun.is_set()
            if self.num_reads != 2:
                return {}
            reading.set()
            assert changed.wait(timeout=60)
            return {"device_used_bytes": 9}

    run = MonitoredRun(
        device=SlowDriver(None, unavailable="slow"),
        allocator=AllocatorPhases(None, unavailable="none"),
        interval_seconds=0.001,
        sensor_interval_seconds=1.0,
    )
    run.start()
    run.begin_phase("step")
    run.begin_phase("forward")
    begun.set()
    assert reading.wait(timeout=60)
    run.end_phase("forward")
    run.begin_phase("backward")
    changed.set()
    phases = run.stop().phases
    peaks = {name: phase.device_used_peak_bytes for name, phase in phases.items()}
    assert peaks == {"step": 9, "forward": None, "backward": None}


def test_the_report_is_plain_json_with_whole_bytes() -> None:
    with Monitor(device="cpu", interval_seconds=0.01) as monitor, monitor.phase("step"):
        time.sleep(0.03)
    plain = json.loads(json.dumps(monitor.report().to_json(), allow_nan=False))
    assert all(isinstance(value, int) for value in plain["series"]["rss_bytes"].values())
    assert isinstance(plain["rss_peak_bytes"], int)
    assert isinstance(plain["phases"]["step"]["rss_peak_bytes"], int)
    assert plain["unavailable"]["nvml"]
    assert set(plain) == set(type(monitor.report()).__slots__)
    with pytest.raises(ValueError, match="num_tokens=0 is not positive"):
        monitor.report().joules_per_token(0)


def test_nvml_is_sampled_and_energy_comes_from_the_counter(run_with_driver: RunWithDriver) -> None:
    body = """
    with monitor:
        new_samples(monitor, "device_used_bytes")
        with monitor.phase("step"):
            set_value("0.used", 19 * GIB)
            set_value("0.process.0.used", 11 * GIB)
            new_samples(monitor, "process_used_bytes")
        set_value("0.used", 9 * GIB)
        set_value("0.process.0.used", 5 * GIB)
        set_value("0.millijoules", 1_042_000)
        with monitor.phase("rest"):
            new_samples(monitor, "device_used_bytes")
    report = monitor.report()
    answer([report.to_json(), report.joules_per_token(1000), users()])
    """
    listed = {"0.processes": 1, "0.process.0.pid": 0, "0.process.0.used": 4 * GIB}
    report, joules_per_token, users = run_with_driver(DRIVEN + _dedent(body), {**CARD, **listed})
    assert report["source"] == "nvml"
    assert report["failure"] is None
    assert (report["device_name"], report["driver_version"]) == ("Stand-in A", "580.00.standin")
    assert report["baseline"]["device_used_bytes"] == 7 * GIB
    device = report["series"]["device_used_bytes"]
    assert (device["min"], device["max"], device["last"]) == (7 * GIB, 19 * GIB, 9 * GIB)
    assert device["min"] < device["mean"] < device["max"]
    assert report["series"]["utilization_percent"]["mean"] == 50.0
    assert report["phases"]["step"]["device_used_peak_bytes"] == 19 * GIB
    assert report["phases"]["rest"]["device_used_peak_bytes"] == 9 * GIB
    assert report["phases"]["step"]["process_used_peak_bytes"] == 11 * GIB
    assert (report["process_peak_bytes"], report["process_source"]) == (11 * GIB, "listed")
    assert report["peak_delta_bytes"]["device_used_bytes"] == 12 * GIB
    assert report["peak_delta_bytes"]["process_used_bytes"] == 7 * GIB
    assert (report["energy_joules"], report["energy_source"]) == (42.0, "energy counter")
    assert joules_per_token == 0.042
    assert list(report["unavailable"]) == ["allocator"]
    assert users == 0


def test_a_process_that_is_not_listed_gets_the_device_delta(run_with_driver: RunWithDriver) -> None:
    body = """
    with monitor:
        set_value("0.used", 19 * GIB)
        new_samples(monitor, "device_used_bytes")
        set_value("0.used", 2 * GIB)  # others have freed: below the baseline
    grown = monitor.report().to_json()
    with monitor:
        set_value("0.used", 1 * GIB)
        new_samples(monitor, "device_used_bytes")
    answer([grown, monitor.report().to_json()])
    """
    grown, shrunk = run_with_driver(DRIVEN + _dedent(body), CARD)
    assert (grown["process_peak_bytes"], grown["process_source"]) == (12 * GIB, "device delta")
    assert "not among the 0 that NVML lists" in grown["unavailable"]["process_used_bytes"]
    assert "process_used_bytes" not in grown["series"]
    assert shrunk["baseline"]["device_used_bytes"] == 2 * GIB
    assert shrunk["process_peak_bytes"] == 0
    assert shrunk["peak_delta_bytes"]["device_used_bytes"] == 0


def test_energy_without_a_counter_is_power_over_time(run_with_driver: RunWithDriver) -> None:
    body = """
    with monitor:
        new_samples(monitor, "power_watts")
    answer(monitor.report().to_json())
    """
    no_counter = {**CARD, "error.nvmlDeviceGetTotalEnergyConsumption": 3}
    report = run_with_driver(DRIVEN + _dedent(body), no_counter)
    assert report["energy_source"] == "power samples"
    # Constant power: the area is 300 W times the time between first and last sample.
    assert 0.5 * 300 * report["duration_seconds"] < report["energy_joules"]
    assert report["energy_joules"] <= 300 * report["duration_seconds"]
    neither = {**no_counter, "error.nvmlDeviceGetPowerUsage": 3}
    body = body.replace("power_watts", "device_used_bytes")
    report = run_with_driver(DRIVEN + _dedent(body), neither)
    assert report["energy_joules"] is None
    assert report["unavailable"]["energy_joules"] == (
        "energy counter: Not Supported (NVML error 3); power: Not Supported (NVML error 3)"
    )
    assert report["unavailable"]["power_watts"] == "Not Supported (NVML error 3)"


def test_allocator_and_driver_add_up_at_the_peak_and_at_the_end(
    run_with_driver: RunWithDriver,
) -> None:
    body = """
    from memrt.profiling.allocator import AllocatorReading
    class Source:
        def __init__(self, *states):
            self.states = list(states)  # (allocated, reserved, peak allocated) at each reading
        def read(self):
            more = len(self.states) > 1
            allocated, reserved, peak = self.states.pop(0) if more else self.states[0]
            return AllocatorReading(
                allocated_bytes=allocated, requested_bytes=allocated, active_bytes=allocated,
                reserved_bytes=reserved, inactive_split_bytes=0, peak_allocated_bytes=peak,
                peak_active_bytes=peak, peak_reserved_bytes=reserved, num_alloc_retries=0,
                num_ooms=0,
            )
        def reset_peaks(self):
            pass
    zero, step, end = (0, 0, 0), (3 * GIB, 6 * GIB, 5 * GIB), (2 * GIB, 6 * GIB, 2 * GIB)
    monitor = Monitor(
        device=DeviceAddress(index=0), allocator=Source(zero, zero, zero, step, end),
        interval_seconds=60,
    )
    with monitor:
        with monitor.phase("step"):
            set_value("0.used", 14 * GIB)
    answer(monitor.report().to_json())
    """
    report = run_with_driver(DRIVEN + _dedent(body), CARD)
    assert report["phases"]["step"]["allocated_peak_bytes"] == 5 * GIB
    assert report["phases"]["step"]["device_used_peak_bytes"] is None  # no sample fell into it
    for split, allocated in ((report["at_peak"], 5), (report["at_end"], 2)):
        assert split["nvml_bytes"] == split["total_bytes"] == 14 * GIB
        assert split["allocated_bytes"] == allocated * GIB
        assert split["cached_bytes"] == (6 - allocated) * GIB
        assert split["context_and_other_bytes"] == 1 * GIB
        assert split["other_processes_bytes"] == 7 * GIB  # the baseline
        assert split["flags"] == []


def test_the_default_device_is_torchs_under_its_uuid(run_with_driver: RunWithDriver) -> None:
    body = """
    import types
    import torch
    counters = {
        name: {"all": {"current": GIB, "peak": 2 * GIB}}
        for name in ("allocated_bytes", "requested_bytes", "active_bytes", "reserved_bytes")
    }
    counters |= {"inactive_split_bytes": {"all": {"current": 0, "peak": 0}}}
    counters |= {"num_alloc_retries": 0, "num_ooms": 0}
    second = types.SimpleNamespace(uuid="10000000-1111-2222-3333-444444444444")
    torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda index: second
    torch.cuda.memory_stats_as_nested_dict = lambda device: counters
    resets = []
    torch.cuda.reset_peak_memory_stats = resets.append
    with Monitor() as monitor, monitor.phase("step"):
        pass
    answer([monitor.report().to_json(), len(resets), set(resets) == {0}])
    """
    second = {name.replace("0.", "1."): value for name, value in CARD.items()}
    report, num_resets, on_device = run_with_driver(DRIVEN + _dedent(body), second)
    assert report["device_name"] == "Stand-in B"
    assert report["interval_seconds"] == 0.02
    assert report["phases"]["step"]["allocated_peak_bytes"] == 2 * GIB
    assert report["at_end"]["allocated_bytes"] == GIB
    assert report["at_end"]["total_bytes"] == report["at_end"]["nvml_bytes"] == 7 * GIB
    # 1 GiB of the 7 at the baseline was the allocator's own, so 6 were others'.
    assert report["at_end"]["other_processes_bytes"] == 6 * GIB
    assert report["process_peak_bytes"] == GIB
    assert "its CUDA context counts as other processes" in report["flags"][0]
    assert num_resets >= 3
    assert on_device


def test_a_card_lost_during_the_run_leaves_rss_and_the_reason(
    run_with_driver: RunWithDriver,
) -> None:
    body = """
    with monitor:
        new_samples(monitor, "device_used_bytes")
        set_value("error.nvmlDeviceGetMemoryInfo_v2", 15)
        wait_for(lambda: "nvml" in monitor.report().unavailable)
        before = monitor.report().num_samples
        wait_for(lambda: monitor.report().num_samples > before + 3)
    answer(monitor.report().to_json())
    """
    report = run_with_driver(DRIVEN + _dedent(body), CARD)
    assert report["source"] == "nvml"
    assert report["failure"] is None
    assert "lost during the run: GPU is lost" in report["unavailable"]["nvml"]
    assert report["flags"] == ["NVML was lost during the run: its series end there"]
    assert report["series"]["rss_bytes"]["num_samples"] == report["num_samples"]
    assert report["series"]["device_used_bytes"]["num_samples"] < report["num_samples"]
    assert report["energy_source"] == "power samples"


def test_without_a_driver_library_the_address_is_answered_by_rss(
    run_with_driver: RunWithDriver,
) -> None:
    body = """
    from memrt.profiling.monitor import Monitor
    with Monitor(device=DeviceAddress(index=0)) as monitor:
        pass
    answer(monitor.report().to_json())
    """
    report = run_with_driver(body, driver="none")
    assert report["source"] == "rss"
    assert report["interval_seconds"] == 0.25
    assert "no NVIDIA driver library" in report["unavailable"]["nvml"]


def _dedent(body: str) -> str:
    """Removes the indentation, so that the body can follow ``DRIVEN``, which has none."""
    lines = body.splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_card_is_watched_and_its_lines_add_up() -> None:
    with Monitor() as monitor, monitor.phase("step"):
        block = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        time.sleep(0.3)
    report = monitor.report()
    del block
    assert report.source == "nvml"
    assert report.failure is None
    assert report.process_peak_bytes is not None
    assert report.process_peak_bytes >= GIB
    assert report.phases["step"].allocated_peak_bytes is not None
    assert report.phases["step"].allocated_peak_bytes >= GIB
    for split in (report.at_peak, report.at_end):
        assert split is not None
        assert split.total_bytes == split.nvml_bytes + split.shortfall_bytes
        assert all(value >= 0 for value in split.lines().values())
        assert split.allocated_bytes >= GIB
    if report.energy_joules is None:
        assert report.unavailable["energy_joules"]
    else:
        assert report.energy_joules >= 0
