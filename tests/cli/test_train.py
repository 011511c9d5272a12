"""`memrt train`: what a run does, what it leaves, and how it fails."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import integration_utils

from memrt.cli import train_report
from memrt.cli.train_console import ConsoleCallback
from memrt.cli.train_elsewhere import hub_errors
from memrt.data import DataSettings, load_examples
from tests.cli.conftest import Command
from tests.cli.train_runs import SHORT, write_model, write_pairs, write_text

TEXT = ["--data", "sums.txt", "--model", "model"]


@pytest.fixture(autouse=True)
def files(memrt: Command) -> None:
    """A model and data in the working folder."""
    write_model(Path("model"))
    write_text(Path("sums.txt"))
    write_pairs(Path("pairs.jsonl"))


def _run(memrt: Command, *words: object) -> dict[str, Any]:
    result = memrt("train", *words, "--json")
    assert result.code == 0, result.err
    return result.report


def test_a_run_leaves_a_plain_folder_whose_loss_is_the_reported_one(memrt: Command) -> None:
    report = _run(
        memrt,
        *TEXT,
        *SHORT,
        "--steps",
        8,
        "evaluation_fraction=0.2",
        "--strategies",
        "lisa(layers=1)",
    )
    losses = [each["loss"] for each in report["losses"]]
    assert [each["step"] for each in report["losses"]] == list(range(1, 9))
    assert losses[-1] == report["loss"] < losses[0]
    model = AutoModelForCausalLM.from_pretrained("memrt-run")
    tokenizer = AutoTokenizer.from_pretrained("memrt-run")
    settings = DataSettings(path="sums.txt", sequence_length=24, evaluation_fraction=0.2, seed=42)
    held_out = load_examples(settings, tokenizer).evaluation
    assert held_out is not None
    ids = torch.tensor(held_out["input_ids"])
    assert len(ids) == report["data"]["evaluation"]["num_examples"] > 2
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert report["evaluation_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_no_plan_can_run_is_trained(memrt: Command) -> None:
    # how many tokens an expert gets is read from a tensor
    write_model(
        Path("model"),
        model_type="jetmoe",
        num_hidden_layers=1,
        num_local_experts=4,
        kv_channels=16,
    )
    result = memrt("train", *TEXT, *SHORT, "--steps", 2)
    assert result.code == 0, result.err
    assert "no prediction: NotPlannableError: what this model runs depends on" in result.err
    report = json.loads(Path("memrt-run/memrt/report.json").read_text())
    assert report["predicted"] is None
    assert len(report["losses"]) == 2


def test_the_report_tells_what_was_predicted_and_counted(memrt: Command) -> None:
    report = _run(memrt, *TEXT, *SHORT, "--steps", 5, "--strategies", "int8_states", "fused_loss")
    assert report["schema"].startswith("memrt.report/")
    assert report["kind"] == "train"
    assert sum(report["accounts"].values()) == report["peak_bytes"] > 0
    # packed, so that every batch has the planned shape; scalars of the loop are not planned
    assert report["peak_bytes"] == pytest.approx(report["predicted"]["peak_bytes"], abs=4096)
    assert report["accounts"]["weights"] == report["predicted"]["accounts"]["weights"]
    assert report["tokens_per_second"] > 0
    assert report["conditions"]["strategies"] == ["int8_states", "fused_loss"]
    assert report["conditions"]["num_parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained("memrt-run").parameters()
    )
    written = Path("memrt-run/memrt/report.json")
    assert json.loads(written.read_text()) == report
    page = written.with_suffix(".md").read_text()
    assert "predicted" in page
    assert "int8_states+fused_loss" in page
    assert {"load", "counted", "forward", "save"} <= set(report["monitor"]["phases"])
    assert set(report["predicted"]["outside"]) == {"load", "evaluate", "save", "resume"}
    assert "Peak of every phase" in page


def test_without_json_the_report_is_text_and_the_steps_are_told(memrt: Command) -> None:
    words = ("--steps", 2, "evaluation_fraction=0.2", "memory_report=false")
    result = memrt("train", *TEXT, *SHORT, *words)
    assert result.code == 0, result.err
    assert "# memrt train: model, none" in result.out
    assert "predicted" in result.out
    assert "counted" not in result.out
    assert "predicted peak" in result.err
    assert "step 2/2  loss" in result.err
    assert "step 2/2  evaluation loss" in result.err


def test_prompts_are_masked_and_padded_batches_stay_below_the_plan(memrt: Command) -> None:
    report = _run(
        memrt,
        *("model=model", "data=pairs.jsonl", "prompt_column=question", "completion_column=answer"),
        *SHORT,
        *("--steps", 3, "--separator", "\n", "--evaluation-path", "pairs.jsonl"),
    )
    part = report["data"]["train"]
    assert part["kind"] == "prompt_completion"
    assert 0 < part["num_masked_tokens"] < part["num_tokens"]
    assert not part["packed"]
    assert report["peak_bytes"] <= report["predicted"]["peak_bytes"] + 4096
    assert report["evaluation_loss"] > 0


def test_a_run_with_neither_model_nor_data_trains_the_embedded_ones(memrt: Command) -> None:
    report = _run(memrt, "--seq", 16, "--batch", 1, "--steps", 1, "evaluation_fraction=0.0005")
    assert report["conditions"]["model"] == "embedded Llama"
    assert report["steps"] == 1


def test_bf16_weights_and_accumulation(memrt: Command) -> None:
    words = ("--steps", 3, "--dtype", "bfloat16", "--accumulation", 2)
    report = _run(memrt, *TEXT, *SHORT, *words)
    assert AutoModelForCausalLM.from_pretrained("memrt-run").dtype == torch.bfloat16
    assert report["peak_bytes"] == pytest.approx(report["predicted"]["peak_bytes"], abs=4096)


# ---------------------------------------------------------------- another run's folder


def test_another_run_is_never_overwritten(memrt: Command) -> None:
    short = [*TEXT, *SHORT, "--steps", 2]
    _run(memrt, *short)
    before = Path("memrt-run/model.safetensors").read_bytes()
    result = memrt("train", *short, "--seed", 7)
    assert result.code == 1
    assert "holds a run (finished)" in result.error
    assert "--resume" in result.error
    assert Path("memrt-run/model.safetensors").read_bytes() == before
    further = memrt("train", *short, "--overwrite", "--model", "memrt-run")
    assert further.code == 1
    assert "--overwrite: model.path='memrt-run' lies in output='memrt-run'" in further.error
    assert not Path("memrt-run.1").exists()
    assert memrt("train", *short, "--seed", 7, "--overwrite").code == 0
    assert Path("memrt-run.1/model.safetensors").read_bytes() == before
    assert Path("memrt-run/model.safetensors").read_bytes() != before


@pytest.mark.parametrize("words", [[], ["--overwrite"]])
def test_a_folder_that_is_no_run_is_left_alone(memrt: Command, words: list[str]) -> None:
    Path("memrt-run").mkdir()
    Path("memrt-run/thesis.txt").write_text("all of it")
    result = memrt("train", *TEXT, *SHORT, "--steps", 1, *words)
    assert result.code == 1
    assert "files that are no run" in result.error
    assert [path.name for path in Path("memrt-run").iterdir()] == ["thesis.txt"]


# ---------------------------------------------------------------- failures


def test_a_loss_that_is_not_finite_names_the_last_checkpoint(memrt: Command) -> None:
    words = ("--lr", "1e30", "--max-grad-norm", "0", "--save-steps", "1", "--steps", "6")
    result = memrt("train", *TEXT, *SHORT, *words)
    assert result.code == 1
    assert "the last good checkpoint is memrt-run/checkpoint-" in result.error
    assert "Traceback" not in result.err
    assert not Path("memrt-run/config.json").exists()


def test_losses_that_are_not_finite_can_be_let_pass(memrt: Command) -> None:
    words = ("--lr", "1e30", "--max-grad-norm", "0", "--steps", "6", "stop_on_nonfinite=false")
    report = _run(memrt, *TEXT, *SHORT, *words, "evaluation_fraction=0.2")
    assert report["losses"][0]["loss"] > 0
    assert report["evaluation_loss"] is None
    assert "evaluation loss: not finite" in Path("memrt-run/memrt/report.md").read_text()


def test_ctrl_c_says_how_to_go_on_and_that_works(
    memrt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TEXT, *SHORT, "--steps", "4"]

    def interrupt(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ConsoleCallback, "on_step_begin", interrupt, raising=False)
        result = memrt("train", *words)
    assert result.code == 130
    [told] = [line for line in result.err.splitlines() if "go on with: " in line]
    assert "checkpoint-2" in told
    again = told.rpartition("go on with: memrt ")[2].split()
    assert again == ["train", *words, "--resume"]
    resumed = memrt(*again)
    assert resumed.code == 0, resumed.err
    assert Path("memrt-run/model.safetensors").is_file()


def test_a_full_disk_is_one_line(memrt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", refuse)
    result = memrt("train", *TEXT, *SHORT, "--steps", 2)
    assert result.code == 1
    assert "checkpoint-2 could not be written" in result.error
    assert "GiB free" in result.error
    assert "Traceback" not in result.err
    assert [path.name for path in Path("memrt-run").iterdir()] == ["memrt"]


def test_a_report_is_written_where_nobody_reads_it_and_a_full_disk_is_told(
    memrt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise BrokenPipeError

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Path("run/memrt").mkdir(parents=True)
    report = {"schema": "memrt.report/1", "kind": "train"}
    monkeypatch.setattr(train_report, "to_markdown", lambda _: "text")
    monkeypatch.setattr(train_report, "to_html", lambda _: "page")
    monkeypatch.setattr(train_report, "print_report", gone)
    with pytest.raises(BrokenPipeError):
        train_report.deliver(report, Path("run"), as_json=False)
    assert json.loads(Path("run/memrt/report.json").read_text()) == report
    monkeypatch.setattr(train_report, "write_json", refuse)
    with pytest.raises(
        OSError, match=r"run/memrt .No space left .* run the command again with --r"
    ):
        train_report.deliver(report, Path("run"), as_json=True)


def test_a_logger_that_is_not_installed_is_told_before_data_is_read(
    memrt: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr("memrt.cli.train_run.load_examples", read)
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    for name, expected in (("wandb", "pip install wandb"), ("wandbb", "is not supported, only")):
        result = memrt("train", *TEXT, *SHORT, f"training.report_to={name}")
        assert result.code == 1
        assert f"training.report_to='{name}': " in result.error
        assert expected in result.error
        assert "Traceback" not in result.err
    assert not Path("memrt-run").exists()


@pytest.mark.parametrize("kind", [OSError, HfHubHTTPError.__bases__[0]])
def test_a_hub_that_cannot_be_pushed_to_is_one_line(
    memrt: Command, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """The HTTP client's own errors too, which are no OSError."""

    def fail(*_: object, **__: object) -> None:
        raise kind("[Errno -2] Name or service not known")

    # before the data is read and the run is planned, and where a Trainer makes its repository
    for where in ("huggingface_hub.HfApi.whoami", "transformers.Trainer.init_hf_repo"):
        monkeypatch.setattr(where, fail)
        result = memrt("train", *TEXT, *SHORT, "--steps", 2, "training.push_to_hub=true")
        assert result.code == 1
        assert "training.push_to_hub=true: the Hub cannot be used ([Errno -2] Name" in result.error
        assert "Traceback" not in result.err
        assert ("peak" in result.err) is (where == "transformers.Trainer.init_hf_repo")
        monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda *_, **__: {"name": "user"})
    # an error of another place keeps its own sentence
    with pytest.raises(OSError, match="disk"), hub_errors(SimpleNamespace(push_to_hub=False)):
        raise OSError("disk")


