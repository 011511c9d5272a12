"""`memrt.load` from checkpoints: the bits of `from_pretrained`, one tensor at a time."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memrt import prepare
from memrt.loading import auto_class, load
from memrt.profiling.accounts import Account
from memrt.profiling.fake import fake_tensors, is_fake
from memrt.profiling.ledger import Ledger
from memrt.strategy import Attachment, Phase, Strategy
from tests.tiny_models import CONFIGS, assert_equal_models, tensors

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def quiet_transformers() -> Any:
    """The oracle's bars and reports are not what is tested."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def save(
    config: Any, folder: Path, *, dtype: Any = torch.float32, shard: str = "1GB", auto: Any = None
) -> Any:
    """A model with random weights, saved by transformers."""
    auto = auto or auto_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = auto.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # ones and zeros would not show a mix-up
            seed = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=seed))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change a checkpoint of one file."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# -------------------------------------------------------------------- equal to from_pretrained


@pytest.mark.parametrize("shard", ["1GB", "8KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as_saved", "cast"])
@pytest.mark.parametrize("family", CONFIGS)
def test_bits_of_from_pretrained(
    family: str, dtype: torch.dtype | None, shard: str, tmp_path: Path
) -> None:
    config = CONFIGS[family]()
    save(config, tmp_path, shard=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "8KB")
    expected = auto_class(config).from_pretrained(tmp_path, dtype=dtype)
    actual: Any = load(tmp_path, dtype=dtype)
    assert_equal_models(actual, expected)
    assert actual.config.to_dict() == expected.config.to_dict()
    assert actual.name_or_path == expected.name_or_path
    if expected.can_generate():
        assert actual.generation_config.to_dict() == expected.generation_config.to_dict()


@pytest.mark.parametrize("family", ["llama_tied", "mixtral", "bert"])
def test_saving_gives_the_same_files(family: str, tmp_path: Path) -> None:
    save(CONFIGS[family](), tmp_path / "first")
    model: Any = load(tmp_path / "first")
    model.save_pretrained(tmp_path / "again")
    first = load_file(tmp_path / "first" / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_weights_that_a_family_keeps_in_fp32(tmp_path: Path) -> None:
    save(CONFIGS["t5"](), tmp_path)
    expected = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype="float16")
    actual = load(tmp_path, dtype="float16")
    assert_equal_models(actual, expected)
    assert {p.dtype for p in actual.parameters()} == {torch.float16, torch.float32}


