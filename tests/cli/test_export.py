"""`memrt export` and `memrt merge`: what they print, and one line for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from memrt import Trainer
from tests.cli.conftest import Command
from tests.trainer_runs import arguments, examples, model_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, a run with adapters on it, and one that trained every weight."""
    folder = tmp_path_factory.mktemp("trained")
    model_of("llama").save_pretrained(folder / "base")
    for name, strategies in (("adapted", ["int8", "peft(rank=2)"]), ("whole", ["lisa"])):
        trainer = Trainer(
            model=transformers.LlamaForCausalLM.from_pretrained(folder / "base"),
            args=arguments(folder / name, save_strategy="steps", save_steps=1, max_steps=1),
            train_dataset=examples("llama"),
            strategies=strategies,
        )
        trainer.train()
    return folder


def test_merge_says_what_it_wrote(memrt: Command, trained: Path) -> None:
    words = ["merge", trained / "adapted/checkpoint-1", "merged", "--base", trained / "base"]
    done = memrt(*words, "--verify", "--dtype", "bf16", "--max-shard-size", "30KB", "--json")
    assert (done.code, done.err) == (0, "")
    report = done.report
    assert report["schema"] == "memrt.export/1"
    assert (report["folded_layers"], report["unpacked_weights"]) == (21, 21)
    assert report["dtype"] == "bfloat16"
    assert report["verify"]["passed"]
    assert sorted(report["files"]) == sorted(p.name for p in Path("merged").glob("*.safetensors"))
    plain = memrt(*words[:2], "again", *words[3:])
    assert plain.code == 0
    assert "parameters in float32" in plain.out
    assert "folded: the adapters of 21 layers\nunpacked: 21 weights" in plain.out


def test_export_of_a_whole_checkpoint(memrt: Command, trained: Path) -> None:
    done = memrt("export", trained / "whole/checkpoint-1", "plain", "--verify")
    assert done.code == 0
    assert "verified: max|Δ| of" in done.out
    assert "folded" not in done.out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["export", "nowhere", "out"], "'nowhere': there is no such folder"),
        (["export", "{base}/config.json", "out"], "is a file; name the checkpoint's folder"),
        (["export", "{adapted}", "out"], "is a run's folder, name one of its checkpoints"),
        (
            ["export", "{whole}/checkpoint-1", "{base}"],
            "error: OUTPUT='{base}' is taken; name a new or empty folder",
        ),
        (["merge", "{whole}/checkpoint-1", "out", "--base", "{base}"], "base has no effect"),
        (["merge", "{base}", "out", "--base", "{base}"], "holds no adapter_model.safetensors"),
        (["merge", "{adapted}/checkpoint-1", "out"], "required: --base"),
        (["merge", "ladder", "out", "--base", "{base}"], "side network cannot be folded"),
        (
            ["export", "{adapted}/checkpoint-1", "out", "--max-shard-size", "0"],
            "max_shard_size='0': must be bytes, such as 5GB",
        ),
        (
            ["merge", "{adapted}/checkpoint-1", "out", "--base", "{whole}"],
            "has no config.json",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    memrt: Command, trained: Path, words: list[str], error: str
) -> None:
    Path("ladder").mkdir()
    Path("ladder/ladder.json").write_text("{}")
    named = {name: str(trained / name) for name in ("base", "adapted", "whole")}
    done = memrt(*(word.format(**named) for word in words))
    assert done.code == 1
    assert done.out == ""
    assert error.replace("{base}", named["base"]) in done.error
    assert len(done.err.strip().splitlines()) == 1
    assert {path.name for path in Path().iterdir()} == {"ladder"}
