"""`memrt profile`: a real run, every source beside the others, and the reason where one is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from memrt.profiling.kernel_scratch import largest_scratch, scratch_of
from tests.cli.conftest import SHAPES, Command

RUN = [*SHAPES, "--steps", "5"]


def test_a_profile_without_a_gpu_counts_and_says_what_is_missing(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = ["profile", "--model", model_folder(), *RUN, "--strategies", "activation_checkpoint"]
    result = memrt(*words, "--output", "report")
    assert result.code == 0, result.err
    assert "NVML: not available: torch sees no CUDA device" in result.out
    assert "allocator: not available" in result.out
    assert "energy per token: not available" in result.out
    assert "Lines that sum to this process's memory" in result.out
    report = json.loads(Path("report/report.json").read_text())
    assert report["kind"] == "profile"
    assert report["stack"] == "activation_checkpoint"
    assert report["joules_per_token"] is None
    assert report["peak_bytes"] == report["predicted"]["peak_bytes"]
    assert report["tokens_per_second"] > 0
    assert len(report["losses"]) == 5
    assert report["timeline"]


def test_the_monitor_sees_every_phase_of_the_steps_without_the_ledger(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["profile", "--model", model_folder(), *RUN, "--accumulation", 2, "--json"]
    phases = memrt(*words).report["monitor"]["phases"]
    times = {name: phase["num_times"] for name, phase in phases.items()}
    # 5 steps, 2 of them under the ledger, of 2 micro-batches
    assert times == {"load": 1, "counted": 1, "forward": 6, "backward": 6, "step": 3}
    assert all(phase["seconds"] > 0 for phase in phases.values())
    assert phases["step"]["rss_peak_bytes"] > 2**20


def test_weights_and_tokenizer_of_a_folder_are_used(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from memrt.embedded import embedded_tokenizer

    folder = model_folder()
    random = memrt("profile", "--model", folder, *RUN, "--json").report
    assert random["conditions"]["weights"] == "random"
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    embedded_tokenizer(1024).save_pretrained(folder)
    loaded = memrt("profile", "--model", folder, *RUN, "--json").report
    assert loaded["conditions"]["weights"] == "loaded"
    assert loaded["conditions"]["tokenizer"] == str(folder)
    assert loaded["losses"] != random["losses"]
    assert loaded["peak_bytes"] == random["peak_bytes"]


def test_all_words_form_one_stack(memrt: Command, model_folder: Callable[..., Path]) -> None:
    words = ["profile", "--model", model_folder(), *RUN, "--json", "--strategies"]
    report = memrt(*words, "int8_states", "lisa+fused_loss").report
    assert report["stack"] == "int8_states+lisa+fused_loss"
    assert report["conditions"]["strategies"] == ["lisa", "int8_states", "fused_loss"]


def test_kernel_scratch_is_a_line_of_its_own(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["profile", "--model", model_folder(), *RUN, "--kernel-scratch", "--output", "report"]
    result = memrt(*words)
    assert result.code == 0, result.err
    assert "kernel scratch: at most" in result.out
    scratch = json.loads(Path("report/report.json").read_text())["kernel_scratch"]
    assert scratch["largest_bytes"] > 0
    assert scratch["operator"].startswith("aten::")


def test_scratch_is_what_an_operator_makes_and_drops_inside() -> None:
    left = torch.randn(256, 256).t().contiguous()
    expanded = torch.randn(256, 1).expand(256, 256)  # mm copies it: one matrix of scratch

    def step() -> None:
        left + left  # an output alone
        expanded @ left

    found = largest_scratch(step)
    assert found["by_operator"]["aten::mm"] == 256 * 256 * 4
    assert "aten::add" not in found["by_operator"]


def test_scratch_of_a_trace() -> None:
    def call(name: str, ts: float, dur: float) -> dict[str, object]:
        return {"ph": "X", "name": name, "tid": 1, "ts": ts, "dur": dur}

    def memory(ts: float, num_bytes: int, device: int = 0) -> dict[str, object]:
        arguments = {"Bytes": num_bytes, "Device Type": device}
        return {"ph": "i", "name": "[memory]", "tid": 1, "ts": ts, "args": arguments}

    events = [
        memory(0, 7),  # before any operator
        call("aten::sort", 1, 10),
        call("aten::empty", 2, 1),  # inside
        memory(2, 100),
        memory(3, 40),
        memory(4, 999, device=1),  # another device's
        memory(9, -40),
        call("aten::add", 20, 5),
        memory(21, 64),
        call("aten::relu_", 30, 5),  # frees more than it makes
        memory(31, 16),
        memory(32, -80),
    ]
    operators = {"aten::sort", "aten::empty", "aten::add", "aten::relu_"}
    assert scratch_of(events, operators) == {"aten::sort": 40, "aten::relu_": 16}


def test_a_model_that_no_plan_can_run_is_counted(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    # how many tokens an expert gets is read from a tensor
    folder = model_folder(
        model_type="jetmoe",
        architectures=["JetMoeForCausalLM"],
        num_hidden_layers=1,
        num_key_value_heads=2,
        num_local_experts=4,
        kv_channels=16,
    )
    words = ["--model", folder, "--batch", 2, "--seq", 32, "--steps", 4]
    stack = ["--strategies", "activation_checkpoint", "--ablate"]
    result = memrt("profile", *words, *stack, "--output", "report")
    assert result.code == 0, result.err
    assert "no prediction: what this model runs depends on values" in result.err
    assert "predicted: not available: what this model runs depends on values" in result.out
    report = json.loads(Path("report/report.json").read_text())
    assert report["predicted"] is None
    assert "depends on values" in report["not_predicted"]
    assert report["peak_bytes"] == report["ablation"][-1]["counted"]["peak_bytes"] > 0
    assert "not available" in Path("report/report.html").read_text()
    assert "predicted peak" not in Path("report/report.html").read_text()


def test_ablation_measures_what_the_waterfall_predicts(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["--model", model_folder(num_hidden_layers=2), "--batch", 2, "--seq", 32]
    stack = ["--strategies", "int8_states", "activation_checkpoint"]
    result = memrt("profile", *words, "--steps", 4, "--ablate", *stack, "--output", "report")
    assert result.code == 0, result.err
    assert "What the stack takes more without it" in result.out
    rows = json.loads(Path("report/report.json").read_text())["ablation"]
    predicted = memrt("plan", *words, "--waterfall", "--json", *stack).report["waterfall"]
    assert [row["strategy"] for row in rows] == ["none", "int8_states", "activation_checkpoint"]
    for row, planned in zip(rows, predicted, strict=True):
        assert row["reason"] is None
        for number in ("peak_bytes", "step_bytes", "saved_bytes"):
            assert row["predicted"][number] == planned[number]
            assert row["counted"][number] == planned[number]
            assert row["difference_bytes"][number] in (0, None)
        if not torch.cuda.is_available():
            assert row["allocated"] is None
    assert all(row["counted"]["peak_bytes"] > 0 for row in rows)
    refused = memrt("profile", *words, "--ablate")
    assert refused.code == 1
    assert "--ablate has no effect without --strategies" in refused.error