def test_a_hub_id_without_network_says_so(memrt: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    result = memrt("train", "--model", "nobody/no-such-model", "--data", "sums.txt")
    assert result.code == 1
    assert "neither a local path nor reachable on the Hub" in result.error


BAD = [
    (["data=nowhere.txt"], "data.path='nowhere.txt': there is no such file"),
    (["data=broken.jsonl"], "broken.jsonl, line 2: malformed JSON"),
    (["data=pairs.jsonl"], "name yours with text_column"),
    (["--seq", "65"], "data.sequence_length=65: the model has positions for 64 tokens"),
    (["--model", "weights"], "weights has weights and no tokenizer"),
    (["--model", "bert"], "is for masked-lm; `memrt train` trains causal language models"),
    (["--model", "tiny"], "vocab_size=100: must be an integer of at least 259"),
    (["--model", "tiny", "--tokenizer", "tokens"], "has 320 tokens and tiny a vocabulary of 100"),
    (["--tokenizer", "keys"], "no tokenizer could be loaded from 'keys' (a file of it is damaged"),
    (["--tokenizer", "parts"], "no tokenizer could be loaded from 'parts' (a file of it is dama"),
    (["--output", "sums.txt/run"], "sums.txt cannot be written to (Not a directory); name another"),
    (["optim=sgd", "optim_args=foo"], "training.optim='sgd', optim_args='foo': not enough values"),
    (["optim=adamw_torch_xla"], "training.optim='adamw_torch_xla', optim_args=None: Trainer fail"),
    (["lr_scheduler_type=cosine", "lr_scheduler_kwargs={x: 1}"], "kwargs={'x': 1}: get_cosine_sch"),
    (["lr_scheduler_type=warmup_stable_decay"], "lr_scheduler_type='warmup_stable_decay', lr_sche"),
    (["metric_for_best_model=f1"], "metric_for_best_model='f1': evaluation here is loss; name"),
    (["--strategies", "lisa(layers=5)"], "layers=5 is more than the 2 layers"),
    (
        ["data=pairs.jsonl", "text_column=question", "--seq", "4", "packing=false"],
        "truncation='drop'",
    ),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_and_nothing_is_written(
    memrt: Command, words: list[str], expected: str
) -> None:
    Path("broken.jsonl").write_text('{"text": "a b c"}\n{"text": \n')
    for name, text in (("keys", "{}"), ("parts", '{"version": "1.0", "added_tokens": []}')):
        Path(name).mkdir()
        Path(name, "tokenizer.json").write_text(text)
        Path(name, "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    write_model(Path("tiny"), vocab_size=100)
    write_model(Path("bert"), model_type="bert")
    if "weights" in words:
        write_model(Path("weights"))
        from memrt import load

        load("model").save_pretrained("weights")
    if "tokens" in words:
        from memrt.data import byte_level_tokenizer

        byte_level_tokenizer(Path("sums.txt").read_text(), 320).save_pretrained("tokens")
    before = sorted(Path().iterdir())
    result = memrt("train", *TEXT, *SHORT, "--steps", "1", *words)
    assert result.code == 1
    assert result.out == ""
    assert expected in result.err
    assert "Traceback" not in result.err
    assert sorted(Path().iterdir()) == before


def test_evaluation_happens_where_there_is_something_to_evaluate_on(memrt: Command) -> None:
    report = _run(
        memrt,
        *TEXT,
        *SHORT,
        "--steps",
        4,
        "evaluation_fraction=0.2",
        "eval_strategy=steps",
        "eval_steps=2",
    )
    assert [each["step"] for each in report["evaluation_losses"]] == [2, 4]
    assert all(math.isfinite(each["loss"]) for each in report["evaluation_losses"])
