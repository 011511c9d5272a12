"""Imports run one way, heavy packages are imported late, and `import memrt` is cheap."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import memrt
from tests.packaging.source_tree import ROOT, Import, imports, other_files, source_modules

LAYERS: tuple[tuple[str, ...], ...] = (
    ("memrt.profiling",),
    ("memrt.kernels",),
    ("memrt.optimizers",),
    (  # the protocol, and what strategies and sessions are made of
        "memrt.active_set",
        "memrt.adapter_folding",
        "memrt.adapter_methods",
        "memrt.adapter_reach",
        "memrt.adapter_starts",
        "memrt.adapters",
        "memrt.backward_updates",
        "memrt.base_parts",
        "memrt.base_record",
        "memrt.compose",
        "memrt.errors",
        "memrt.gradients",
        "memrt.head",
        "memrt.head_config",
        "memrt.ladder",
        "memrt.observer",
        "memrt.optimizer_slots",
        "memrt.optimizer_state",
        "memrt.packed_strategy",
        "memrt.packed_weights",
        "memrt.places",
        "memrt.projected_weights",
        "memrt.registry",
        "memrt.saved",
        "memrt.saved_settings",
        "memrt.spellings",
        "memrt.state_format_strategy",
        "memrt.strategy",
        "memrt.structure",
        "memrt.surgery",
        "memrt.update_time",
        "memrt.values",
        "memrt.weight_readers",
        "memrt.weight_sums",
    ),
    ("memrt.strategies",),
    ("memrt.session",),
    ("memrt",),  # everything else drives sessions, or is about models, data and files
    ("memrt.trainer", "memrt.export"),
    ("memrt.cli", "memrt.__main__"),
)
"""Lowest first. A module imports from its own layer and from lower ones."""

HEAVY = {"transformers", "peft", "datasets", "trl"}
"""Imported at module level only by the modules that are about Hugging Face's objects."""

HUGGING_FACE_MODULES = (
    "memrt.trainer",
    "memrt.arguments",
    "memrt.callback",
    "memrt.loading",
    "memrt.checkpoint",
    "memrt.checkpoint_loading",
    "memrt.checkpoint_saving",
    "memrt.export",
    "memrt.data",
    "memrt.cli",
)

ALWAYS_DEFERRED = {"bitsandbytes", "pynvml", "triton", "torchao", "galore_torch"}
"""Slow, absent on some machines, or with effects at import: only inside functions."""

MODULES = source_modules()
NAMES = {module.name for module in MODULES}


def _is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _layer(name: str) -> int:
    """The layer of the longest matching prefix."""
    matches = [
        (len(prefix), index)
        for index, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if _is_inside(name, prefix)
    ]
    return max(matches)[1]


def _module_of(target: str) -> str:
    """The module that an import of `target` loads: `memrt.strategy.Slot` is `memrt.strategy`."""
    if target.removeprefix("memrt.") in memrt._PUBLIC:
        return memrt._PUBLIC[target.removeprefix("memrt.")]
    while target and target not in NAMES:
        target = target.rpartition(".")[0]
    return target


def test_imports_run_one_way() -> None:
    """kernels <- optimizers <- strategies <- session <- trainer <- cli."""
    wrong = [
        f"{module.where}:{found.line} imports {found.target}"
        for module in MODULES
        for found in imports(module.tree, name=module.name)
        if _is_inside(found.target, "memrt")
        and _layer(_module_of(found.target)) > _layer(module.name)
    ]
    assert not wrong


def test_the_layers_are_those_of_the_design() -> None:
    chain = ["profiling", "kernels", "optimizers", "strategies", "session", "trainer", "cli"]
    layers = [_layer(f"memrt.{name}") for name in chain]
    assert layers == sorted(set(layers))
    assert _layer("memrt.strategy") < _layer("memrt.strategies.lisa") < _layer("memrt.session")


