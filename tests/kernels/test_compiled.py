"""What the compiler on the CPU is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._inductor.config as inductor

from memrt.kernels import compiled
from memrt.kernels.compiled import AVX512, compiler_options

can_be_told = pytest.mark.skipif(
    not hasattr(inductor.cpp, "march"), reason="this torch has no such option"
)


@pytest.fixture(autouse=True)
def nothing_asked_yet() -> Iterator[None]:
    compiled._compiler_knows.cache_clear()
    yield
    compiled._compiler_knows.cache_clear()


def on(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@can_be_told
def test_a_processor_of_512_bits_gets_vectors_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    on("AVX512", monkeypatch)
    assert compiler_options() == {"cpp.march": AVX512}
    assert "cpp.march" in torch._inductor.list_options()


@pytest.mark.parametrize("capability", ["AVX2", "DEFAULT", "SVE256"])
def test_others_are_compiled_for_as_usual(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on(capability, monkeypatch)
    assert compiler_options() == {}


@can_be_told
def test_what_the_user_names_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    on("AVX512", monkeypatch)
    with inductor.patch({"cpp.march": "native"}):
        assert compiler_options() == {}


@pytest.mark.parametrize("compiler", ["false", "/nowhere/g++"])
def test_a_compiler_that_does_not_know_it_is_not_told(
    compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("AVX512", monkeypatch)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: compiler)
    assert compiler_options() == {}
