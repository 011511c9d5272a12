"""TRL's SFTTrainer under the mixin: the same numbers, every strategy, exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from torch import Tensor

from memrt import MemoryMixin
from memrt.errors import ConflictError
from memrt.tokenization import byte_level_tokenizer
from tests.trainer_runs import CHECKPOINTING, assert_equal, history, weights

trl = pytest.importorskip("trl", reason="TRL is not installed")


class MemorySFTTrainer(MemoryMixin, trl.SFTTrainer):  # type: ignore[misc]
    """What the README tells people to write."""


SENTENCES = [
    f"the {noun} sat on the {place}"
    for noun in ("cat", "dog", "owl", "fox")
    for place in ("mat", "log", "hill", "roof", "wall", "bench")
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_tokenizer(" ".join(SENTENCES), vocab_size=280)


def trainer_of(
    folder: Path, tokenizer: Any, *, cls: type = MemorySFTTrainer, **options: Any
) -> Any:
    """Four steps of two micro-batches; the loss is over the completions."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    rows = [{"prompt": line[:11], "completion": line[11:]} for line in SENTENCES]
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        CHECKPOINTING: False,
        **options.pop("arguments", {}),
    }
    trainer = cls(
        model=transformers.LlamaForCausalLM(config),
        args=trl.SFTConfig(**settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        **options,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trained(folder: Path, tokenizer: Any, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    resume = options.pop("resume", None)
    trainer = trainer_of(folder, tokenizer, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, weights(trainer)


def test_without_strategies_it_is_trls_own(tmp_path: Path, tokenizer: Any) -> None:
    theirs, their_weights = trained(tmp_path / "theirs", tokenizer, cls=trl.SFTTrainer)
    ours, our_weights = trained(tmp_path / "ours", tokenizer)
    assert history(ours) == history(theirs)
    assert_equal(our_weights, their_weights)


@pytest.mark.parametrize(
    "stack",
    [
        ["activation_checkpoint"],
        ["offload_activations"],
        ["activation_checkpoint", "offload_activations"],
    ],
    ids="+".join,
)
def test_exact_strategies_change_no_number(
    tmp_path: Path, tokenizer: Any, stack: list[str]
) -> None:
    plain, plain_weights = trained(tmp_path / "plain", tokenizer)
    changed, changed_weights = trained(tmp_path / "changed", tokenizer, strategies=stack)
    assert [log["loss"] for log in changed.state.log_history if "loss" in log] == [
        log["loss"] for log in plain.state.log_history if "loss" in log
    ]
    assert_equal(changed_weights, plain_weights)


@pytest.mark.parametrize(
    "stack",
    [["lisa(layers=1, every=2)", "int8_states"], ["galore(rank=8, every=2)"]],
    ids="+".join,
)
def test_resume_in_the_middle_is_exact(tmp_path: Path, tokenizer: Any, stack: list[str]) -> None:
    saves = {"save_strategy": "steps", "save_steps": 1}
    _, whole = trained(tmp_path / "whole", tokenizer, strategies=stack, arguments=saves)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    _, resumed = trained(
        tmp_path / "resumed", tokenizer, strategies=stack, arguments=saves, resume=checkpoint
    )
    assert_equal(resumed, whole)


def test_budget_and_report_without_memrts_arguments(tmp_path: Path, tokenizer: Any) -> None:
    """`SFTConfig` has no field for them; the choice is for the longest of TRL's own batches."""
    probe = trainer_of(tmp_path / "probe", tokenizer, memory_budget="24GiB")
    assert probe.memory_choice.strategies == ()
    longest = max(len(row["input_ids"]) for row in probe.train_dataset)
    assert probe.memory_choice.plan.shape.sequence_length == longest
    budget = str(probe.memory_choice.plan.device_bytes["high"] - 1)
    trainer, _ = trained(tmp_path / "run", tokenizer, memory_budget=budget, memory_report=True)
    choice = trainer.memory_choice
    assert choice.strategies == tuple(map(str, trainer.session.strategies)) != ()
    fused = [each for each in choice.candidates if "fused_loss" in each.stack]
    assert {each.verdict for each in fused} <= {"refused", "not planned"}
    assert "TRL's SFTTrainer does it to fuse its own head" in choice.explain()
    report = json.loads((tmp_path / "run/memrt/report.json").read_text())
    assert report["conditions"]["strategies"] == list(choice.strategies)
    assert report["num_counted_steps"] == 3
    assert report["accounts"]["optimizer"] > 0


def test_trls_own_checkpointing_beside_ours_is_refused_by_name(
    tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(ConflictError, match="gradient_checkpointing=True and activation_checkpoin"):
        trainer_of(
            tmp_path,
            tokenizer,
            strategies=["activation_checkpoint"],
            arguments={CHECKPOINTING: True},
        )


def test_a_second_fused_head_is_refused_by_name(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConflictError, match="TRL's SFTTrainer does it to fuse its own head"):
        trainer_of(tmp_path, tokenizer, strategies=["fused_loss"])
