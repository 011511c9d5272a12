"""What `memrt train` leaves: adapters beside their model, a side network, else a plain model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import memrt
from memrt.cli.main import main
from memrt.data import byte_level_tokenizer
from tests.cli.train_runs import CONFIG, SHORT, write_pairs, write_text

EXAMPLE = Path(__file__).parents[2] / "examples" / "70b_on_one_gpu.yaml"
LADDER = "[nf4, {ladder: {reduction: 2, taps: pooled, checkpoint: true}}, int8_states, fused_loss]"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model folder with weights and a tokenizer."""
    text = Path(write_text(tmp_path / "text.txt")).read_text("utf-8")
    tokenizer = byte_level_tokenizer(text, vocab_size=300)
    config = _config(tmp_path, vocab_size=len(tokenizer), hidden_size=64)
    model: Any = memrt.load(config, seed=0)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _config(folder: Path, **overrides: int) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIG, "max_position_embeddings": 2048, **overrides}))
    return str(path)


def _train(tmp_path: Path, *words: str, model: str) -> Path:
    """The example of the page "70B on one GPU", on a model of this size."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", num_lines=12)
    output = tmp_path / "run"
    code = main(
        [
            *("train", str(EXAMPLE), "--model", model, "--data", pairs, "--output", str(output)),
            *SHORT,
            *("--max-steps", "3", "--gradient-accumulation-steps", "1", "dtype=float32"),
            *("data.prompt_column=question", "data.completion_column=answer", "--seq", "64"),
            *words,
        ]
    )
    assert code == 0
    return output


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_adapters_stay_beside_their_model(tmp_path: Path, base: Path) -> None:
    run = _train(tmp_path, model=str(base))
    assert not list(run.glob("model*.safetensors"))
    plain = AutoModelForCausalLM.from_pretrained(base)
    adapted = PeftModel.from_pretrained(plain, run)
    trained = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert trained
    assert any(p.abs().max() > 0 for p in trained)
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )
    assert len(AutoTokenizer.from_pretrained(run)) == plain.config.vocab_size


def test_a_side_network_stands_alone(tmp_path: Path, base: Path) -> None:
    run = _train(tmp_path, f"strategies={LADDER}", model=str(base))
    model = memrt.load(str(base), ["nf4"], dtype="float32")
    before = [p.clone() for p in model.parameters()]
    session = memrt.load_ladder(model, run, strategies=["nf4"])
    side = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in before)
    assert side > 0
    ids = torch.arange(8)[None]
    with torch.no_grad():
        together = model(input_ids=ids).logits
        session.detach()
        alone = model(input_ids=ids).logits
    assert not torch.equal(together, alone)  # three steps have moved it from its exact start


def test_adapters_of_random_weights_are_folded_into_them(tmp_path: Path) -> None:
    run = _train(tmp_path, model=_config(tmp_path))
    assert not (run / "adapter_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(run).num_parameters() > 0


def test_a_tokenizer_with_several_chat_templates_is_published_again(tmp_path: Path) -> None:
    text = Path(write_text(tmp_path / "text.txt")).read_text("utf-8")
    tokenizer = byte_level_tokenizer(text, vocab_size=300)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = [f"model.tokenizer={tmp_path / 'tokenizer'}", "strategies=[]"]
    model = _config(tmp_path, vocab_size=len(tokenizer))
    for more in ([], ["--max-steps", "4", "--resume"]):
        run = _train(tmp_path, *words, *more, model=model)
        assert AutoTokenizer.from_pretrained(run).chat_template == tokenizer.chat_template
    assert not (run / "memrt" / "model").exists()
