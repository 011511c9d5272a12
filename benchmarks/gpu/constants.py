"""What a device holds beside tensors: CUDA context, cuBLAS workspaces, rounding; one row a moment.

The rows are in the order of a process's life. `context_and_other_bytes` is what NVML says of the
process (of the device's growth, where it does not list the process) less what torch's allocator
has reserved: context, loaded kernels, and what libraries take from the driver. `workspace_bytes` is
what the allocator says is allocated less the tensors that are alive: PyTorch takes cuBLAS
workspaces from its own allocator, one for each handle and stream, and the thread that runs backward
has a handle of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.common import PartFile, Setting, parse, synchronize
from benchmarks.record import conditions
from memrt.profiling.allocator import AllocatorUnavailable, CudaAllocator
from memrt.profiling.nvml import Nvml, NvmlUnavailable, address_of_torch_device

__all__ = ["Driver", "main"]


class Driver:
    """NVML's numbers, or the reason why there are none."""

    def __init__(self, setting: Setting) -> None:
        self.reason: str | None = None
        self.version: str | None = None
        self._device: Any = None
        self._nvml: Nvml | None = None
        self._baseline = 0
        if not setting.is_cuda:
            self.reason = "NVML knows CUDA devices, and the run is on 'cpu'"
            return
        try:
            self._nvml = Nvml()
            self.version = self._nvml.driver_version()
            self._device = self._nvml.device(address_of_torch_device(setting.device.index or 0))
        except NvmlUnavailable as error:
            self.reason = error.reason
            return
        self._baseline = self._device.read().device_used_bytes or 0

    def read(self) -> dict[str, Any]:
        """The columns of a row; what the process has is listed, or the growth of the device."""
        names = ("device_used_bytes", "process_used_bytes", "driver_reserved_bytes")
        if self._device is None:
            return {**dict.fromkeys(names), "own_bytes": None, "unavailable": self.reason}
        reading = self._device.read()
        own = reading.process_used_bytes
        if own is None and reading.device_used_bytes is not None:
            own = reading.device_used_bytes - self._baseline
        return {
            **{name: getattr(reading, name) for name in names},
            "own_bytes": own,
            "own_is": "listed" if reading.process_used_bytes is not None else "device growth",
            "unavailable": dict(reading.unavailable),
        }


def _allocator(setting: Setting) -> dict[str, Any]:
    names = ("allocated_bytes", "requested_bytes", "reserved_bytes")
    try:
        reading = CudaAllocator(setting.device).read() if setting.is_cuda else None
    except AllocatorUnavailable:
        reading = None
    return {name: None if reading is None else getattr(reading, name) for name in names}


def _moments(device: torch.device) -> list[tuple[str, Callable[[], Tensor | None]]]:
    """What happens, in order; each returns the tensors that it leaves alive (or None)."""

    def matrix(dtype: torch.dtype, size: int = 512) -> Tensor:
        return torch.randn(size, size, device=device, dtype=dtype, requires_grad=True)

    def backward(result: Tensor) -> None:
        result.float().sum().backward()

    def attention() -> None:
        q, k, v = (torch.randn(1, 4, 256, 64, device=device, dtype=torch.bfloat16) for _ in "qkv")
        q.requires_grad_(True)
        backward(functional.scaled_dot_product_attention(q, k, v, is_causal=True))

    def loss() -> None:
        logits = matrix(torch.float32)
        functional.cross_entropy(logits, torch.arange(512, device=device)).backward()

    def optimizer() -> None:
        weight = torch.nn.Parameter(matrix(torch.bfloat16).detach())
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], fused=True).step()

    def product(dtype: torch.dtype) -> Tensor:
        return matrix(dtype) @ matrix(dtype)

    def forget(tensor: Tensor) -> None:
        """Nothing is left alive."""

    def factorisation() -> None:
        torch.linalg.qr(matrix(torch.float32).detach())

    return [
        ("first tensor", lambda: torch.zeros(1, device=device)),
        ("bf16 product, forward", lambda: forget(product(torch.bfloat16))),
        ("bf16 product, backward", lambda: backward(product(torch.bfloat16))),
        ("fp32 product", lambda: forget(product(torch.float32))),
        ("attention", attention),
        ("cross entropy", loss),
        ("fused AdamW", optimizer),
        ("QR", factorisation),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Fill constants.json."""
    setting = parse(argv, __doc__ or "")
    driver = Driver(setting)  # before the first tensor: its baseline is without our context
    part = PartFile(setting, "constants")
    kept: list[Tensor] = []

    def row(action: Callable[[], Tensor | None]) -> dict[str, Any]:
        left = action()
        if left is not None:
            kept.append(left)
        if kept:  # before the first tensor it would make the context
            synchronize(setting.device)
        return _row(setting, driver, kept)

    part.case("before", lambda: row(lambda: None))
    for name, action in _moments(setting.device):
        part.case(name, partial(row, action))
    part.add("rounding", _rounding(setting))
    part.add("host", _pinned_rounding(setting))
    part.add("driver_version", driver.version)
    part.add("nvml_unavailable", driver.reason)
    part.add("capability", _capability(setting))
    part.add(
        "conditions",
        conditions(configuration={"scale": setting.scale}, device=setting.device.type),
    )
    return 0


def _row(setting: Setting, driver: Driver, kept: Sequence[Tensor]) -> dict[str, Any]:
    allocator = _allocator(setting) if kept or not setting.is_cuda else _NO_CONTEXT
    seen = driver.read()
    tensors = sum(-(-t.untyped_storage().nbytes() // 512) * 512 for t in kept)
    allocated, reserved = allocator["allocated_bytes"], allocator["reserved_bytes"]
    own = seen["own_bytes"]
    return {
        **allocator,
        **seen,
        "workspace_bytes": None if allocated is None else allocated - tensors,
        "context_and_other_bytes": None if own is None or reserved is None else own - reserved,
    }


_NO_CONTEXT = {"allocated_bytes": 0, "requested_bytes": 0, "reserved_bytes": 0}
"""The allocator before the first tensor; asking it could make the context."""


def _rounding(setting: Setting) -> dict[str, Any]:
    """Allocated bytes of tensors of a few sizes."""
    if not setting.is_cuda:
        return {"unavailable": "the CPU's allocator does not round"}
    found = {}
    for size in (1, 512, 513, 2**20 + 1, 10 * 2**20 + 1):
        before = torch.cuda.memory_allocated(setting.device)
        tensor = torch.empty(size, dtype=torch.uint8, device=setting.device)
        found[str(size)] = torch.cuda.memory_allocated(setting.device) - before
        del tensor
    return found


def _pinned_rounding(setting: Setting) -> dict[str, Any]:
    """Host bytes of pinned tensors, which torch's pinned allocator may round up."""
    statistics = getattr(torch.cuda, "host_memory_stats", None)
    if not setting.is_cuda or statistics is None:
        return {"unavailable": "this torch or device has no statistics of pinned memory"}
    found: dict[str, Any] = {}
    for size in (3 * 2**20, 5 * 2**20 + 1, 33 * 2**20):
        before = statistics()
        tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        after = statistics()
        found[str(size)] = {
            key: after[key] - before.get(key, 0)
            for key in after
            if "bytes.current" in key and after[key] != before.get(key, 0)
        }
        del tensor
    return found


def _capability(setting: Setting) -> dict[str, Any] | None:
    if not setting.is_cuda:
        return None
    properties = torch.cuda.get_device_properties(setting.device)
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "total_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
