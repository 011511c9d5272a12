"""What works on this machine, what does not, why, and what to do: the findings of `memrt doctor`.

Whatever could fail while it is imported runs in a process of its own (`memrt.diagnosis_probes`), so
that a broken library is a line of the report and not a traceback. This module imports the standard
library alone, so that it works where PyTorch is not installed.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from memrt import machine
from memrt.findings import BROKEN, LIMIT, MISSING, NOTE, OK, Finding, Probe
from memrt.profiling.report import format_bytes

__all__ = ["OPTIONAL", "REQUIRED", "SCHEMA", "Diagnosis", "diagnose"]

SCHEMA = "memrt.doctor/1"

REQUIRED = (
    *("torch", "transformers", "accelerate", "datasets", "bitsandbytes", "huggingface-hub"),
    *("jinja2", "numpy", "nvidia-ml-py", "omegaconf", "peft", "psutil", "pyarrow", "pyyaml"),
    *("rich", "safetensors", "tokenizers"),
)
OPTIONAL = {
    "triton": "memrt's own GPU kernels; it comes with PyTorch's CUDA builds",
    "trl": "TRL's trainers through memrt.MemoryMixin",
    "matplotlib": "pictures: memrt report --format png",
    "tensorboard": "logs of the Trainer: report_to='tensorboard'",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All findings; `trains` is whether a real optimizer step worked on any device."""

    findings: tuple[Finding, ...]
    trains: bool
    probes: Mapping[str, Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Plain values under a versioned schema."""
        return {
            "schema": SCHEMA,
            "trains": self.trains,
            "findings": [asdict(finding) for finding in self.findings],
            "probes": {name: dict(found) for name, found in self.probes.items()},
        }


def diagnose() -> Diagnosis:
    """Look at everything; takes some seconds, most of them imports."""
    names = ["torch", "trainer", "train_cpu", "bitsandbytes", "triton", "kernels"]
    with ThreadPoolExecutor(max_workers=2) as pool:
        probes = dict(zip(names, pool.map(Probe.run, names), strict=True))
    if probes["torch"].values.get("cuda_available"):
        probes["train_cuda"] = Probe.run("train_cuda")
        probes["pinned"] = Probe.run("pinned")
    findings = (
        *_packages(),
        *_training(probes),
        *_gpu(probes["torch"]),
        *_kernels(probes),
        *_memory(probes),
        *_disks(),
    )
    trains = any(
        probes[name].values.get("trained") is True for name in probes if name.startswith("train_")
    )
    return Diagnosis(
        findings=findings,
        trains=trains,
        probes={
            name: probe.values if probe.works else {"error": probe.error}
            for name, probe in probes.items()
        },
    )


# ---------------------------------------------------------------- topics


def _packages() -> Iterator[Finding]:
    topic = "packages"
    yield Finding(topic=topic, name="Python", status=OK, found=platform.python_version())
    for name in ("memrt", *REQUIRED):
        found = _version(name)
        if found is None and name == "memrt":
            yield Finding(topic=topic, name=name, status=NOTE, found="a checkout, not installed")
        elif found is None:
            remedy = f"pip install {name}"
            yield Finding(
                topic=topic, name=name, status=MISSING, found="not installed", remedy=remedy
            )
        else:
            yield Finding(topic=topic, name=name, status=OK, found=found)
    for name, purpose in OPTIONAL.items():
        found = _version(name)
        status = NOTE if found is None else OK
        text = f"not installed (for {purpose})" if found is None else found
        yield Finding(topic=topic, name=f"{name} (optional)", status=status, found=text)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _training(probes: Mapping[str, Probe]) -> Iterator[Finding]:
    topic = "training"
    for device in ("cpu", "cuda"):
        probe = probes.get(f"train_{device}")
        if probe is None:
            continue
        trained = probe.values.get("trained")
        yield Finding(
            topic=topic,
            name=f"a step on {device}",
            status=OK if trained else BROKEN,
            found="trained under galore and activation_checkpoint"
            if trained
            else probe.error or "the weights did not change as they should",
            remedy=None if trained else _import_remedy(probe.error),
        )
    trainer = probes["trainer"]
    yield Finding(
        topic=topic,
        name="memrt.Trainer",
        status=OK if trainer.works else BROKEN,
        found="can be imported" if trainer.error is None else trainer.error,
        remedy=_import_remedy(trainer.error),
    )


def _import_remedy(error: str | None) -> str | None:
    if error is None:
        return None
    if error.startswith("ModuleNotFoundError: No module named "):
        return f"pip install {error.split(chr(39))[1].partition('.')[0]}"
    return "reinstall the package that the line names"


def _gpu(torch: Probe) -> Iterator[Finding]:
    topic = "GPU"
    nvml, driver_found = _nvml()
    yield nvml
    if not torch.works:
        error = torch.error or ""
        yield Finding(
            topic=topic, name="PyTorch", status=BROKEN, found=error, remedy=_import_remedy(error)
        )
        return
    values = torch.values
    build = values["cuda_build"]
    if build is None:
        remedy = None
        if driver_found:
            remedy = (
                "install a CUDA build of PyTorch (pytorch.org/get-started/locally names the index)"
            )
        yield Finding(
            topic=topic,
            name="PyTorch",
            status=BROKEN if driver_found else NOTE,
            found=f"{values['version']} is a build without CUDA; training runs on the CPU",
            remedy=remedy,
        )
    elif not values["cuda_available"]:
        yield Finding(
            topic=topic,
            name="PyTorch",
            status=BROKEN if driver_found else NOTE,
            found=f"built for CUDA {build}, and sees no device",
            remedy="update the driver, or look at CUDA_VISIBLE_DEVICES" if driver_found else None,
        )
    else:
        yield Finding(
            topic=topic, name="PyTorch", status=OK, found=f"built for CUDA {build}, sees the GPU"
        )
    for index, device in enumerate(values["devices"]):
        found = (
            f"{device['name']}, {format_bytes(device['total_bytes'])}, compute capability "
            f"{device['capability']}"
        )
        yield Finding(topic=topic, name=f"cuda:{index}", status=OK, found=found)


def _nvml() -> tuple[Finding, bool]:
    """The driver as NVML sees it, and whether there is one."""
    from memrt.profiling.nvml import Nvml, NvmlUnavailable

    try:
        with Nvml() as library:
            found = f"driver {library.driver_version()}"
    except NvmlUnavailable as error:
        return Finding(topic="GPU", name="NVML", status=NOTE, found=error.reason), False
    if machine.is_container():
        found += "; in a container NVML does not list this process, so the device's growth is taken"
    return Finding(topic="GPU", name="NVML", status=OK, found=found), True


def _kernels(probes: Mapping[str, Probe]) -> Iterator[Finding]:
    topic = "kernels"
    on_gpu = bool(probes["torch"].values.get("cuda_available"))
    compiler = machine.compiler()
    yield Finding(
        topic=topic,
        name="C++ compiler",
        status=NOTE if compiler.problem else OK,
        found=compiler.problem or f"{compiler.version} ({compiler.path})",
        remedy=compiler.remedy,
    )
    yield _triton(probes["triton"], on_gpu=on_gpu)
    yield from _bitsandbytes(probes["bitsandbytes"], on_gpu=on_gpu)
    found = probes["kernels"]
    if not found.works:
        yield Finding(
            topic=topic,
            name="operators",
            status=BROKEN,
            found=found.error or "",
            remedy=_import_remedy(found.error),
        )
        return
    triton = probes["triton"].works and on_gpu
    others = 0
    for operator in found.values["operators"]:
        if not (operator["triton"] or operator["compiled"] or operator["bitsandbytes"]):
            others += 1
            continue
        yield Finding(
            topic=topic,
            name=operator["name"],
            status=OK,
            found=_path_of(operator, triton=triton, on_gpu=on_gpu, compiles=not compiler.problem),
        )
    text = "ordinary PyTorch on every device"
    yield Finding(topic=topic, name=f"{others} other operators", status=OK, found=text)


def _path_of(operator: Mapping[str, Any], *, triton: bool, on_gpu: bool, compiles: bool) -> str:
    """The implementation that a call takes on this machine."""
    if operator["triton"] and triton:
        return "Triton on the GPU, the reference on the CPU"
    text = "bitsandbytes" if operator["bitsandbytes"] else "the reference"
    if operator["compiled"]:
        text = "the reference, compiled" if compiles else "the reference, uncompiled and slow"
        text += " on the CPU"
    if operator["triton"]:
        why = "Triton is not there" if on_gpu else "there is no GPU"
        text += f"; it has a Triton kernel, and {why}"
    return text


def _triton(probe: Probe, *, on_gpu: bool) -> Finding:
    if not probe.works:
        return Finding(
            topic="kernels",
            name="Triton",
            status=MISSING if on_gpu else NOTE,
            found=probe.error or "",
            remedy="pip install triton" if on_gpu else None,
        )
    text = f"{probe.values['version']}, " + ("live" if on_gpu else "not used without a GPU")
    return Finding(topic="kernels", name="Triton", status=OK, found=text)


def _bitsandbytes(probe: Probe, *, on_gpu: bool) -> Iterator[Finding]:
    for device in ("cpu", *(["cuda"] if on_gpu else [])):
        works = probe.works and probe.values.get(device, False)
        found = f"{probe.values.get('version')}, an 8-bit step worked" if works else probe.error
        yield Finding(
            topic="kernels",
            name=f"bitsandbytes on {device}",
            status=OK if works else BROKEN,
            found=found or "",
            remedy=None if works else "pip install --force-reinstall bitsandbytes",
        )


def _memory(probes: Mapping[str, Probe]) -> Iterator[Finding]:
    topic = "host memory"
    memory = machine.memory_bytes()
    if {"total", "available"} <= memory.keys():
        found = f"{format_bytes(memory['available'])} of {format_bytes(memory['total'])} available"
        if not memory.get("swap"):
            found += ", no swap: a run that needs more is killed"
        yield Finding(topic=topic, name="RAM", status=OK, found=found)
    limit = machine.cgroup_limit()
    if limit is None:
        yield Finding(topic=topic, name="control group", status=OK, found="no memory limit")
    else:
        used = "" if limit.used_bytes is None else f", {format_bytes(limit.used_bytes)} used"
        yield Finding(
            topic=topic,
            name="control group",
            status=LIMIT,
            found=f"at most {format_bytes(limit.limit_bytes)}{used} ({limit.file})",
            remedy="give the container more memory (docker run --memory) if offloading needs it",
        )
    yield _locks()
    pinned = probes.get("pinned")
    if pinned is not None:
        yield Finding(
            topic=topic,
            name="pinned memory",
            status=OK if pinned.works else BROKEN,
            found="256 MiB could be pinned" if pinned.works else pinned.error or "",
            remedy=None if pinned.works else "free host memory; offloading pins what it moves",
        )


def _locks() -> Finding:
    limit = machine.lock_limit_bytes()
    text = "no limit" if limit is None else f"{format_bytes(limit)} (ulimit -l)"
    text += "; CUDA pins through its driver, which does not count here"
    if machine.is_wsl():
        return Finding(
            topic="host memory",
            name="locked memory",
            status=LIMIT,
            found="WSL: Windows lets about half of the memory be pinned",
            remedy="raise memory= in .wslconfig before offloading much",
        )
    return Finding(topic="host memory", name="locked memory", status=NOTE, found=text)


def _disks() -> Iterator[Finding]:
    temporary = Path(tempfile.gettempdir())
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    for name, folder, remedy in (
        ("offload to disk", temporary, "set TMPDIR to a folder on a larger, fast disk"),
        ("checkpoints here", Path.cwd(), None),
        ("model cache", _existing(cache), None),
    ):
        free = machine.free_disk_bytes(folder)
        if free is None:
            yield Finding(topic="disk", name=name, status=BROKEN, found=f"{folder} cannot be read")
            continue
        is_little = free < 10 * 2**30
        yield Finding(
            topic="disk",
            name=name,
            status=LIMIT if is_little else OK,
            found=f"{format_bytes(free)} free in {folder}",
            remedy=remedy if is_little else None,
        )


def _existing(folder: Path) -> Path:
    return next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