def test_heavy_packages_are_imported_late() -> None:
    wrong = []
    for module in MODULES:
        hugging_face = any(_is_inside(module.name, allowed) for allowed in HUGGING_FACE_MODULES)
        triton_kernels = _is_inside(module.name, "memrt.kernels._triton")
        for found in imports(module.tree, name=module.name):
            package = found.target.partition(".")[0]
            heavy = package in HEAVY and not hugging_face
            never = package in ALWAYS_DEFERRED and not (package == "triton" and triton_kernels)
            if not found.deferred and (heavy or never):
                wrong.append(f"{module.where}:{found.line} imports {found.target}")
    assert not wrong, "import these inside the function that needs them"


def _is_second_name(found: Import) -> bool:
    """Whether an import reaches a folder of the checkout by a name that an installation lacks."""
    parts = found.target.split(".")
    if parts[0] in ("kernels", "optimizers", "profiling"):
        return True
    return parts[0] == "memrt" and parts[1:2] in (
        ["memrt"],
        ["tests"],
        ["benchmarks"],
        ["examples"],
        ["docs"],
    )


def test_nothing_is_imported_by_a_name_that_only_a_checkout_has() -> None:
    files = [(module.where, module.tree) for module in MODULES]
    files += [(str(path.relative_to(ROOT)), ast.parse(path.read_text())) for path in other_files()]
    wrong = [
        f"{where}:{found.line} imports {found.target}"
        for where, tree in files
        for found in imports(tree)
        if _is_second_name(found)
    ]
    assert not wrong


def test_installed_code_does_not_import_what_serves_tests() -> None:
    wrong = [
        f"{module.where}:{found.line} imports {found.target}"
        for module in MODULES
        for found in imports(module.tree, name=module.name)
        if _is_inside(found.target, "memrt.testing")
    ]
    assert not wrong


OPTIONAL = {"peft", "trl", "matplotlib", "triton"}
"""Imported inside functions that say what to install when they are asked for."""


def test_every_third_party_import_is_a_declared_dependency() -> None:
    declared = {
        _normal(requirement.name)
        for requirement in map(Requirement, _own_requirements())
        if requirement.marker is None
    }
    distributions = packages_distributions()
    wrong = []
    for module in MODULES:
        for found in imports(module.tree, name=module.name):
            package = found.target.partition(".")[0]
            if package in sys.stdlib_module_names or package == "memrt":
                continue
            provided_by = {
                name.lower().replace("_", "-") for name in distributions.get(package, ())
            }
            triton_kernels = _is_inside(module.name, "memrt.kernels._triton")
            deferred = found.deferred or (triton_kernels and package == "triton")
            if provided_by & declared or (deferred and package in OPTIONAL):
                continue
            wrong.append(f"{module.where}:{found.line} imports {found.target}")
    assert not wrong, "add it to [project] dependencies"


def _normal(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


def _own_requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    dependencies: list[str] = project["dependencies"]
    return dependencies


CHEAP_IMPORT = """
import json, sys
import memrt

heavy = ("torch", "transformers", "triton", "bitsandbytes", "datasets", "peft")
before = [name for name in heavy if name in sys.modules]
memrt.prepare, memrt.plan, memrt.Strategy
loaded = [name for name in heavy[1:] if name in sys.modules]
import torch
print(json.dumps([before, loaded, torch.cuda.is_initialized()]))
"""


def test_import_memrt_loads_nothing_heavy(tmp_path: Path) -> None:
    """Neither does the import of what a plain loop needs load transformers or start CUDA."""
    done = subprocess.run(
        [sys.executable, "-c", CHEAP_IMPORT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    before, loaded, cuda = json.loads(done.stdout)
    assert before == []
    assert loaded == []
    assert cuda is False


@pytest.mark.parametrize("name", memrt.__all__)
def test_every_public_name_resolves(name: str) -> None:
    value = getattr(memrt, name)
    if name != "__version__":
        assert value.__name__ == name
        assert value.__module__ == memrt._PUBLIC[name]


def test_public_names_are_listed_once_and_alike() -> None:
    assert {*memrt._PUBLIC, "__version__"} == set(memrt.__all__)
    assert memrt.__all__ == sorted(memrt.__all__)
    assert dir(memrt) == sorted(memrt.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trainer_'"):
        memrt.trainer_  # noqa: B018
