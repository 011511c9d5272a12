"""NVML through a driver stand-in at the library's C boundary, and for real where there is a GPU."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memrt.profiling.nvml import DeviceAddress, Nvml, NvmlUnavailable, address_of_torch_device

RunWithDriver = Any  # the fixture's type lives in conftest.py, which tests do not import

GIB = 2**30
CARD = {
    "0.total": 80 * GIB,
    "0.used": 21 * GIB,
    "0.reserved": GIB,
    "0.utilization": 37,
    "0.milliwatts": 412_500,
    "0.millijoules": 9_876_543,
    "0.celsius": 61,
    "0.processes": 3,
    "0.process.0.pid": 4_000_001,
    "0.process.0.used": 3 * GIB,
    "0.process.1.pid": 0,  # the process that asks
    "0.process.1.used": 17 * GIB,
    "0.process.2.pid": 4_000_002,
    "0.process.2.used": 5,
}

READ = """
from dataclasses import asdict
with Nvml() as nvml:
    device = nvml.device(DeviceAddress(index=0))
    answer(asdict(device.read()))
"""


def test_a_reading_carries_every_number_of_the_driver(run_with_driver: RunWithDriver) -> None:
    reading = run_with_driver(READ, CARD)
    assert reading == {
        "device_used_bytes": 21 * GIB,
        "device_total_bytes": 80 * GIB,
        "driver_reserved_bytes": GIB,
        "process_used_bytes": 17 * GIB,
        "utilization_percent": 37,
        "power_watts": 412.5,
        "energy_joules": 9876.543,
        "temperature_celsius": 61,
        "unavailable": {},
    }


@pytest.mark.parametrize("listed", [0, 2])
def test_a_process_that_is_not_listed_has_no_number_but_a_reason(
    run_with_driver: RunWithDriver, listed: int
) -> None:
    others = {"0.processes": listed, "0.process.1.pid": 4_000_003}
    reading = run_with_driver(READ, {**CARD, **others})
    assert reading["process_used_bytes"] is None
    assert reading["device_used_bytes"] == 21 * GIB
    assert list(reading["unavailable"]) == ["process_used_bytes"]
    assert f"not among the {listed} that NVML lists" in reading["unavailable"]["process_used_bytes"]


def test_the_not_available_sentinel_is_not_a_number_of_bytes(
    run_with_driver: RunWithDriver,
) -> None:
    reading = run_with_driver(READ, {**CARD, "0.process.1.used": 2**64 - 1})
    assert reading["process_used_bytes"] is None
    assert "N/A" in reading["unavailable"]["process_used_bytes"]


@pytest.mark.parametrize(
    ("value", "column"),
    [("0.process.1.used", "process_used_bytes"), ("0.used", "device_used_bytes")],
)
def test_a_reading_above_the_card_is_discarded_and_flagged(
    run_with_driver: RunWithDriver, value: str, column: str
) -> None:
    reading = run_with_driver(READ, {**CARD, value: 80 * GIB + 1})
    assert reading[column] is None
    assert reading["unavailable"] == {
        column: f"discarded: the reading of {80 * GIB + 1} bytes exceeds the card's {80 * GIB}"
    }
    assert run_with_driver(READ, {**CARD, value: 80 * GIB})[column] == 80 * GIB


@pytest.mark.parametrize(
    ("function", "columns"),
    [
        ("nvmlDeviceGetPowerUsage", ["power_watts"]),
        ("nvmlDeviceGetUtilizationRates", ["utilization_percent"]),
        ("nvmlDeviceGetTotalEnergyConsumption", ["energy_joules"]),
        ("nvmlDeviceGetTemperature", ["temperature_celsius"]),
        ("nvmlDeviceGetComputeRunningProcesses_v3", ["process_used_bytes"]),
    ],
)
def test_an_unsupported_call_loses_only_its_column(
    run_with_driver: RunWithDriver, function: str, columns: list[str]
) -> None:
    errors = {f"error.{function}": 3, "error.nvmlDeviceGetComputeRunningProcesses_v2": 3}
    complete = run_with_driver(READ, CARD)
    reading = run_with_driver(READ, {**CARD, **errors})
    assert reading.pop("unavailable") == dict.fromkeys(columns, "Not Supported (NVML error 3)")
    for name, value in reading.items():
        assert value == (None if name in columns else complete[name])


def test_device_memory_shared_with_the_host_keeps_the_process_column(
    run_with_driver: RunWithDriver,
) -> None:
    errors = {"error.nvmlDeviceGetMemoryInfo_v2": 3, "error.nvmlDeviceGetMemoryInfo": 3}
    reading = run_with_driver(READ, {**CARD, **errors})
    assert reading["device_used_bytes"] is None
    assert reading["device_total_bytes"] is None
    assert reading["process_used_bytes"] == 17 * GIB
    assert reading["power_watts"] == 412.5


def test_an_old_driver_answers_through_the_older_calls(run_with_driver: RunWithDriver) -> None:
    reading = run_with_driver(READ, CARD, driver="old")
    # Version 1 of the memory call counts the driver's reserve as used.
    assert reading["device_used_bytes"] == 22 * GIB
    assert reading["driver_reserved_bytes"] is None
    assert reading["process_used_bytes"] == 17 * GIB
    assert list(reading["unavailable"]) == ["driver_reserved_bytes"]


def test_a_passing_error_costs_one_reading_and_an_unsupported_call_is_not_repeated(
    run_with_driver: RunWithDriver,
) -> None:
    body = """
    with Nvml() as nvml:
        device = nvml.device(DeviceAddress(index=0))
        seen = []
        for power, temperature in ((999, 3), (0, 0)):
            set_value("error.nvmlDeviceGetPowerUsage", power)
            set_value("error.nvmlDeviceGetTemperature", temperature)
            reading = device.read()
            seen.append([reading.power_watts, reading.temperature_celsius])
        answer(seen)
    """
    assert run_with_driver(body, CARD) == [[None, None], [412.5, None]]


UNAVAILABLE = """
try:
    with Nvml() as nvml:
        nvml.device(DeviceAddress(index=0)).read()
    answer("no error")
