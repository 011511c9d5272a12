"""QLoRA, `nf4 + peft`: the gradients of the resident dense reference, and of PEFT + bitsandbytes.

Two peers trained with wrong gradients under loss curves that looked right, so gradients are
compared for every adapter of every layer, and a control says that the comparison can fail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import memrt
from memrt.packed_weights import packed_layers
from memrt.planning import plan
from memrt.runner import model_loss
from memrt.testing import tiny_batches, tiny_model
from tests.trainer_runs import arguments, examples, run

STACKS = {
    "nf4+peft": ["nf4", "peft(rank=4)"],
    "with checkpointing and fused loss": [
        "nf4",
        "peft(rank=4)",
        "activation_checkpoint",
        "fused_loss(chunk_tokens=8)",
    ],
    "int8+peft": ["int8", "peft(rank=4)"],
}


def gradients(model: nn.Module, stack: list[str], family: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and adapter gradients of one micro-batch; B is not zero, so that A has one too."""
    torch.manual_seed(1)
    session = memrt.prepare(model, stack)
    generator = torch.Generator().manual_seed(2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter.dtype))
    batch = tiny_batches(family)[0]
    loss = session.train_micro_batch(lambda: model_loss(model, batch))
    found = {name: p.grad.float() for name, p in trained.items() if p.grad is not None}
    assert found.keys() == trained.keys()
    return float(loss), found


def reference(family: str, stack: list[str], dtype: torch.dtype) -> nn.Module:
    """The model with dense weights of the rounded values, resident."""
    torch.manual_seed(0)
    model = tiny_model(family, dtype=dtype).train()
    memrt.prepare(model, stack[:2]).detach()
    assert not packed_layers(model)
    return model


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Relative distance of every gradient."""
    assert found.keys() == wanted.keys()
    return {n: float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in found}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_every_adapter_gets_the_gradient_of_the_dense_reference(
    family: str, stack: list[str], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = tiny_model(family, dtype=dtype, **_no_dropout(family)).train()
    loss, found = gradients(model, stack, family)
    torch.manual_seed(0)
    dense = tiny_model(family, dtype=dtype, **_no_dropout(family)).train()
    memrt.prepare(dense, stack[:2]).detach()
    expected_loss, wanted = gradients(dense, [stack[1], *stack[2:]], family)
    assert loss == pytest.approx(expected_loss, rel=4 * torch.finfo(dtype).eps)
    # sums in another order, over the depth of the model
    allowed = 64 * torch.finfo(dtype).eps
    wrong = {name: e for name, e in errors(found, wanted).items() if e > allowed}
    assert not wrong
    assert len(found) >= 2 * 4 * 4  # A and B of four or more linears in four layers


def _no_dropout(family: str) -> dict[str, Any]:
    if family == "gpt2":
        return {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    if family == "bert":
        return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {}


def test_the_comparison_sees_one_layer_that_takes_anothers_weight() -> None:
    """The control: what an aliased buffer would do in backward, the forward being right."""
    stack = STACKS["nf4+peft"]
    dense = reference("llama", stack, torch.float32)
    expected_loss, wanted = gradients(dense, [stack[1]], "llama")

    torch.manual_seed(0)
    model = tiny_model("llama").train()
    torch.manual_seed(1)
    layers: dict[str, Any] = {}

    def alias_in_backward() -> None:
        layers.update(packed_layers(model))
        one = layers["model.layers.2.mlp.up_proj.base_layer"]
        other = layers["model.layers.1.mlp.up_proj.base_layer"]
        plain = one.dense
        one.dense = lambda packed: (
            other.dense(other.weight) if torch._C._current_graph_task_id() != -1 else plain(packed)
        )

    loss, found = _gradients_after(model, stack, alias_in_backward)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    wrong = {name for name, error in errors(found, wanted).items() if error > 1e-4}
    below = {n for n in wanted if "layers.0." in n or "layers.1." in n}
    assert below <= wrong
    assert not any("layers.3." in name for name in wrong)


def _gradients_after(model: nn.Module, stack: list[str], change: Any) -> Any:
    session = memrt.prepare(model, stack)
    generator = torch.Generator().manual_seed(2)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    change()
    batch = tiny_batches("llama")[0]
    loss = session.train_micro_batch(lambda: model_loss(model, batch))
    return float(loss), {n: p.grad.float() for n, p in trained.items() if p.grad is not None}


def _peft_over_bitsandbytes(folder: Path) -> tuple[nn.Module, nn.Module]:
    """transformers' own 4-bit model in PEFT's wrapper, and memrt's packed from the same files.

    Widths are multiples of 64, where bitsandbytes' CPU kernel is right.
    """
    import peft

    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=99,
        use_cache=False,
    )
    torch.manual_seed(5)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantised, device_map="cpu", dtype=torch.float32
    )
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    return theirs, memrt.load(folder, ["nf4"], dtype=torch.float32)


def _adapters(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by the names that memrt gives it."""
    return {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_every_gradient_is_that_of_peft_over_bitsandbytes(tmp_path: Path) -> None:
    theirs, ours = _peft_over_bitsandbytes(tmp_path)
    adapters = _adapters(theirs.train())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.values():  # B is not zero, so that A has a gradient
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    session = memrt.prepare(ours.train(), ["nf4", "peft(rank=4, alpha=8)"])
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert trained.keys() == adapters.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(adapters[name])
    batch = tiny_batches("llama")[0]
    loss = session.train_micro_batch(lambda: model_loss(ours, batch))
    expected = model_loss(theirs, batch)
    expected.backward()
    # sums in another order, over the depth of the model
    assert float(loss) == pytest.approx(float(expected), rel=4 * torch.finfo(torch.float32).eps)
    found = {name: p.grad for name, p in trained.items() if p.grad is not None}
    wanted = {name: p.grad for name, p in adapters.items() if p.grad is not None}
    assert len(found) == 2 * 7 * 3
    distances = errors(found, wanted)
    assert max(distances.values()) <= 64 * torch.finfo(torch.float32).eps, distances


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_equals_peft_and_bitsandbytes_in_transformers_trainer(tmp_path: Path) -> None:
    """The whole training, with transformers' Trainer over their model."""
    theirs, ours = _peft_over_bitsandbytes(tmp_path / "base")
    options = {"learning_rate": 1e-2, "max_steps": 6}
    start = {name: parameter.detach().clone() for name, parameter in _adapters(theirs).items()}
    expected = transformers.Trainer(
        model=theirs,
        args=arguments(tmp_path / "theirs", cls=transformers.TrainingArguments, **options),
        train_dataset=examples("llama"),
    )
    expected.train()
    trainer = _started(tmp_path / "ours", ours, start, options)
    trainer.train()
    wanted = [entry["loss"] for entry in expected.state.log_history if "loss" in entry]
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 6
    assert found == pytest.approx(wanted, rel=1e-4)
    assert found[-1] < found[0]


def _started(folder: Path, model: nn.Module, start: dict[str, Tensor], options: Any) -> Any:
    """memrt's trainer with the given adapters."""
    trainer = memrt.Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=examples("llama"),
        strategies=["nf4", "peft(rank=4, alpha=8)"],
    )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])
    return trainer


