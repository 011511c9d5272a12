"""NVML: what the NVIDIA driver says about one device and about this process on it.

NVML (the library behind nvidia-smi) is the only witness of memory that PyTorch's allocator cannot
see: the CUDA context, cuBLAS and NCCL buffers, other processes. Per device and instant::

    device_used_bytes    what nvidia-smi shows as used (version 2 of the call, which leaves out the
                         driver's own reserve)
    process_used_bytes   this process's share, or None with a reason: inside a container NVML lists
                         the host's process ids, so this process is not found there and callers
                         fall back to device_used - baseline

Every number is optional. A call that a card does not know (power on some boards, utilisation on a
MIG instance, device memory where it is shared with the host) costs its column only, and
``unavailable`` says why. What makes NVML as a whole unusable (no library, driver mismatch, lost
card) raises ``NvmlUnavailable``. No number is believed that exceeds the card: published reports
exist with 357 GB "used by one process" on a 68 GB card.

Costs no device memory: NVML makes no CUDA context.

Source: NVML API reference (docs.nvidia.com/deploy/nvml-api), through the package nvidia-ml-py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

__all__ = [
    "DeviceAddress",
    "DeviceReading",
    "Nvml",
    "NvmlDevice",
    "NvmlUnavailable",
    "address_of_torch_device",
]

Value = TypeVar("Value")

# NVML return codes (nvml.h, nvmlReturn_t), named here because pynvml is imported only when used.
_UNINITIALIZED = 1
_INVALID_ARGUMENT = 2
_NOT_SUPPORTED = 3
_NO_PERMISSION = 4
_NOT_FOUND = 6
_DRIVER_NOT_LOADED = 9
_LIBRARY_NOT_FOUND = 12
_FUNCTION_NOT_FOUND = 13
_GPU_IS_LOST = 15
_RESET_REQUIRED = 16
_LIB_RM_VERSION_MISMATCH = 18
_ARGUMENT_VERSION_MISMATCH = 25

_ENDS_EVERYTHING = {
    _UNINITIALIZED,
    _DRIVER_NOT_LOADED,
    _GPU_IS_LOST,
    _RESET_REQUIRED,
    _LIB_RM_VERSION_MISMATCH,
}
_NEVER_WORKS = {_NOT_SUPPORTED, _NO_PERMISSION, _FUNCTION_NOT_FOUND, _ARGUMENT_VERSION_MISMATCH}
_NOT_IMPLEMENTED = _NEVER_WORKS | {_INVALID_ARGUMENT}

_EXPLANATIONS = {
    _LIBRARY_NOT_FOUND: "no NVIDIA driver library (libnvidia-ml.so.1) on this machine",
    _DRIVER_NOT_LOADED: "the NVIDIA kernel driver is not loaded",
    _LIB_RM_VERSION_MISMATCH: "the driver library and the loaded kernel driver differ in version; "
    "reload the driver or reboot",
}

_NO_VALUE_32 = 0xFFFF_FFFF
_NO_VALUE_64 = 0xFFFF_FFFF_FFFF_FFFF


class NvmlUnavailable(RuntimeError):  # noqa: N818 - says a state, not a fault of the caller
    """NVML cannot be used at all, or not any more; ``reason`` says why in one clause."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"NVML is not available: {reason}")
        self.reason = reason


