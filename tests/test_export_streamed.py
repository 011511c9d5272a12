"""Export one module at a time: what is written is what the run computed, in memory for one module.

What comes out is loaded by plain transformers, in a process that cannot import memrt.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import memrt.weight_writer
from memrt import Trainer
from memrt.export import Exported, export_checkpoint
from memrt.export_source import Source
from memrt.loading import load
from memrt.logits_check import _batch, compare_logits, logits_of
from memrt.testing import tiny_config
from tests.trainer_runs import arguments, examples, model_of

# PEFT asks a model of transformers for a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PLAIN = """
import importlib.abc, json, sys, torch, transformers
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "memrt":
            raise ImportError("memrt is not here")
sys.meta_path.insert(0, Blocker())
results = {}
for name, folder in json.loads(sys.argv[1]).items():
    kind = json.load(open(f"{folder}/config.json"))["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), (name, info)
    batch = torch.load(f"{folder}.batch", weights_only=True)
    with torch.no_grad():
        results[name] = model.eval()(**batch).logits.float()
assert "memrt" not in sys.modules
torch.save(results, sys.argv[2])
"""


def classifier() -> nn.Module:
    torch.manual_seed(7)
    return transformers.BertForSequenceClassification(tiny_config("bert", layers=3))


def sentences(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(3, 99, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in rows]


@dataclass(frozen=True)
class Case:
    """A run, and whether its export must compute the very same bits."""

    build: Callable[[], nn.Module]
    strategies: list[str]
    data: Callable[[], list[dict[str, Tensor]]]
    exact: bool = False
    adapters: bool = True


def of_family(family: str) -> dict[str, Any]:
    return {"build": lambda: model_of(family), "data": lambda: examples(family)}


HEAD = "peft(method='lora', rank=4, options={'modules_to_save': ['classifier']})"
CASES = {
    "llama": Case(**of_family("llama"), strategies=["peft(rank=4)"]),
    "llama-nf4": Case(**of_family("llama"), strategies=["nf4", "peft(rank=4)"]),
    "gpt2": Case(**of_family("gpt2"), strategies=["peft(rank=4)"]),
    "gpt2-int8": Case(**of_family("gpt2"), strategies=["int8", "fused_lora", "peft(rank=4)"]),
    "classifier": Case(build=classifier, data=sentences, strategies=[HEAD]),
    "classifier-full": Case(
        build=classifier, data=sentences, strategies=["lisa"], exact=True, adapters=False
    ),
    "gpt2-full": Case(
        **of_family("gpt2"), strategies=["galore(rank=4)"], exact=True, adapters=False
    ),
}


@dataclass
class Done:
    base: Path
    checkpoint: Path
    out: Path
    exported: Exported
    expected: Tensor


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """Every case trained, exported with `verify`."""
    return {name: _done(case, tmp_path_factory.mktemp(name)) for name, case in CASES.items()}


def _done(case: Case, folder: Path) -> Done:
    base = folder / "base"
    case.build().save_pretrained(base)
    kind = type(case.build())
    trainer = Trainer(
        model=kind.from_pretrained(base),
        args=arguments(
            folder / "run", save_strategy="steps", save_steps=3, max_steps=3, learning_rate=3e-2
        ),
        train_dataset=case.data(),
        strategies=case.strategies,
    )
    trainer.train()
    checkpoint, out = folder / "run/checkpoint-3", folder / "plain"
    named = base if case.adapters else None
    exported = export_checkpoint(checkpoint, out, base=named, verify=True, max_shard_size=20_000)
    torch.save(_batch(trainer.model), f"{out}.batch")
    return Done(base, checkpoint, out, exported, logits_of(trainer.model))


def test_plain_transformers_without_memrt_computes_what_the_run_did(
    done: dict[str, Done], tmp_path: Path
) -> None:
    folders = json.dumps({name: str(each.out) for name, each in done.items()})
    words = [sys.executable, "-I", "-W", "error", "-c", PLAIN, folders, str(tmp_path / "logits.pt")]
    subprocess.run(words, check=True, cwd=tmp_path, timeout=120)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    for name, each in done.items():
        check = each.exported.check
        assert check is not None
        assert check.passed
        difference = float((found[name] - each.expected).abs().max())
        assert difference <= (0.0 if CASES[name].exact else check.tolerance), name
        # an export without the adapters would not pass
        if CASES[name].adapters:
            base = logits_of(load(each.base))
            assert float((base - each.expected).abs().max()) > 100 * check.tolerance, name


def test_shards_are_those_of_save_pretrained(done: dict[str, Done], tmp_path: Path) -> None:
    each = done["classifier-full"]
    model = transformers.BertForSequenceClassification.from_pretrained(each.out)
    model.save_pretrained(tmp_path, max_shard_size=20_000)
    ours, theirs = (
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (each.out, tmp_path)
    )
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert len(each.exported.files) > 3
    for name in each.exported.files:
        tensors = load_file(each.out / name)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
    assert each.exported.num_bytes == ours["metadata"]["total_size"]
    config = json.loads((each.out / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_a_plain_peft_folder_is_merged_as_peft_does(tmp_path: Path) -> None:
    """rsLoRA, a rank of its own for some layers, embeddings, biases; in bf16 with one rounding."""
    model_of("llama").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(base, config)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        wrapped.save_pretrained(tmp_path / "adapter")
    done = export_checkpoint(tmp_path / "adapter", tmp_path / "out", verify=True)
    wide = peft.PeftModel.from_pretrained(
        load(tmp_path / "base", dtype="float32"), tmp_path / "adapter"
    )
    exact = wide.merge_and_unload().state_dict()
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name
    assert done.num_folded == 7
    assert done.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("method", "whole"), [("loha", True), ("ia3", False), ("dora", True)], ids=str
)
def test_other_methods_of_peft_are_merged_too(method: str, whole: bool, tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "base")
    configs = {
        "loha": peft.LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
        "dora": peft.LoraConfig(
            r=2, target_modules=["q_proj"], use_dora=True, init_lora_weights=False
        ),
    }
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(base, configs[method])
    expected = logits_of(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    done = export_checkpoint(tmp_path / "adapter", tmp_path / "out", verify=True)
    assert done.num_folded == len(configs[method].target_modules) * 3
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    check = compare_logits(expected, plain, rounding=0.0)
    assert check.passed
    source = Source.open(tmp_path / "adapter", base=None, task=None)
    assert source.is_streamed is not whole


def test_dtype_casts_what_is_written(done: dict[str, Done], tmp_path: Path) -> None:
    each = done["llama"]
    made = export_checkpoint(
        each.checkpoint, tmp_path / "out", base=each.base, dtype=torch.bfloat16, verify=True
    )
    assert made.dtype == "bfloat16"
    assert made.num_bytes * 2 == each.exported.num_bytes
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype is torch.bfloat16
    assert made.check is not None
    assert made.check.max_difference > each.exported.check.max_difference  # type: ignore[union-attr]


def test_a_wrong_fold_does_not_pass_verification(
    done: dict[str, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = done["llama-nf4"]
    right = memrt.plain_weights.fold_layer

    def twice(name: str, layer: Any) -> None:
        if name.endswith("1.self_attn.q_proj"):
            layer.set_scale("default", 1.2)
        right(name, layer)

    monkeypatch.setattr(memrt.plain_weights, "fold_layer", twice)
    with pytest.raises(ValueError, match=r"max\|Δ\|.* tolerance .* nothing was kept"):
        export_checkpoint(each.checkpoint, tmp_path / "out", base=each.base, verify=True)
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_refused_in_a_sentence(done: dict[str, Done], tmp_path: Path) -> None:
    each, out = done["llama"], tmp_path / "out"
    model_of("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="PEFT cannot put LORA into GPT2LMHeadModel"):
        export_checkpoint(each.checkpoint, out, base=tmp_path / "other")
    model_of("llama", hidden_size=48).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="another model or method; name the base"):
        export_checkpoint(each.checkpoint, out, base=tmp_path / "wide")
    with pytest.raises(ValueError, match="holds adapters alone and does not name"):
        export_checkpoint(_unnamed(each.checkpoint, tmp_path / "unnamed"), out)
    with pytest.raises(ValueError, match="holds a whole model, so base has no effect"):
        export_checkpoint(done["gpt2-full"].checkpoint, out, base=each.base)
    with pytest.raises(ValueError, match="is a run's folder, name one of its checkpoints"):
        export_checkpoint(each.checkpoint.parent, out)
    with pytest.raises(ValueError, match="max_shard_size='5 apples'"):
        export_checkpoint(each.checkpoint, out, base=each.base, max_shard_size="5 apples")
    assert not out.exists()


def _unnamed(checkpoint: Path, folder: Path) -> Path:
    folder.mkdir()
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    (folder / "adapter_model.safetensors").write_bytes(
        (checkpoint / "adapter_model.safetensors").read_bytes()
    )
    return folder


def test_a_tied_weight_that_was_adapted_alone_is_refused(tmp_path: Path) -> None:
    model_of("gpt2").save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False)
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(base, config)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"wte\.weight was adapted apart from lm_head\.weight"):
        export_checkpoint(tmp_path / "adapter", tmp_path / "out")


def test_damaged_files_are_named(done: dict[str, Done], tmp_path: Path) -> None:
    each = done["llama"]
    whole = (each.base / "model.safetensors").read_bytes()
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text((each.base / "config.json").read_text())
    (tmp_path / "base/model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        export_checkpoint(each.checkpoint, tmp_path / "out", base=tmp_path / "base")
    tensors = load_file(each.base / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "norm" not in k}, tmp_path / "base/model.safetensors"
    )
    with pytest.raises(
        ValueError, match=r"needs 'model\.layers\.0\.input_layernorm\.weight' and 6 more"
    ):
        export_checkpoint(each.checkpoint, tmp_path / "out", base=tmp_path / "base")
    broken = _unnamed(each.checkpoint, tmp_path / "adapter")
    (broken / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: not a whole"):
        export_checkpoint(broken, tmp_path / "out", base=each.base)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_full_disk_leaves_nothing(
    done: dict[str, Done], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = done["gpt2-full"]
    usage = memrt.export.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(memrt.export.shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(OSError, match=r"could not be written.*has 0\.00 GiB free"):
            export_checkpoint(each.checkpoint, tmp_path / "out")
    count = iter(range(5))

    def full(tensor: Tensor, entry: Any) -> bytes:
        if next(count, None) is None:
            raise OSError(28, "No space left on device")
        return bytes(entry.num_bytes)

    monkeypatch.setattr(memrt.weight_writer, "_bytes_of", full)
    with pytest.raises(OSError, match=r"No space left on device.*nothing of it is left"):
        export_checkpoint(each.checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


PEAK = """
import resource, sys
from memrt.export import export_checkpoint
tiny, folder, out = sys.argv[1:]
export_checkpoint(f"{tiny}/adapter", f"{out}/warm", base=f"{tiny}/base")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
export_checkpoint(f"{folder}/adapter", f"{out}/out", base=f"{folder}/base", max_shard_size="64MiB")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_host_never_holds_more_than_a_module(tmp_path: Path) -> None:
    """A model of 215 MiB in bf16, whose largest tensor has 2 MiB as stored."""
    _adapted_llama(tmp_path / "tiny", hidden=64, layers=2)
    _adapted_llama(tmp_path / "large", hidden=1024, layers=15)
    (tmp_path / "made").mkdir()
    folders = [str(tmp_path / name) for name in ("tiny", "large", "made")]
    words = [sys.executable, "-c", PEAK, *folders]
    result = subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
    grown = int(result.stdout) * 1024
    total = sum(path.stat().st_size for path in (tmp_path / "made/out").glob("*.safetensors"))
    assert total > 200 * 2**20
    # W, ΔW and PEFT's safe copy in float32, A and B: a handful of tensors of 4 MiB
    assert grown < 40 * 2**20


def _adapted_llama(folder: Path, *, hidden: int, layers: int) -> None:
    """Weights of zeros, written without a model; adapters of random numbers."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder / "base")
    with torch.device("meta"):
        shapes = transformers.LlamaForCausalLM(config).state_dict()
    zeros = {name: torch.zeros(t.shape, dtype=torch.bfloat16) for name, t in shapes.items()}
    save_file(zeros, folder / "base/model.safetensors", metadata={"format": "pt"})
    model = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    adapter = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    peft.get_peft_model(model, adapter).save_pretrained(folder / "adapter")
