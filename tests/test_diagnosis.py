"""`memrt doctor`: limits read from files, probes that may break, and never a traceback."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from memrt import diagnosis, machine
from memrt.cli.main import main
from memrt.findings import Finding, Probe
from tests.packaging.source_tree import ROOT

GIB = 2**30


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


# ---------------------------------------------------------------- the machine


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/user/run\n")
    write(tmp_path, "sys/fs/cgroup/user/run/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/user/memory.max", f"{8 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/user/memory.current", f"{GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{16 * GIB}\n")
    found = machine.cgroup_limit(tmp_path)
    assert found is not None
    assert (found.limit_bytes, found.used_bytes) == (8 * GIB, GIB)
    assert found.file == "/sys/fs/cgroup/user/memory.max"


def test_control_groups_of_the_first_version(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "5:cpu:/\n4:memory:/docker/abc\n0::/\n")
    file = "sys/fs/cgroup/memory/memory.limit_in_bytes"
    write(tmp_path, file, "9223372036854771712\n")
    assert machine.cgroup_limit(tmp_path) is None
    write(tmp_path, file, f"{4 * GIB}\n")
    found = machine.cgroup_limit(tmp_path)
    assert found is not None
    assert (found.limit_bytes, found.used_bytes) == (4 * GIB, None)


def test_memory_and_where_it_runs(tmp_path: Path) -> None:
    assert machine.memory_bytes(tmp_path) == {}
    write(tmp_path, "proc/meminfo", "MemTotal: 1024 kB\nMemAvailable: 512 kB\nSwapTotal: 0 kB\n")
    assert machine.memory_bytes(tmp_path) == {"total": 2**20, "available": 2**19, "swap": 0}
    write(tmp_path, "proc/version", "Linux version 5.15 (Microsoft WSL2)")
    assert machine.is_wsl(tmp_path)
    assert not machine.is_container(tmp_path)


def test_a_compiler_that_is_missing_or_useless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.compiler().problem == "no C++ compiler on the PATH"
    write(tmp_path, "g++", "#!/bin/sh\necho no omp.h >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    found = machine.compiler()
    assert found.path == str(tmp_path / "g++")
    assert found.problem is not None
    assert "no omp.h" in found.problem or "Python's headers" in found.problem


# ---------------------------------------------------------------- probes


def test_a_training_step_is_really_taken() -> None:
    assert Probe.run("train_cpu") == Probe(values={"trained": True})


def test_everything_broken_is_told_line_by_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a torch that cannot be loaded, as after a failed upgrade."""
    write(tmp_path, "torch.py", "raise OSError('libtorch.so: undefined symbol: x')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["doctor", "--json"]) == 1
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert report["schema"] == "memrt.doctor/1"
    assert report["trains"] is False
    broken = {each["name"]: each for each in report["findings"] if each["status"] == "broken"}
    for name in ("a step on cpu", "PyTorch", "memrt.Trainer"):
        assert broken[name]["found"] == "OSError: libtorch.so: undefined symbol: x"
        assert broken[name]["remedy"]
    assert "Traceback" not in shown.out + shown.err


def test_a_probe_that_dies_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path, "torch.py", "import os\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert Probe.run("torch").error == "killed by signal 11"
    write(tmp_path, "torch.py", "import nothing_of_this_name\n")
    probe = Probe.run("torch")
    assert not probe.works
    assert diagnosis._import_remedy(probe.error) == "pip install nothing_of_this_name"


def findings(**probes: dict[str, Any] | str) -> dict[str, Finding]:
    """What is told of a machine on which the probes found these values (or this error)."""
    values: dict[str, dict[str, Any] | str] = {
        "torch": {
            "version": "2.13",
            "cuda_build": "13.0",
            "cuda_available": True,
            "devices": [{"name": "H200", "capability": "9.0", "total_bytes": 139 * GIB}],
        },
        "triton": {"version": "3.9"},
        "bitsandbytes": {"version": "0.50", "cpu": True, "cuda": True},
        "kernels": {
            "operators": [
                {"name": "fused", "triton": True, "compiled": True, "bitsandbytes": False},
                {"name": "plain", "triton": False, "compiled": False, "bitsandbytes": False},
            ]
        },
        **probes,
    }
    made = {
        name: Probe(values={}, error=value) if isinstance(value, str) else Probe(values=value)
        for name, value in values.items()
    }
    told = (*diagnosis._gpu(made["torch"]), *diagnosis._kernels(made), *diagnosis._memory(made))
    return {finding.name: finding for finding in told}


def test_a_gpu_with_everything() -> None:
    told = findings(pinned={"pinned_bytes": 1})
    assert told["cuda:0"].found == "H200, 139.00 GiB, compute capability 9.0"
    assert told["fused"].found == "Triton on the GPU, the reference on the CPU"
    assert told["Triton"].found == "3.9, live"
    assert told["pinned memory"].status == "ok"
    assert told["1 other operators"].status == "ok"


def test_a_gpu_with_pieces_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        machine, "compiler", lambda: machine.Compiler(path=None, version=None, problem="none")
    )
    told = findings(triton="ModuleNotFoundError: No module named 'triton'", pinned="out of memory")
    assert told["Triton"].remedy == "pip install triton"
    assert told["fused"].found == (
        "the reference, uncompiled and slow on the CPU; it has a Triton kernel, and Triton is not "
        "there"
    )
    assert told["pinned memory"].status == "broken"
    assert told["C++ compiler"].status == "note"


def test_a_driver_under_a_cpu_build_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Finding(topic="GPU", name="NVML", status="ok", found="driver 580")
    monkeypatch.setattr(diagnosis, "_nvml", lambda: (nvml, True))
    build = {"version": "2.13+cpu", "cuda_build": None, "cuda_available": False, "devices": []}
    told = findings(torch=build)
    assert told["PyTorch"].status == "broken"
    assert "CUDA build" in str(told["PyTorch"].remedy)
    hidden = {**build, "cuda_build": "13.0"}
    assert "CUDA_VISIBLE_DEVICES" in str(findings(torch=hidden)["PyTorch"].remedy)


def test_the_packages_are_those_that_memrt_declares() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {Requirement(each).name for each in project["dependencies"]}
    assert set(diagnosis.REQUIRED) == declared


@pytest.mark.slow
def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "Training works here." in shown
    for title in ("Packages", "Training", "GPU", "Kernels", "Host memory", "Disk"):
        assert f"\n## {title}\n" in shown
