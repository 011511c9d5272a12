"""The plan is the run on fake tensors: equal to the ledger of the real run, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memrt import registry
from memrt.gpus import Gpu, Host
from memrt.planning import plan, random_batches, simulate
from memrt.profiling.ledger import Ledger
from memrt.runner import copied, start, train_step
from memrt.structure import RunSettings, discover
from memrt.testing import tiny_batches, tiny_model
from tests.contract import FAMILIES, STACKS, refusal, specs

EVERY_STACK = [
    [],
    *([name] for name in registry.names()),
    *STACKS,
    *([*s, "fused_loss"] for s in STACKS),
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _cases() -> list[Any]:
    """Every strategy alone on Llama in bf16, and in fp32 on one of the others by turns; stacks on
    Llama, in bf16 where they have fused_loss too. The others follow nightly."""
    others = FAMILIES[1:]

    def is_slow(stack: list[str], family: str, dtype: str) -> bool:
        if not stack:
            return False
        if len(stack) == 1 and dtype == "float32":
            return family != others[EVERY_STACK.index(stack) % len(others)]
        usual = "bfloat16" if stack not in STACKS else "float32"
        return (family, dtype) != (FAMILIES[0], usual)

    return [
        pytest.param(
            family,
            stack,
            dtype,
            marks=[pytest.mark.slow] * is_slow(stack, family, dtype),
            id="-".join((family, dtype, "+".join(stack) or "none")),
        )
        for stack in EVERY_STACK
        for family in FAMILIES
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(("family", "stack", "dtype"), _cases())
def test_plan_equals_the_ledger_of_the_run(family: str, stack: list[str], dtype: str) -> None:
    reason = refusal(family, stack) if stack else None
    if reason is not None:
        pytest.skip(f"refused: {reason}")
    strategies = registry.parse_all(specs(stack))
    settings = RunSettings(max_grad_norm=1.0, accumulation_steps=2, weight_decay=0.1)
    window = tiny_batches(family, count=2)

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return tiny_model(family, dtype=DTYPES[dtype])

    planned = simulate(build, strategies, window, settings=settings)

    model = build()
    ledger = Ledger()
    windows = [copied(window) for _ in range(2)]
    with ledger:
        run = start(model, strategies, settings=settings, ledger=ledger)
        while windows:
            train_step(run, windows.pop())
    ledger.close()
    counted = ledger.timeline.peak()
    assert planned.peak.peak_bytes == counted.peak_bytes
    assert planned.peak.accounts == counted.accounts
    assert planned.peak.owners == counted.owners
    assert planned.peak.places == counted.places
    assert planned.phases() == ledger.timeline.phase_peaks()
    assert planned.account_maxima == ledger.timeline.account_maxima()


def _config(layers: int = 9, **overrides: object) -> object:
    from transformers import LlamaConfig

    options = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 99,
        "use_cache": False,
    }
    return LlamaConfig(**{**options, **overrides})


@pytest.mark.parametrize(
    "stack",
    [
        [],
        ["activation_checkpoint", "offload_activations(min_bytes=0)"],
        ["q_galore(rank=4)"],
        ["galore(rank=4)", "int8_states", "activation_checkpoint", "fused_loss(chunk_tokens=8)"],
        *(
            pytest.param([name], marks=pytest.mark.slow)
            for name in (
                "activation_checkpoint",
                "fused_loss(chunk_tokens=8)",
                "int8_states",
                "galore(rank=4)",
                "apollo(rank=4)",
                "fira(rank=4)",
            )
        ),
    ],
    ids=lambda s: "+".join(s) or "none",
)
def test_extrapolated_layers_equal_the_full_run(stack: list[str]) -> None:
    options = {"batch_size": 2, "sequence_length": 16}
    quick = plan(_config(), stack, **options)
    whole = plan(_config(), stack, full=True, **options)
    assert quick.simulated_layers == (4, 5, 6)
    assert whole.simulated_layers == (9,)
    assert quick.simulation.peak.peak_bytes == whole.simulation.peak.peak_bytes
    assert quick.simulation.peak.accounts == whole.simulation.peak.accounts
    assert quick.simulation.peak.places == whole.simulation.peak.places
    assert quick.simulation.peak.owners == whole.simulation.peak.owners
    assert quick.simulation.phases() == whole.simulation.phases()
    assert quick.simulation.place_peaks == whole.simulation.place_peaks
    assert quick.simulation.account_maxima == whole.simulation.account_maxima
    assert quick.simulation.rounded_peak_bytes == whole.simulation.rounded_peak_bytes
    assert quick.simulation.work_json() == whole.simulation.work_json()
    assert quick.simulation.pinned_peak_bytes == whole.simulation.pinned_peak_bytes


def test_micro_batches_that_are_not_alike_run_every_layer() -> None:
    """The longer one, without gradients yet, holds the peak of few layers, the other that of many.

    Depths 4 to 6 agree on the first line here, and the second is above it from 12 layers on.
    """
    ids = torch.arange(256).view(1, -1)
    longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    shorter = {name: value[:, :216] for name, value in longer.items()}
    config, stack = _config(7, vocab_size=1024, tie_word_embeddings=True), ["activation_checkpoint"]
    assert plan(config, stack, window=[longer, shorter]).simulated_layers == (7,)


@pytest.mark.parametrize("spec", ["lisa", "activation_checkpoint(every=2)"])
def test_layers_that_are_not_alike_are_all_run(spec: str) -> None:
    assert plan(_config(), [spec], batch_size=1, sequence_length=16).simulated_layers == (9,)


def test_70b_is_planned_from_a_few_layers_and_adds_up() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    found = plan(
        config, ["activation_checkpoint"], sequence_length=2048, dtype=torch.bfloat16, gpu="80GiB"
    )
    assert found.simulated_layers == (4, 5, 6)
    parameters = 70_553_706_496
    accounts = found.simulation.peak.accounts
    assert accounts["gradients"] == 2 * parameters
    assert accounts["optimizer"] == pytest.approx(4 * parameters, rel=1e-6)
    assert accounts["weights"] == pytest.approx(2 * parameters, rel=1e-6)
    assert sum(accounts.values()) == found.peak_bytes
    assert found.fits is False


def test_a_function_needs_its_window_and_is_planned_with_it() -> None:
    with pytest.raises(ValueError, match="window=None"):
        plan(lambda: tiny_model("plain"))
    found = plan(lambda: tiny_model("plain"), window=tiny_batches("plain", count=1))
    assert found.peak_bytes > 0
    assert found.to_json()["kind"] == "plan"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        *(("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("1.5 gib", 3 * 2**29), ("2097152", 2**21)),
        *(("rtx4090", 24_564 * 2**20), ("NVIDIA H100", 81_559 * 2**20), ("T4", 15 * 2**30)),
    ],
)
def test_gpu_sizes(text: str, num_bytes: int) -> None:
    assert Gpu.parse(text).total_bytes == num_bytes


@pytest.mark.parametrize("text", ["", "big", "24 parsecs", "-3GiB", "0"])
def test_bad_gpu_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="24GiB"):
        Gpu.parse(text)


@pytest.mark.parametrize("text", ["24", " 24 ", "0.5", "1048575"])
def test_a_small_number_without_a_unit_is_not_taken_for_bytes(text: str) -> None:
    expected = f"{text.strip()} would be bytes; did you mean {text.strip()}GiB"
    with pytest.raises(ValueError, match=f"^gpu='{text}': {expected}"):
        Gpu.parse(text)
    with pytest.raises(ValueError, match=f"^host='{text}': {expected}"):
        Host.parse(text)
    assert Gpu.parse("1048576").total_bytes == Gpu.parse("1MiB").total_bytes == 2**20


@pytest.mark.parametrize("option", ["batch_size", "sequence_length", "accumulation_steps"])
def test_bad_shapes_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        plan(_config(), **{option: 0})


def test_random_batches_have_the_asked_shape() -> None:
    from memrt.planning import Shape

    window = random_batches(50, Shape(batch_size=3, sequence_length=7, accumulation_steps=2))
    assert [tuple(b["input_ids"].shape) for b in window] == [(3, 7), (3, 7)]
    assert discover(tiny_model("llama")).layer_names