class _NoValueError(Exception):
    """One column has no value in this reading; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAddress:
    """How to find a device in NVML, whose numbering is not torch's; the first that is known wins.

    ``uuid`` may come without its ``GPU-`` or ``MIG-`` (torch leaves it out). ``mig_uuid`` names the
    instance where the card that was found is cut into MIG instances.
    """

    uuid: str | None = None
    pci_bus_id: str | None = None
    index: int | None = None
    mig_uuid: str | None = None

    def __post_init__(self) -> None:
        if self.uuid is None and self.pci_bus_id is None and self.index is None:
            raise ValueError("DeviceAddress() names no device; give uuid, pci_bus_id or index")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceReading:
    """One reading of one device; ``unavailable`` has a reason for every column that is None."""

    device_used_bytes: int | None
    device_total_bytes: int | None
    driver_reserved_bytes: int | None
    process_used_bytes: int | None
    utilization_percent: int | None = None
    power_watts: float | None = None
    energy_joules: float | None = None
    temperature_celsius: int | None = None
    unavailable: Mapping[str, str] = field(default_factory=dict)


def address_of_torch_device(index: int) -> DeviceAddress:
    """Where torch's CUDA device ``index`` is found in NVML.

    The UUID that CUDA reports is right under any CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER. Asking
    for it initialises CUDA in this process but makes no context on the device, so a baseline taken
    afterwards still leaves the context out.
    """
    import torch

    if not 0 <= index < torch.cuda.device_count():
        raise ValueError(
            f"CUDA device {index} is not one of the {torch.cuda.device_count()} that torch sees; "
            "choose another or change CUDA_VISIBLE_DEVICES"
        )
    properties = torch.cuda.get_device_properties(index)
    bus = getattr(properties, "pci_bus_id", None)
    pci_bus_id = None
    if bus is not None:
        domain = getattr(properties, "pci_domain_id", 0)
        slot = getattr(properties, "pci_device_id", 0)
        pci_bus_id = f"{domain:08x}:{bus:02x}:{slot:02x}.0"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    entry = visible[index].strip() if index < len(visible) else ""
    return DeviceAddress(
        uuid=str(properties.uuid),
        pci_bus_id=pci_bus_id,
        mig_uuid=entry if entry.startswith("MIG-") else None,
    )


class Nvml:
    """An open NVML library. Opening twice is fine: the library counts its users."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise NvmlUnavailable("the package nvidia-ml-py is not installed") from error
        self._library: Any = pynvml
        self._open = False
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NvmlUnavailable(_reason(error)) from error
        self._open = True

    def __enter__(self) -> Nvml:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the library back; a second call does nothing more."""
        if not self._open:
            return
        self._open = False
        try:
            self._library.nvmlShutdown()
        except self._library.NVMLError as error:
            # A card that was lost takes the library with it; there is nothing left to give back.
            if error.value not in _ENDS_EVERYTHING:
                raise NvmlUnavailable(_reason(error)) from error

    def driver_version(self) -> str:
        try:
            return str(self._library.nvmlSystemGetDriverVersion())
        except self._library.NVMLError as error:
            raise NvmlUnavailable(_reason(error)) from error

    def device(self, address: DeviceAddress) -> NvmlDevice:
        """The device at ``address``; ``NvmlUnavailable`` where NVML cannot tell which one it is."""
        library = self._library
        lookups: list[tuple[Callable[[Any], Any], str | int]] = []
        if address.uuid is not None:
            prefixed = address.uuid.startswith(("GPU-", "MIG-"))
            names = [address.uuid] if prefixed else [f"GPU-{address.uuid}", f"MIG-{address.uuid}"]
            lookups += [(library.nvmlDeviceGetHandleByUUID, name) for name in names]
        if address.pci_bus_id is not None:
            lookups.append((library.nvmlDeviceGetHandleByPciBusId, address.pci_bus_id))
        if address.index is not None:
            lookups.append((library.nvmlDeviceGetHandleByIndex, address.index))
        for look_up, key in lookups:
            handle = self._find(look_up, key)
            if handle is not None:
                return NvmlDevice(library, self._instance(handle, address.mig_uuid))
        raise NvmlUnavailable(f"NVML knows no device at {address}")

    def _find(self, look_up: Callable[[Any], Any], key: str | int) -> Any:
        try:
            return look_up(key)
        except self._library.NVMLError as error:
            if error.value in (_NOT_FOUND, _INVALID_ARGUMENT):
                return None
            raise NvmlUnavailable(_reason(error)) from error

    def _instance(self, handle: Any, mig_uuid: str | None) -> Any:
        """``handle``, or the named MIG instance on it: a card's numbers are not an instance's."""
        library = self._library
        try:
            mode, _ = library.nvmlDeviceGetMigMode(handle)
        except library.NVMLError as error:
            # Cards without MIG, and handles that already are an instance, do not know this call.
            if error.value in _NOT_IMPLEMENTED:
                return handle
            raise NvmlUnavailable(_reason(error)) from error
        if not mode:
            return handle
        instance = None
        if mig_uuid is not None:
            instance = self._find(library.nvmlDeviceGetHandleByUUID, mig_uuid)
        if instance is None:
            raise NvmlUnavailable(
                "the card is cut into MIG instances and NVML cannot tell which one this process "
                "uses; set CUDA_VISIBLE_DEVICES to the full MIG-<uuid> that `nvidia-smi -L` prints"
            )
        return instance


class NvmlDevice:
    """One device (or MIG instance) of an open ``Nvml``."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library = library
        self._handle = handle
        self._lost: dict[str, str] = {}
        self._memory_version: int | None = library.nvmlMemory_v2
        self._processes: Callable[[Any], Any] = library.nvmlDeviceGetComputeRunningProcesses_v3
        try:
            self.name = str(library.nvmlDeviceGetName(handle))
            self.uuid = str(library.nvmlDeviceGetUUID(handle))
        except library.NVMLError as error:
            raise NvmlUnavailable(_reason(error)) from error

    def read_device_used_bytes(self) -> int | None:
        """For a fast sampler, one driver call; None where ``read`` gives the reason."""
        memory = self._column("device_used_bytes", self._memory, {})
        return None if memory is None or memory.used > memory.total else int(memory.used)

    def read(self) -> DeviceReading:
        """Every column. Each call goes to the driver; the process list and power take longest."""
        reasons: dict[str, str] = {}
        memory = self._column("device_used_bytes", self._memory, reasons)
        used = total = reserved = None
        if memory is not None:
            total = int(memory.total)
            used = _at_most_the_card("device_used_bytes", int(memory.used), total, reasons)
            if self._memory_version is None:
                reasons["driver_reserved_bytes"] = (
                    "this driver counts its reserve in device_used_bytes"
                )
            else:
                reserved = int(memory.reserved)
        else:
            reasons["device_total_bytes"] = reasons["device_used_bytes"]
            reasons["driver_reserved_bytes"] = reasons["device_used_bytes"]
        process = self._column("process_used_bytes", self._process_used_bytes, reasons)
        if process is not None and total is not None:
            process = _at_most_the_card("process_used_bytes", process, total, reasons)
        return DeviceReading(
            device_used_bytes=used,
            device_total_bytes=total,
            driver_reserved_bytes=reserved,
            process_used_bytes=process,
            utilization_percent=self._column("utilization_percent", self._utilization, reasons),
            power_watts=self._column("power_watts", self._power_watts, reasons),
            energy_joules=self._column("energy_joules", self._energy_joules, reasons),
            temperature_celsius=self._column("temperature_celsius", self._temperature, reasons),
            unavailable=reasons,
        )

    def _column(
        self, name: str, call: Callable[[], Value], reasons: dict[str, str]
    ) -> Value | None:
        if name in self._lost:
            reasons[name] = self._lost[name]
            return None
        try:
            return call()
        except _NoValueError as error:
            reasons[name] = str(error)
        except self._library.NVMLError as error:
            if error.value in _ENDS_EVERYTHING:
                raise NvmlUnavailable(_reason(error)) from error
            reasons[name] = _reason(error)
            if error.value in _NEVER_WORKS:
                self._lost[name] = reasons[name]
        return None

    def _memory(self) -> Any:
        if self._memory_version is not None:
            try:
                return self._library.nvmlDeviceGetMemoryInfo(
                    self._handle, version=self._memory_version
                )
            except self._library.NVMLError as error:
                if error.value not in _NOT_IMPLEMENTED:
                    raise
                self._memory_version = None
        return self._library.nvmlDeviceGetMemoryInfo(self._handle)

    def _process_used_bytes(self) -> int:
        try:
            processes = self._processes(self._handle)
        except self._library.NVMLError as error:
            older = self._library.nvmlDeviceGetComputeRunningProcesses_v2
            if error.value not in _NOT_IMPLEMENTED or self._processes == older:
                raise
            self._processes = older
            processes = older(self._handle)
        own = [entry.usedGpuMemory for entry in processes if entry.pid == os.getpid()]
        if not own:
            raise _NoValueError(
                f"process {os.getpid()} is not among the {len(processes)} that NVML lists on the "
                "device: it has not used the device yet, or runs in a container, whose process ids "
                "are not the host's"
            )
        if any(used is None or used == _NO_VALUE_64 for used in own):
            raise _NoValueError("the driver lists this process without its memory (N/A)")
        return int(sum(own))

    def _utilization(self) -> int:
        return int(self._library.nvmlDeviceGetUtilizationRates(self._handle).gpu)

    def _power_watts(self) -> float:
        milliwatts = int(self._library.nvmlDeviceGetPowerUsage(self._handle))
        if milliwatts == _NO_VALUE_32:
            raise _NoValueError("the driver answers N/A")
        return milliwatts / 1e3

    def _energy_joules(self) -> float:
        return int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def _temperature(self) -> int:
        sensor = self._library.NVML_TEMPERATURE_GPU
        return int(self._library.nvmlDeviceGetTemperature(self._handle, sensor))


def _at_most_the_card(name: str, value: int, total: int, reasons: dict[str, str]) -> int | None:
    if value <= total:
        return value
    reasons[name] = f"discarded: the reading of {value} bytes exceeds the card's {total}"
    return None


def _reason(error: Any) -> str:
    code = int(error.value)
    return f"{_EXPLANATIONS.get(code, str(error).rstrip('.'))} (NVML error {code})"