except NvmlUnavailable as error:
    answer([error.reason, str(error)])
"""


def test_no_library_is_said_in_words(run_with_driver: RunWithDriver) -> None:
    reason, text = run_with_driver(UNAVAILABLE, driver="none")
    expected = "no NVIDIA driver library (libnvidia-ml.so.1) on this machine (NVML error 12)"
    assert reason == expected
    assert text == f"NVML is not available: {expected}"


def test_a_missing_package_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlUnavailable, match="nvidia-ml-py is not installed"):
        Nvml()


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("nvmlInitWithFlags", 18, "differ in version"),
        ("nvmlInitWithFlags", 9, "kernel driver is not loaded"),
        ("nvmlInitWithFlags", 777, "NVML error 777"),
        ("nvmlDeviceGetHandleByIndex_v2", 2, "NVML knows no device at"),
        ("nvmlDeviceGetHandleByIndex_v2", 4, "Insufficient Permissions"),
        ("nvmlDeviceGetMemoryInfo_v2", 15, "GPU is lost"),
        ("nvmlDeviceGetPowerUsage", 15, "GPU is lost"),
    ],
)
def test_what_makes_nvml_unusable_is_one_error_with_the_reason(
    run_with_driver: RunWithDriver, function: str, code: int, words: str
) -> None:
    reason, _ = run_with_driver(UNAVAILABLE, {**CARD, f"error.{function}": code})
    assert words in reason


def test_a_device_is_found_by_any_of_its_names(run_with_driver: RunWithDriver) -> None:
    body = """
    uuid = "10000000-1111-2222-3333-444444444444"
    unknown = "70000000-1111-2222-3333-444444444444"
    with Nvml() as nvml:
        answer([
            [device.name, device.uuid] for device in (
                nvml.device(DeviceAddress(uuid=uuid)),
                nvml.device(DeviceAddress(uuid="GPU-" + uuid)),
                nvml.device(DeviceAddress(pci_bus_id="00000000:02:00.0")),
                nvml.device(DeviceAddress(uuid=unknown, pci_bus_id="00000000:02:00.0")),
                nvml.device(DeviceAddress(uuid=unknown, pci_bus_id="00000000:09:00.0", index=1)),
            )
        ])
    """
    expected = ["Stand-in B", "GPU-10000000-1111-2222-3333-444444444444"]
    assert run_with_driver(body) == [expected] * 5


def test_a_card_cut_into_mig_instances_needs_the_instance_named(
    run_with_driver: RunWithDriver,
) -> None:
    body = """
    mig = "MIG-20000000-1111-2222-3333-444444444444"
    card = "10000000-1111-2222-3333-444444444444"
    with Nvml() as nvml:
        names = [
            nvml.device(DeviceAddress(uuid=card, mig_uuid=mig)).name,
            nvml.device(DeviceAddress(uuid=mig)).name,
            nvml.device(DeviceAddress(uuid=mig.removeprefix("MIG-"))).name,
        ]
        reading = nvml.device(DeviceAddress(uuid=mig)).read()
        try:
            nvml.device(DeviceAddress(uuid=card))
        except NvmlUnavailable as error:
            answer([names, reading.device_used_bytes, reading.power_watts, error.reason])
    """
    values = {"1.mig": 1, "2.total": 10 * GIB, "2.used": GIB}
    names, used, power, reason = run_with_driver(body, values)
    assert names == ["Stand-in B MIG 1g"] * 3
    assert (used, power) == (GIB, None)
    assert "set CUDA_VISIBLE_DEVICES to the full MIG-<uuid>" in reason


def test_closing_gives_the_library_back_once(run_with_driver: RunWithDriver) -> None:
    body = """
    first, second = Nvml(), Nvml()
    counts = [users()]
    first.close()
    first.close()
    counts.append(users())
    second.close()
    counts.append(users())
    try:
        second.device(DeviceAddress(index=0))
    except NvmlUnavailable as error:
        answer([counts, error.reason])
    """
    counts, reason = run_with_driver(body)
    assert counts == [2, 1, 0]
    assert reason == "Uninitialized (NVML error 1)"


def test_an_address_that_names_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="give uuid, pci_bus_id or index"):
        DeviceAddress(mig_uuid="MIG-1")


def test_a_cuda_device_that_torch_does_not_see_is_refused() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"CUDA device {count} is not one of the {count}"):
        address_of_torch_device(count)


def test_a_torch_device_is_named_by_uuid_bus_and_mig_instance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    properties = SimpleNamespace(
        uuid="u-1", pci_domain_id=1, pci_bus_id=0xAB, pci_device_id=3, name="card"
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7, MIG-x")
    bus = "00000001:ab:03.0"
    assert address_of_torch_device(0) == DeviceAddress(uuid="u-1", pci_bus_id=bus)
    assert address_of_torch_device(1) == DeviceAddress(uuid="u-1", pci_bus_id=bus, mig_uuid="MIG-x")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_real_driver_sees_an_allocation_of_this_process() -> None:
    with Nvml() as nvml:
        device = nvml.device(address_of_torch_device(torch.cuda.current_device()))
        torch.zeros(1, device="cuda")
        before = device.read()
        block = torch.empty(GIB, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        after = device.read()
        del block
    assert torch.cuda.get_device_name().split()[-1] in device.name
    if before.device_used_bytes is None:
        assert "device_used_bytes" in before.unavailable
    else:
        assert after.device_used_bytes is not None
        # Others on a shared card may free meanwhile; ours alone adds the block.
        assert after.device_used_bytes - before.device_used_bytes >= GIB // 2
    for name in ("process_used_bytes", "power_watts", "energy_joules", "utilization_percent"):
        assert (getattr(after, name) is None) == (name in after.unavailable)
    if before.process_used_bytes is not None and after.process_used_bytes is not None:
        assert after.process_used_bytes - before.process_used_bytes >= GIB
    with pytest.raises(NvmlUnavailable):
        Nvml().device(DeviceAddress(uuid="GPU-00000000-0000-0000-0000-000000000000"))
