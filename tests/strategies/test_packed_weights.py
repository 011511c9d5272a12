"""`nf4` and `int8`: loading, attaching, what stays dense, what is refused, export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import memrt
from memrt.errors import ConflictError
from memrt.export import export_checkpoint, export_run
from memrt.kernels import int8_weights
from memrt.loading import load
from memrt.packed_weights import dense_weight, packed_layers, unpack
from memrt.profiling.ledger import Ledger
from memrt.runner import model_loss
from memrt.session import Session
from memrt.testing import FAMILIES, tiny_batches, tiny_model
from tests.tiny_models import CONFIGS
from tests.trainer_runs import assert_same, model_of, run, saved_state, weights

PEFT = "peft(rank=4)"
FORMATS = ["nf4", "int8"]


def large_config() -> Any:
    """Weights of more elements than are packed at a time."""
    return transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        vocab_size=96,
    )


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def logits(model: nn.Module, family: str = "llama") -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(**tiny_batches(family)[0])["logits"]
    return result


# -------------------------------------------------------------------- loading


@pytest.mark.parametrize("source", ["checkpoint", "config"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_loading_takes_the_result_and_one_layer(
    form: str,
    dtype: torch.dtype,
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = large_config()
    monkeypatch.setattr(int8_weights, "PIECE_ELEMENTS", 2**16)
    if source == "checkpoint":
        load(config, dtype=dtype, seed=0).save_pretrained(tmp_path)  # type: ignore[operator]
    with Ledger() as ledger:
        model = load(
            tmp_path if source == "checkpoint" else config, [form], dtype=dtype, ledger=ledger
        )
    result = sum(tensor.nbytes for tensor in tensors(model).values())
    dense = [m.dense_shape for n, m in packed_layers(model) if n.startswith("model.layers.0.")]
    layer_bytes = dtype.itemsize * sum(rows * columns for rows, columns in dense)
    assert len(packed_layers(model)) == 14
    peak = ledger.timeline.peak()
    assert result < peak.peak_bytes <= result + layer_bytes
    end = ledger.timeline.breakdown(ledger.timeline.now - 1)
    assert end.accounts["weights"] == result
    assert end.accounts["workspace"] == 0
    packed = sum(module.weight.nbytes for _, module in packed_layers(model))
    assert end.owners[form] == packed
    per_weight = packed / (2 * layer_bytes / dtype.itemsize)
    assert per_weight == pytest.approx({"nf4": 0.516, "int8": 1.008}[form], rel=5e-3)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_packed_while_loading_is_packed_after(family: str, form: str) -> None:
    """The same bytes, names and frozen parameters either way, and the same function."""
    config = CONFIGS[family]()
    loaded = load(config, [form], seed=3)
    attached = load(config, seed=3)
    memrt.prepare(attached, [form, PEFT])
    for name, module in packed_layers(loaded):
        other = attached.get_submodule(name)
        other = getattr(other, "base_layer", other)
        assert torch.equal(module.weight, other.weight)
        assert module.dense_shape == other.dense_shape
        assert isinstance(module, nn.Linear)
    assert len(packed_layers(loaded)) == len(packed_layers(attached)) > 0
    assert not any(p.requires_grad for p in loaded.parameters())
    ids = {"input_ids": torch.arange(12)[None]}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**ids).logits, attached.eval()(**ids).logits)


def test_a_loaded_model_trains_and_is_left_packed() -> None:
    model = load(CONFIGS["llama"](), ["nf4"], seed=0)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    classes = [type(module) for module in model.modules()]
    run = memrt.prepare(model, ["nf4", PEFT], lr=1e-2)
    losses = []
    for _ in range(4):
        batch = {key: value % 96 for key, value in tiny_batches("llama")[0].items()}
        batch["labels"] = batch["input_ids"]
        losses.append(float(run.train_micro_batch(lambda b=batch: model_loss(model, b))))  # type: ignore[misc]
        run.step()
    assert losses[-1] < losses[0]
    run.detach()
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_instance_that_peft_wrapped_keeps_its_adapters() -> None:
    """The user froze the weights and chose what trains: nothing else is frozen."""
    import peft

    base = tiny_model("llama")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    run = memrt.prepare(model, ["nf4"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    names = [name for name, _ in packed_layers(model)]
    assert len(names) == 28
    assert all(name.endswith(".base_layer") for name in names)
    run.train_micro_batch(lambda: model_loss(model, tiny_batches("llama")[0]))
    run.step()


# -------------------------------------------------------------------- what is packed


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_layers_of_the_blocks_and_nothing_else(family: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(family)
    expected = {
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and any(part.isdigit() for part in name.split("."))
    }
    memrt.prepare(model, ["nf4", f"peft(targets=['{min(expected)}'])"])
    assert {name.removesuffix(".base_layer") for name, _ in packed_layers(model)} == expected


def test_the_head_is_packed_on_request_and_parts_are_kept() -> None:
    model = load(CONFIGS["llama"](), ["nf4(head=True, keep=['o_proj', 'mlp'])"])
    names = {name for name, _ in packed_layers(model)}
    assert "lm_head" in names
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "lm_head"}


def test_what_a_family_looks_at_the_dtype_of_stays() -> None:
    model = load(CONFIGS["t5"](), ["nf4"])
    names = {name.rpartition(".")[2] for name, _ in packed_layers(model)}
    assert "wo" not in names
    assert {"q", "wi"} <= names
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids, decoder_input_ids=ids).logits).all()


def test_fused_experts_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="memrt"):
        load(CONFIGS["mixtral"](), ["int8"])
    assert (
        "not in linear layers that can be packed (such as model.layers.0.mlp.experts" in caplog.text
    )


# -------------------------------------------------------------------- the values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", FORMATS)
def test_the_layer_multiplies_with_its_dense_weight(form: str, family: str) -> None:
    model = tiny_model(family)
    run = Session(model, memrt.registry.parse_all([form, PEFT]))
    for _, module in packed_layers(model):
        weight = dense_weight(module)
        assert weight.shape == module.dense_shape
        x = torch.randn(3, module.in_features)
        oriented = weight if module.output_axis == 0 else weight.t()
        expected = nn.functional.linear(x, oriented, module.bias)
        assert torch.equal(module(x), expected)
    run.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_a_packed_layer_follows_its_model_to_another_dtype(form: str, dtype: torch.dtype) -> None:
    """As a dense one would; the codes stay as they are, in a copy too."""
    model = load(CONFIGS["llama"](), [form], seed=1)
    before = [(module.weight.clone(), dense_weight(module)) for _, module in packed_layers(model)]
    model.double()  # which no format makes
    copied = copy.deepcopy(model.to(dtype))
    for other in (model, copied):
        for (_, module), (codes, dense) in zip(packed_layers(other), before, strict=True):
            assert torch.equal(module.weight, codes)
            assert dense_weight(module).dtype is dtype
            assert torch.equal(dense_weight(module), dense.to(dtype))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = copied(input_ids=ids).logits
        for _, module in packed_layers(model):
            unpack(module)
        assert torch.equal(model(input_ids=ids).logits, expected)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("form", FORMATS)
def test_export_is_dense_with_the_packed_values(form: str, tmp_path: Path) -> None:
    model: Any = load(CONFIGS["llama"](), [form], seed=1)
    ids = {"input_ids": torch.arange(12)[None]}
    with torch.no_grad():
        expected = model(**ids).logits
    run = memrt.prepare(model, [form, PEFT])
    export_run(run, tmp_path / "plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert torch.equal(loaded(**ids).logits, expected)
    assert all(p.is_floating_point() for p in model.parameters())
    assert not packed_layers(model)


def test_a_head_trained_over_packed_weights_resumes_and_exports(tmp_path: Path) -> None:
    """The user freezes all but the head: a checkpoint is whole then, and holds packed weights."""

    def frozen() -> nn.Module:
        model = model_of("llama").requires_grad_(False)
        model.get_submodule("lm_head").requires_grad_(True)
        return model

    options = {"options": {"strategies": ["nf4"]}, "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path / "run", model=frozen(), **options)
    first, last = (tmp_path / f"run/checkpoint-{step}" for step in (3, 6))
    resumed = run(tmp_path / "again", model=frozen(), resume=str(first), **options)
    assert_same(weights(resumed), weights(whole))
    assert_same(saved_state(resumed), saved_state(whole))
    with pytest.raises(RuntimeError, match="mismatch"):  # not a model with random weights
        transformers.AutoModelForCausalLM.from_pretrained(last)
    expected = logits(whole.model)
    export_checkpoint(last, tmp_path / "from_checkpoint")
    export_run(whole, tmp_path / "from_run")
    for name in ("from_checkpoint", "from_run"):
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits(plain), expected)


def test_a_failure_while_attaching_undoes_the_packing() -> None:
    model = tiny_model("plain")
    last = model.get_submodule("layers.3.3")
    last.weight.data = last.weight.data.double()  # NF4 takes no float64
    with pytest.raises(ValueError, match="float64"):
        memrt.prepare(model, ["nf4", PEFT])
    assert not packed_layers(model)
    assert all(p.is_floating_point() and p.requires_grad for p in model.parameters())
    assert torch.isfinite(logits(model.float(), "plain")).all()


# -------------------------------------------------------------------- refusals


def test_alone_it_says_what_to_add() -> None:
    with pytest.raises(
        ConflictError, match=r"nothing is left to train; add adapters.*peft.*ladder"
    ):
        memrt.prepare(tiny_model("llama"), ["nf4"])


def test_a_model_without_linear_layers_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    with pytest.raises(ConflictError, match="nothing to keep in nf4"):
        memrt.prepare(model, ["nf4"])
    with pytest.raises(ValueError, match="nothing to keep in int8"):
        load(CONFIGS["resnet"](), ["int8"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nf4(keep=['nope'])", r"keep=\['nope'\].* has no module named 'nope'"),
        (
            "nf4(head=True)",
            "head=True: GPT2LMHeadModel has no linear head with a weight of its own",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ConflictError, match=message):
        memrt.prepare(tiny_model("gpt2"), [spec, PEFT])


@pytest.mark.parametrize("other", [PEFT, "ladder(reduction=2)"])
def test_frozen_weights_say_what_is_packed_only_where_nothing_freezes_the_rest(other: str) -> None:
    model = tiny_model("llama")
    model.model.layers[0].requires_grad_(False)
    expected = r"7 of the 28 weights that nf4 packs are frozen .*model\.layers\.1\..*keep=\[...\]"
    with pytest.raises(ConflictError, match=expected):
        memrt.prepare(model, ["nf4", other])
    assert not packed_layers(model)
    model.requires_grad_(False)
    memrt.prepare(model, ["nf4", other])
    assert len(packed_layers(model)) == 28


def test_one_format_at_a_time() -> None:
    model = load(CONFIGS["llama"](), ["int8"])
    with pytest.raises(ConflictError, match="in the format int8 already; load the model with nf4"):
        memrt.prepare(model, ["nf4", PEFT])
    with pytest.raises(ConflictError, match="int8 and nf4 both own the weight format"):
        memrt.prepare(tiny_model("llama"), ["nf4", "int8", PEFT])


@pytest.mark.parametrize("option", ["head=1", "keep='o_proj'", "keep=5", "keep=['q_proj', 3]"])
def test_bad_options_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option.partition("=")[0]):
        memrt.registry.parse(f"nf4({option})")
