"""`memrt plan`: the run on fake tensors, equal to the byte, and an answer by exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from memrt.planning import plan
from tests.cli.conftest import SHAPES, Command

STACKS = [
    (2, ["none"]),
    (1, ["activation_checkpoint", "offload_activations"]),
    (2, ["lisa+int8_states"]),
    (1, ["galore(rank=16)", "int8_states", "fused_loss(chunk_tokens=16)"]),
]
KEYS = ("peak_bytes", "accounts", "owners", "places", "place_peaks", "account_maxima", "phases")


@pytest.mark.parametrize(("accumulation", "stack"), STACKS)
def test_plan_equals_profile_and_compare_to_the_byte(
    memrt: Command, model_folder: Callable[..., Path], accumulation: int, stack: list[str]
) -> None:
    words = ["--model", model_folder(), *SHAPES, "--accumulation", accumulation, "--json"]
    planned = memrt("plan", *words, "--strategies", *stack).report
    profiled = memrt("profile", *words, "--steps", 4, "--strategies", *stack).report
    compared = memrt("compare", *words, "--steps", 4, "--strategies", "+".join(stack)).report
    for key in KEYS:
        assert planned[key] == profiled[key], key
        assert planned[key] == profiled["predicted"][key], key
        assert planned[key] == compared["runs"][0][key], key
    assert planned["rounded_peak_bytes"] == profiled["rounded_peak_bytes"]


def test_plan_of_padded_data_equals_its_profile(
    memrt: Command, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    lines = [{"prompt": "What is it? " * (n % 3 + 1), "completion": "It is."} for n in range(12)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model", model_folder(), *SHAPES, "--data", data, "--json"]
    planned = memrt("plan", *words).report
    profiled = memrt("profile", *words, "--steps", 4).report
    for key in KEYS:
        assert planned[key] == profiled[key], key
    # padded to the longest example, which is shorter than --seq
    assert profiled["conditions"]["sequence_length"] < 64
    assert planned["conditions"]["sequence_length"] == profiled["conditions"]["sequence_length"]


def test_depths_that_are_carried_equal_every_layer(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["plan", "--model", model_folder(num_hidden_layers=12), *SHAPES, "--json"]
    carried, full = memrt(*words).report, memrt(*words, "--full").report
    assert len(carried["simulated_layers"]) == 3
    assert full["simulated_layers"] == [12]
    for key in ("peak_bytes", "accounts", "account_maxima"):
        assert carried[key] == full[key], key


def test_exit_codes_say_whether_it_fits(memrt: Command, model_folder: Callable[..., Path]) -> None:
    words = ["plan", "--model", model_folder(), *SHAPES]
    unknown = memrt(*words)
    assert unknown.code == 0
    fits = memrt(*words, "--gpu", "1GiB")
    assert fits.code == 0
    assert "It fits 1GiB: the high bound is 7" in fits.out
    too_small = memrt(*words, "--gpu", "0.7GiB")  # 732 MiB are context and cuBLAS alone, at most
    assert too_small.code == 2
    assert "It does not fit 0.7GiB" in too_small.out
    assert memrt(*words, "--gpu", "0.7GiB", "--json").report["fits"] is False
    assert memrt(*words, "--gpu", "0").code == 1


def test_the_device_bytes_are_the_sum_of_named_lines(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    result = memrt("plan", "--model", model_folder(), *SHAPES, "--json")
    report = result.report
    assert all(each["source"] for each in report["overheads"])
    for bound in ("low", "expected", "high"):
        lines = report["rounded_peak_bytes"] + sum(e[bound] for e in report["overheads"])
        assert lines == report["device_bytes"][bound]


def test_loading_and_resuming_count_as_in_python(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    # steps of two tokens, and a resume that holds the embedding twice
    folder = model_folder(vocab_size=65536, num_hidden_layers=1)
    free = plan(str(folder), ["peft"], sequence_length=2)
    resume = free.outside["resume"]["device"]
    assert resume > free.simulation.rounded_peak_bytes
    budget = str(free.device_bytes["high"] - 1)
    words = ["plan", "--model", folder, "--batch", 1, "--seq", 2, "--strategies", "peft"]
    report = memrt(*words, "--gpu", budget, "--no-advice", "--json").report
    assert report["device_bytes"] == free.device_bytes
    assert report["fits"] is False
    lines = {each["name"]: each for each in report["overheads"]}
    assert lines["outside the steps"]["low"] == resume - report["rounded_peak_bytes"]
    total = report["rounded_peak_bytes"] + sum(each["high"] for each in lines.values())
    assert total == report["device_bytes"]["high"]


def test_the_text_names_accounts_phases_places_and_time(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    out = memrt("plan", "--model", model_folder(), *SHAPES, "--strategies", "lisa").out
    for word in ("optimizer state", "backward", "host", "CUDA context", "pytorch issues"):
        assert word in out
    assert "all 4 layers simulated" in out
    assert "Planned in " in out


def test_the_default_is_the_embedded_model_and_needs_no_data(memrt: Command) -> None:
    report = memrt("plan", "--json", "--strategies", "activation_checkpoint", "fused_loss").report
    assert report["conditions"]["model"] == "embedded Llama"
    assert report["conditions"]["data"] == "random ids"
    assert report["accounts"]["weights"] >= 8_000_000 * 4
    assert report["seconds"] < 60
    assert list(Path().iterdir()) == []


def test_bfloat16_halves_the_weights(memrt: Command, model_folder: Callable[..., Path]) -> None:
    words = ["plan", "--model", model_folder(), *SHAPES, "--json"]
    wide, narrow = memrt(*words).report, memrt(*words, "--dtype", "bfloat16").report
    ratio = wide["accounts"]["weights"] / narrow["accounts"]["weights"]
    assert ratio == pytest.approx(2, rel=0.01)  # the rotary table stays in fp32
    words[2] = model_folder(dtype="bfloat16")
    assert memrt(*words).report["accounts"] == narrow["accounts"]


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys\n"
        "from memrt.cli.main import main\n"
        "for words in (['plan', '--help'], ['compare', '--help'], ['profile', '--help']):\n"
        "    assert main(words) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "exit code" in done.stdout.lower()


def test_the_waterfall_says_what_every_strategy_saves(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ("plan", "--model", model_folder(), "--seq", 16, "--waterfall", "--json")
    found = memrt(*words, "--strategies", "int8_states", "activation_checkpoint")
    rows = found.report["waterfall"]
    assert [row["strategy"] for row in rows] == ["none", "int8_states", "activation_checkpoint"]
    assert rows[-1]["peak_bytes"] == found.report["peak_bytes"]
    alone = memrt("plan", "--model", model_folder(), "--seq", 16, "--json")
    assert rows[0]["peak_bytes"] == alone.report["peak_bytes"]
    assert alone.report["waterfall"] is None
    refused = memrt(*words)
    assert refused.code == 1
    assert "--waterfall has no effect without --strategies" in refused.error


def test_auto_chooses_a_stack_that_fits_and_says_why(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["plan", "--model", model_folder(), "--batch", "64", "--seq", "64"]
    alone = memrt(*words, "--json").report
    checkpointed = memrt(*words, "--json", "--strategies", "activation_checkpoint").report
    budget = (alone["device_bytes"]["high"] + checkpointed["device_bytes"]["high"]) // 2
    result = memrt(*words, "--auto", "--gpu", budget)
    assert result.code == 0, result.err
    assert "## The choice" in result.out
    assert "none: needs up to" in result.out
    assert "not predictions of time" in result.out
    report = memrt(*words, "--auto", "--gpu", budget, "--json", "--full-parameters").report
    assert report["fits"] is True
    assert report["auto"]["rung"] == "full fine-tuning"
    assert report["stack"] == "+".join(report["auto"]["strategies"]) != "none"
    assert report["flops"] >= alone["flops"] > 0
    named = memrt(*words, "--strategies", *report["auto"]["strategies"], "--json").report
    assert named["peak_bytes"] == report["peak_bytes"]
    assert named["auto"] is named["advice"] is None


def test_auto_says_what_to_change_where_nothing_fits(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["plan", "--model", model_folder(), *SHAPES, "--auto", "--gpu", "100KiB"]
    result = memrt(*words, "--full-parameters")
    assert result.code == 2
    assert "Nothing fits" in result.out
    assert "## What to change" in result.out
    assert "larger card: t4" in result.out


def test_a_plan_that_does_not_fit_says_what_to_change(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["plan", "--model", model_folder(), "--batch", "64", "--seq", "64"]
    alone = memrt(*words, "--json").report
    budget = alone["device_bytes"]["high"] - 2**20
    result = memrt(*words, "--gpu", budget)
    assert result.code == 2
    assert "The largest accounts at the peak: " in result.out
    assert "add activation_checkpoint, fused_loss" in result.out
    silent = memrt(*words, "--gpu", budget, "--no-advice", "--json")
    assert silent.code == 2
    assert silent.report["advice"] is None
    assert silent.report["peak_bytes"] == alone["peak_bytes"]


def test_a_ladder_is_told_of_its_own_smaller_settings(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["plan", "--model", model_folder(), "--batch", "64", "--seq", "64", "--strategies"]
    alone = "ladder(reduction=2)"
    again, pooled = (
        f"ladder(reduction=2{taps}, checkpoint=True)" for taps in ("", ", taps='pooled'")
    )
    bytes_of = {
        stack: memrt(*words, stack, "--json").report["device_bytes"]["high"]
        for stack in (alone, again, pooled)
    }
    assert bytes_of[pooled] < bytes_of[again] < bytes_of[alone]
    found = memrt(*words, alone, "--gpu", bytes_of[again], "--json").report["advice"]
    assert [remedy["fits"] for remedy in found if remedy["device_bytes"]] == [True]
    assert found[0]["change"].startswith(f"{again} instead of {alone} (the same numbers; ")
    assert found[0]["device_bytes"] == bytes_of[again]
    text = memrt(*words, alone, "--gpu", bytes_of[pooled]).out
    assert "keep nothing" in text


def test_the_host_can_be_too_small(memrt: Command, model_folder: Callable[..., Path]) -> None:
    words = ["plan", "--model", model_folder(), *SHAPES, "--strategies", "offload_activations"]
    fits = memrt(*words, "--host", "64GiB")
    assert fits.code == 0
    assert "It fits 64GiB of host memory" in fits.out
    too_small = memrt(*words, "--host", "1MiB", "--gpu", "h100", "--no-advice", "--json")
    assert too_small.code == 2
    report = too_small.report
    assert report["fits"] is report["fits_host"] is False
    assert report["host_bytes"]["pinned"] >= report["host_bytes"]["counted"] > 2**20
    assert report["transfers"]["device to host"] >= report["host_bytes"]["counted"]


def test_the_page_tells_a_small_host_from_a_small_card(
    memrt: Command, model_folder: Callable[..., Path]
) -> None:
    words = ["plan", "--model", model_folder(num_hidden_layers=1), *SHAPES, "--output", "report"]
    pages = []
    for more in (["--host", "1KiB"], ["--host", "1KiB", "--gpu", "h100", "--force"]):
        found = memrt(*words, *more, "--strategies", "offload_activations", "--no-advice")
        assert found.code == 2, found.err
        pages.append(Path("report/report.html").read_text())
    for page in pages:
        assert "<dt>fits 1KiB of host memory</dt><dd>no</dd>" in page
    assert "fits h100" not in pages[0]
    assert "<dt>fits h100</dt><dd>yes</dd>" in pages[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--auto"], "--auto needs what it is to fit: add --gpu"),
        (["--auto", "--gpu", "1GiB", "--full"], "--full has no effect with --auto"),
        (["--full-parameters"], "--full-parameters has no effect without --auto"),
        (["--no-advice"], "--no-advice is for"),
        (["--host", "big"], "--host 'big' is no size; write 64GiB"),
    ],
)
def test_flags_without_effect_are_refused(memrt: Command, words: list[str], said: str) -> None:
    result = memrt("plan", *words)
    assert result.code == 1
    assert said in result.error