@pytest.mark.parametrize("declared", [True, False], ids=["config", "weights"])
def test_dtype_is_found(declared: bool, tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    config["dtype"] = "float16" if declared else None
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = torch.float16 if declared else torch.bfloat16
    assert {p.dtype for p in load(tmp_path).parameters()} == {expected}
    assert_equal_models(load(tmp_path), transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def test_old_names_and_leftover_buffers(tmp_path: Path) -> None:
    save(CONFIGS["bert"](), tmp_path)

    def age(weights: dict[str, Tensor]) -> None:
        for key in list(weights):
            if "LayerNorm.weight" in key:
                weights[key.replace("weight", "gamma")] = weights.pop(key)
        weights["bert.embeddings.position_ids"] = torch.arange(512)[None]

    edit(tmp_path, age)
    assert_equal_models(load(tmp_path), transformers.BertForMaskedLM.from_pretrained(tmp_path))


def test_a_head_that_is_missing_is_initialised_and_named(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path, auto=transformers.AutoModel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lacks weights of LlamaForCausalLM.*: lm_head\.weight$"):
        actual = load(tmp_path, seed=9)
    assert_equal_models(actual, expected)
    assert 0.015 < actual.get_parameter("lm_head.weight").std() < 0.025


def test_another_head_is_left_out_and_named(tmp_path: Path) -> None:
    save(CONFIGS["bert"](), tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        expected = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the checkpoint") as caught:
        actual = load(tmp_path, task="sequence-classification", seed=9)
    assert_equal_models(actual, expected)
    text = [str(warning.message) for warning in caught]
    assert len(text) == 2
    assert re.search(r"lacks .*: bert\.pooler\.dense\.bias, .*classifier\.bias, class", text[0])
    assert re.search(r"does not have.*: cls\.predictions\.bias, ", text[1])
    assert all(warning.filename == __file__ for warning in caught)


def test_a_bias_that_is_missing_leaves_its_weight_alone(tmp_path: Path) -> None:
    save(CONFIGS["bert"](), tmp_path)
    name = "bert.encoder.layer.0.attention.self.query.bias"
    edit(tmp_path, lambda w: w.pop(name))
    expected = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=rf"lacks weights .*: {re.escape(name)}$"):
        actual = load(tmp_path)
    assert_equal_models(actual, expected)
    assert not actual.get_parameter(name).any()
    assert actual.get_parameter(name.replace("bias", "weight")).all()


# -------------------------------------------------------------------- tied weights


def test_tied_when_the_file_names_the_head_only(tmp_path: Path) -> None:
    save(CONFIGS["llama_tied"](), tmp_path)
    edit(tmp_path, lambda w: w.update({"lm_head.weight": w.pop("model.embed_tokens.weight")}))
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert_equal_models(load(tmp_path), expected)


def test_tied_when_both_names_hold_the_same(tmp_path: Path) -> None:
    save(CONFIGS["llama_tied"](), tmp_path)
    edit(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert_equal_models(load(tmp_path), expected)


def test_not_tied_when_the_names_hold_different_values(tmp_path: Path) -> None:
    save(CONFIGS["llama_tied"](), tmp_path)
    edit(tmp_path, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"config ties lm_head\.weight to model\.embed_tokens"):
        actual = load(tmp_path)
    assert_equal_models(actual, expected)
    assert actual.all_tied_weights_keys == expected.all_tied_weights_keys == {}


# -------------------------------------------------------------------- through the strategies


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ToBfloat16(Strategy):
    name = "to_bfloat16"
    phase = Phase.PRECISION

    def place_weight(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16)

    def attach(self, run: Any) -> Attachment:
        return Attachment(self, run)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Codes(Strategy):
    """Matrices become bytes of another shape, as a quantised format would."""

    name = "codes"
    phase = Phase.PRECISION

    def place_weight(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.flatten().to(torch.uint8) if tensor.ndim == 2 else tensor


def noting(log: list[tuple[str, str, torch.dtype]], name: str, phase: Phase) -> Strategy:
    cls = type(name, (_Noting,), {"name": name, "phase": phase, "__slots__": ()})
    strategy: Strategy = dataclasses.dataclass(frozen=True, kw_only=True)(cls)(log=log)
    return strategy


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Noting(Strategy):
    log: list[tuple[str, str, torch.dtype]]

    def place_weight(self, name: str, tensor: Tensor) -> Tensor:
        assert not is_parameter(tensor)
        assert tensor.is_contiguous()
        self.log.append((self.name, name, tensor.dtype))
        return tensor


def is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


@pytest.mark.parametrize("saved", [True, False], ids=["checkpoint", "config"])
def test_a_strategy_that_casts(saved: bool, tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    save(config, tmp_path)
    source = tmp_path if saved else config
    plain, cast = load(source, seed=2), load(source, [ToBfloat16()], seed=2)
    for name, tensor in tensors(cast).items():
        expected = tensors(plain)[name]
        if isinstance(tensor, nn.Parameter):
            assert tensor.requires_grad
            expected = expected.to(torch.bfloat16)
        assert tensor.dtype == expected.dtype  # buffers do not pass the strategies
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize("saved", [True, False], ids=["checkpoint", "config"])
def test_each_weight_passes_once_in_phase_order(saved: bool, tmp_path: Path) -> None:
    config = CONFIGS["llama_tied"]()
    save(config, tmp_path)
    log: list[tuple[str, str, torch.dtype]] = []
    late = noting(log, "late", Phase.PLACEMENT)
    early = noting(log, "early", Phase.STRUCTURE)
    model = load(tmp_path if saved else config, [late, ToBfloat16(), early])
    names = [name for name, _ in model.named_parameters()]  # a tied weight has one name here
    assert sorted(log[::2]) == sorted(("early", name, torch.float32) for name in names)
    assert log[1::2] == [("late", name, torch.bfloat16) for _, name, _ in log[::2]]
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


@pytest.mark.parametrize("saved", [True, False], ids=["checkpoint", "config"])
def test_codes_do_not_train(saved: bool, tmp_path: Path) -> None:
    save(CONFIGS["gpt2"](), tmp_path)
    model = load(tmp_path if saved else CONFIGS["gpt2"](), [Codes()])
    weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    assert weight.dtype is torch.uint8
    assert weight.shape == (32 * 128,)
    assert not weight.requires_grad
    assert model.get_parameter("transformer.h.0.mlp.c_fc.bias").requires_grad
    assert model.get_parameter("lm_head.weight") is model.get_parameter("transformer.wte.weight")


def test_a_strategy_that_moves(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Away(Strategy):
        name = "away"
        phase = Phase.PLACEMENT

        def place_weight(self, name: str, tensor: Tensor) -> Tensor:
            return tensor.to("meta") if ".layers." in name else tensor

    save(CONFIGS["llama"](), tmp_path)
    model = load(tmp_path, [Away()])
    away = {name for name, p in model.named_parameters() if p.device.type == "meta"}
    assert away == {name for name, _ in model.named_parameters() if ".layers." in name}


def test_a_parameter_class_of_the_strategy_is_kept() -> None:
    class Special(nn.Parameter):
        pass

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Wraps(Strategy):
        name = "wraps"

        def place_weight(self, name: str, tensor: Tensor) -> Tensor:
            return Special(tensor, requires_grad=False)

    model = load(CONFIGS["llama"](), [Wraps()])
    assert {type(p) for p in model.parameters()} == {Special}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("saved", [True, False], ids=["checkpoint", "config"])
def test_a_strategy_that_returns_nothing_is_named(saved: bool, tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Forgets(Strategy):
        name = "forgets"

        def place_weight(self, name: str, tensor: Tensor) -> Any:
            tensor.mul_(2)

    save(CONFIGS["llama"](), tmp_path)
    with pytest.raises(TypeError, match=r"'forgets': place_weight\('.*'\) returned NoneType"):
        load(tmp_path if saved else CONFIGS["llama"](), [Forgets()])


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    save(CONFIGS["llama_tied"](), tmp_path)
    model: Any = load(tmp_path, [ToBfloat16()])
    ids = torch.arange(24).view(2, 12)
    run = prepare(model, lr=1e-2)
    losses = []
    for _ in range(3):
        with run.micro_batch():
            loss = model(input_ids=ids, labels=ids).loss
            run.backward(loss)
        losses.append(float(loss.detach()))
        run.step()
    assert losses[2] < losses[0]


# -------------------------------------------------------------------- memory


def largest_stored(folder: Path) -> int:
    files = folder.glob("*.safetensors")
    return max(tensor.nbytes for file in files for tensor in load_file(file).values())


@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("strategies", [[], [ToBfloat16()], [Codes()]], ids=["none", "cast", "u8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "bert"])
def test_peak_is_the_result_and_one_tensor(
    family: str, dtype: torch.dtype, strategies: list[Strategy], shard: str, tmp_path: Path
) -> None:
    save(CONFIGS[family](), tmp_path, shard=shard)
    with Ledger() as ledger:
        model = load(tmp_path, strategies, dtype=dtype, ledger=ledger)
    unique = {id(tensor): tensor for tensor in tensors(model).values()}
    result = sum(tensor.nbytes for tensor in unique.values())
    peak = ledger.timeline.peak()
    assert peak.peak_bytes <= result + largest_stored(tmp_path)
    end = ledger.timeline.breakdown(ledger.timeline.now - 1)
    assert end.accounts[Account.WEIGHTS] == result
    assert end.accounts[Account.WORKSPACE] == 0
    assert ledger.timeline.phase_peaks().keys() == {"load"}


@pytest.mark.parametrize("strategies", [[], [Codes()]], ids=["none", "u8"])
def test_peak_of_fused_experts(strategies: list[Strategy], tmp_path: Path) -> None:
    save(CONFIGS["mixtral"](), tmp_path)
    with Ledger() as ledger:
        model = load(tmp_path, strategies, ledger=ledger)
    result = sum(tensor.nbytes for tensor in tensors(model).values())
    fused = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").nbytes
    assert largest_stored(tmp_path) < fused
    assert ledger.timeline.peak().peak_bytes <= result + fused
    assert ledger.timeline.peak().peak_bytes > result


def test_the_ledger_names_the_strategy_that_made_a_weight() -> None:
    with Ledger() as ledger:
        model = load(CONFIGS["llama"](), [Codes()], ledger=ledger)
    end = ledger.timeline.breakdown(ledger.timeline.now - 1)
    codes = sum(p.nbytes for p in model.parameters() if p.dtype is torch.uint8)
    assert end.owners["codes"] == codes
    assert end.owners["model"] == sum(t.nbytes for t in tensors(model).values()) - codes


HOST_MEMORY = """
    import sys
    from pathlib import Path
    from memrt.loading import load
    from transformers import LlamaForCausalLM

    def peak():
        text = Path("/proc/self/status").read_text()
        return int(text.split("VmHWM:")[1].split()[0]) * 1024

    folder, small, *strategies = sys.argv[1:]
    load(small, strategies)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    model = load(folder, strategies, dtype="bfloat16")
    print(peak() - before, sum(p.nbytes for p in model.parameters()))
"""


def host_memory(tmp_path: Path, *strategies: str) -> tuple[int, int]:
    """By how much the peak of a process grows while it loads a model, and the model's bytes.

    What Linux counts, file pages included, which a memory-mapped file would add to.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc to read and reset the peak")
    save(CONFIGS["llama"](), tmp_path / "small")
    script, folders = textwrap.dedent(HOST_MEMORY), (str(tmp_path), str(tmp_path / "small"))
    done = subprocess.run(
        [sys.executable, "-c", script, *folders, *strategies],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    grown, result = (int(part) for part in done.stdout.split())
    return grown, result


def test_host_memory_of_the_process(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=8,
        vocab_size=24576,
    )
    save(config, tmp_path)
    grown, result = host_memory(tmp_path)
    stored = (tmp_path / "model.safetensors").stat().st_size
    allowed = result + largest_stored(tmp_path) + 8 * 2**20  # code pages, allocator
    assert allowed < result + stored  # else the test could not tell
    assert grown <= allowed


def test_host_memory_while_weights_are_packed(tmp_path: Path) -> None:
    """The result and a layer: temporaries leave no holes between the weights that stay."""
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=64,
    )
    save(config, tmp_path)
    grown, result = host_memory(tmp_path, "int8")
    layer = (tmp_path / "model.safetensors").stat().st_size / 8 / 2  # in bf16
    assert grown <= result + layer + 8 * 2**20  # code pages, allocator


# -------------------------------------------------------------------- fake tensors


@pytest.mark.parametrize("saved", [True, False], ids=["checkpoint", "config"])
@pytest.mark.parametrize("strategies", [[], [Codes()]], ids=["none", "u8"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "bert", "t5", "mixtral", "vit"])
def test_fake_load_is_the_real_one_in_bytes(
    family: str, strategies: list[Strategy], saved: bool, tmp_path: Path
) -> None:
    config = CONFIGS[family]()
    save(config, tmp_path, shard="20KB")
    seen = []
    for context in (nullcontext(), fake_tensors()):
        with context, Ledger() as ledger:
            model = load(tmp_path if saved else config, strategies, dtype="bfloat16", ledger=ledger)
        found = {
            name: (t.shape, t.dtype, t.stride(), t.requires_grad)
            for name, t in tensors(model).items()
        }
        peak = ledger.timeline.peak()
        seen.append((found, peak.peak_bytes, peak.accounts, ledger.timeline.account_maxima()))
    assert seen[0] == seen[1]
    assert all(is_fake(tensor) for tensor in tensors(model).values())


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operators += 1
        return func(*args, **(kwargs or {}))


def test_seventy_billion_fake_weights_take_six_operators_each() -> None:
    """Made once, and not initialised again layer by layer."""
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with fake_tensors(), _Counted() as counted:
        model = load(config, dtype="bfloat16")
    assert counted.num_operators < 6 * len(list(model.parameters()))
    assert sum(p.numel() for p in model.parameters()) == 70_553_706_496
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


# -------------------------------------------------------------------- refusals


def break_file(folder: Path, *, keep: float) -> Path:
    file = sorted(folder.glob("*.safetensors"))[-1]
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    return file


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5])
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["single", "sharded"])
def test_a_truncated_file_is_named(shard: str, keep: float, tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path, shard=shard)
    file = break_file(tmp_path, keep=keep)
    message = rf"{re.escape(str(file))}: not a whole safetensors file .*download it again"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(CONFIGS["llama"](), tmp_path)

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Cuts(Strategy):
        name = "cuts"

        def place_weight(self, name: str, tensor: Tensor) -> Tensor:
            break_file(tmp_path, keep=0.3)
            return tensor

    message = r"model\.safetensors: 'model\.\S+' cannot be read"
    with pytest.raises(ValueError, match=message):
        load(tmp_path, [Cuts()])


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    held = sorted(load_file(shard))
    shard.unlink()
    with pytest.raises(ValueError, match=rf"shard '{shard.name}' is missing") as caught:
        load(tmp_path)
    assert any(f"'{key}'" in str(caught.value) for key in held)


def test_a_shard_that_lacks_what_the_index_says(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    weights = load_file(shard)
    lost = sorted(weights)[0]
    del weights[lost]
    save_file(weights, shard)
    with pytest.raises(ValueError, match=rf"{shard.name}: does not hold '{re.escape(lost)}'"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}'])
def test_a_damaged_index(text: str, tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path, shard="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"not a readable JSON|no weight_map|outside the model's"):
        load(tmp_path)


def test_a_weight_of_another_shape(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path)
    edit(tmp_path, lambda w: w.update({"model.norm.weight": torch.ones(31)}))
    message = r"model\.safetensors: 'model\.norm\.weight' has shape \[31\], .* makes it \[32\]"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_experts_that_do_not_fit_together(tmp_path: Path) -> None:
    save(CONFIGS["mixtral"](), tmp_path)
    key = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    edit(tmp_path, lambda w: w.update({key: w[key][:-1].clone()}))
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.\S+': the checkpoint's parts do not"):
        load(tmp_path)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    save(CONFIGS["mixtral"](), tmp_path)
    edit(tmp_path, lambda w: w.pop("model.layers.1.block_sparse_moe.experts.2.w2.weight"))
    with pytest.raises(ValueError, match=r"experts\.down_proj' has shape \[3, 32, 64\]"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "tf_model.h5"])
def test_other_formats_are_refused_with_the_remedy(name: str, tmp_path: Path) -> None:
    CONFIGS["llama"]().save_pretrained(tmp_path)
    load(tmp_path)  # a config alone: random weights
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"holds weights as {name}; .*save_pretrained"):
        load(tmp_path)
    load(tmp_path / "config.json")


def test_a_stray_shard_is_not_taken_for_a_config_alone(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path, shard="20KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"holds model-00001-of-\d+\.safetensors but neither"):
        load(tmp_path)


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    save(CONFIGS["llama"](), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a PEFT adapter"):
        load(tmp_path)


def test_quantised_weights_are_refused() -> None:
    config = CONFIGS["llama"]()
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with pytest.raises(ValueError, match=r"quantised \(bitsandbytes\); use from_pretrained"):
        load(config)


@pytest.mark.parametrize("dtype", ["int8", "bf17", torch.int64, 16])
def test_dtypes_that_a_model_cannot_have(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype=.*must be a floating-point dtype"):
        load(CONFIGS["llama"](), dtype=dtype)


def test_devices_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"device='meta' would load nothing"):
        load(CONFIGS["llama"](), device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"device='cuda': torch sees no CUDA device"):
            load(CONFIGS["llama"](), device="cuda")


def test_code_from_a_checkpoint_runs_only_when_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules = str(tmp_path / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(
        "import transformers\n"
        "class C(transformers.LlamaConfig):\n    model_type = 'mine'\n"
        "class M(transformers.LlamaForCausalLM):\n    config_class = C\n"
    )
    config = CONFIGS["llama"]().to_dict()
    remote = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}
    config.update(model_type="mine", auto_map=remote, architectures=["M"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"its own Python code .*trust_remote_code=True"):
        load(tmp_path)
    model = load(tmp_path, trust_remote_code=True)
    assert type(model).__name__ == "M"


# -------------------------------------------------------------------- what is shown


def test_quiet_unless_asked(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save(CONFIGS["bert"](), tmp_path)
    capfd.readouterr()
    logging = transformers.utils.logging
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(tmp_path, task="sequence-classification")
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()


def test_progress_counts_every_tensor(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[tuple[float, float | None]] = []
    from rich.progress import Progress

    class Counting(Progress):
        def stop(self) -> None:
            counts.extend((task.completed, task.total) for task in self.tasks)
            super().stop()

    monkeypatch.setattr("memrt.loading.Progress", Counting)
    save(CONFIGS["llama_tied"](), tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        model = load(source, progress=True)
        unique = {id(tensor) for tensor in tensors(model).values()}
        assert counts.pop() == (len(unique), len(unique))
    assert capfd.readouterr().out == ""


# -------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    config = CONFIGS["llama"]()
    save(config, tmp_path)
    with torch.device("cuda"), torch.random.fork_rng():
        torch.manual_seed(3)
        drawn = auto_class(config).from_config(CONFIGS["llama"]())
    assert_equal_models(load(config, device="cuda", seed=3), drawn)
    read = load(tmp_path, device="cuda", dtype="bfloat16")
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.device.type for tensor in tensors(read).values()} == {"cuda"}
    assert_equal_models(read.to("cpu"), expected)