def test_70b_fits_48_gigabytes_and_the_plan_takes_seconds() -> None:
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    found = plan(
        config,
        ["nf4", "peft(rank=16)", "activation_checkpoint", "fused_loss"],
        sequence_length=2048,
        dtype=torch.bfloat16,
        gpu="48GiB",
    )
    assert found.seconds < 60  # seconds, on two slow cores that others use
    linear = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    accounts = found.simulation.peak.accounts
    assert found.simulated_layers == (4, 5, 6)
    dense = 2 * 2 * 128256 * 8192
    assert accounts["weights"] == pytest.approx(4.127 / 8 * linear + dense, rel=0.03)
    assert found.fits


@pytest.mark.parametrize("beside", [[], ["fused_lora"]], ids=str)
def test_extrapolated_layers_equal_the_full_plan(beside: list[str]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=9,
        num_attention_heads=4,
        vocab_size=99,
        use_cache=False,
    )
    stack = ["nf4", "peft(rank=4)", "activation_checkpoint", "fused_loss(chunk_tokens=8)", *beside]
    options: dict[str, Any] = {"sequence_length": 16, "dtype": torch.bfloat16}
    quick, whole = plan(config, stack, **options), plan(config, stack, full=True, **options)
    assert quick.simulated_layers == (4, 5, 6)
    assert whole.simulated_layers == (9,)
    assert quick.simulation.peak.accounts == whole.simulation.peak.accounts
    assert quick.simulation.peak.owners == whole.simulation.peak.owners
    assert quick.simulation.phases() == whole.simulation.phases()


def test_runs_under_the_command_lines_spelling(tmp_path: Path) -> None:
    stack = ["nf4", 'peft(method="lora", rank=4, targets="all-linear")', "activation_checkpoint"]
    trainer = run(tmp_path, options={"strategies": stack}, max_steps=2)
    assert trainer.state.global_step == 2
