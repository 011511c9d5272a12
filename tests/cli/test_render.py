"""Tables from JSON: units, alignment, escaping, terminals of any width."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from memrt.profiling.allocator import reconcile
from memrt.profiling.render import Column, Table, print_report, to_markdown, unit_of
from memrt.profiling.render_sections import sections

MIB = 2**20
ACCOUNTS = ("weights", "gradients", "optimizer", "activations", "workspace")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def memory(scale: int = MIB) -> dict[str, Any]:
    accounts = {name: (index + 1) * scale for index, name in enumerate(ACCOUNTS)}
    peak = sum(accounts.values())
    return {
        "peak_bytes": peak,
        "accounts": accounts,
        "account_maxima": {name: 2 * value for name, value in accounts.items()},
        "places": {"device": peak, "host": 3 * scale, "disk": 0},
        "place_peaks": {"device": peak, "host": 4 * scale, "disk": 0},
        "owners": {"model": peak},
        "phases": {"load": scale, "forward": 2 * scale, "backward": peak, "step": scale},
        "region": {"step": 1, "phase": "backward", "module": "model.layers.0"},
        "top_allocations": [
            {
                "bytes": scale,
                "account": "weights",
                "owner": "model",
                "module": "a|b",
                "operator": "found",
            }
        ],
        "rounded_peak_bytes": peak,
        "device_bytes": {"low": peak, "expected": peak, "high": peak},
        "overheads": [],
        "gpu": None,
        "fits": None,
    }


def conditions() -> dict[str, Any]:
    return {
        "device": "cpu",
        "model": "tiny",
        "num_parameters": 1_500_000,
        "dtype": "float32",
        "batch_size": 4,
        "sequence_length": 256,
        "accumulation_steps": 2,
        "steps": 8,
        "ledger_steps": 2,
        "warm_up_steps": 1,
        "loss_steps": 3,
        "packages": {"torch": "2.13"},
        "strategies": [],
    }


def run(stack: str, scale: int = MIB) -> dict[str, Any]:
    return {
        **memory(scale),
        "stack": stack,
        "status": "ok",
        "reason": None,
        "tokens_per_second": 12345.6,
        "loss": 7.00049,
        "evaluation_loss": None,
    }


def comparison() -> dict[str, Any]:
    refused = {"stack": "bad", "status": "refused", "reason": "it | cannot"}
    runs = [run("none", 2 * MIB), run("activation_checkpoint+lisa(layers=1)"), refused]
    return {"kind": "compare", "gpu": None, "conditions": conditions(), "runs": runs}


def profile(monitor: dict[str, Any]) -> dict[str, Any]:
    return {
        **run("none"),
        "kind": "profile",
        "conditions": conditions(),
        "predicted": memory(),
        "monitor": monitor,
        "joules_per_token": 0.002,
        "kernel_scratch": None,
    }


def monitored(**values: Any) -> dict[str, Any]:
    phase = {
        "num_times": 1,
        "seconds": 1.0,
        "rss_peak_bytes": 900 * MIB,
        "device_used_peak_bytes": None,
        "process_used_peak_bytes": None,
        "allocated_peak_bytes": None,
        "reserved_peak_bytes": None,
    }
    return {
        "at_peak": None,
        "baseline": {"rss_bytes": 800 * MIB},
        "rss_peak_bytes": 999 * MIB,
        "process_peak_bytes": None,
        "phases": {"forward": phase, "counted": {**phase, "rss_peak_bytes": 999 * MIB}},
        "unavailable": {"nvml": "no driver", "allocator": "no CUDA"},
        "energy_source": "energy counter",
        **values,
    }


@pytest.mark.parametrize(
    ("num_bytes", "unit"),
    [(0, "KiB"), (10 * 2**20 - 1, "KiB"), (10 * 2**20, "MiB"), (10 * 2**30, "GiB")],
)
def test_one_unit_a_table(num_bytes: int, unit: str) -> None:
    assert unit_of([["name", num_bytes, None, 7.5]]) == unit


def test_cells() -> None:
    columns = [
        Column(title="a"),
        Column(title="b", kind="bytes"),
        Column(title="c", kind="count"),
        Column(title="d", kind="loss"),
    ]
    table = Table(columns=columns, rows=[["x", 1536, 1234.5, 7.0004], [None] * 4], unit="KiB")
    assert table.cells() == [["x", "1.5", "1,234", "7.000"], ["–"] * 4]


def test_the_markdown_of_a_comparison_is_one_valid_table_a_section() -> None:
    text = to_markdown(comparison())
    assert text.startswith("# memrt compare\n\ntiny, 1.5 M parameters, float32, 4 × 256 tokens × 2")
    tables = re.findall(r"(?:^\|.*\|\n?)+", text, flags=re.MULTILINE)
    assert len(tables) == 2
    for table in tables:
        lines = table.strip().splitlines()
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
        assert len({len(line) for line in lines}) == 1  # aligned
        assert len(lines) == 2 + 2  # heading, rule, two runs
    none, other = [line for line in text.splitlines() if line.startswith(("| none", "| act"))][:2]
    cells = [cell.strip() for cell in none.strip("|").split("|")]
    # accounts in this table are their own maxima: 2 x 2 MiB x 1 ... 5
    assert " ".join(cells) == "none 4.0 8.0 12.0 16.0 20.0 30.0 – 12,346 7.000 –"
    assert "-50 %" in other
    assert "- bad: refused: it | cannot" in text


def test_a_held_out_loss_that_is_not_finite_is_called_so() -> None:
    report = comparison()
    report["runs"][1]["not_finite"] = ["gradient_norms", "evaluation_loss"]
    rows = [
        line for line in to_markdown(report).splitlines() if line.startswith(("| none", "| act"))
    ]
    assert ["not finite" in row for row in rows[:2]] == [False, True]


def test_a_pipe_gets_plain_text_without_the_sections_for_the_file() -> None:
    stream = io.StringIO()
    print_report(comparison(), stream)
    assert "\x1b" not in stream.getvalue()
    assert "At the instant of the peak" not in stream.getvalue()
    assert "| none " in stream.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_terminal_gets_every_number_at_any_width(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    print_report(comparison(), stream)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    assert max(map(len, plain.splitlines())) <= width
    row = next(line for line in plain.splitlines() if line.startswith("none "))
    for number in ("4.0", "8.0", "12.0", "16.0", "20.0", "30.0", "12,346", "7.000"):
        assert number in row
    assert "…" not in plain
    assert ("optimizer state" in plain) == (width == 160)


def test_no_colour_where_the_user_wants_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    print_report(comparison(), stream)
    assert not re.search(r"\x1b\[3[0-9]m", stream.getvalue())


def lines_of(report: dict[str, Any], title: str) -> dict[str, int]:
    section = next(s for s in sections(report) if s.title.startswith(title))
    assert section.table is not None
    return {row[0]: row[1] for row in section.table.rows}


def test_the_lines_of_a_gpu_profile_sum_to_what_nvidia_smi_shows() -> None:
    split = reconcile(
        allocated_bytes=20 * MIB,
        reserved_bytes=32 * MIB,
        process_used_bytes=500 * MIB,
        device_used_bytes=600 * MIB,
    )
    report = profile(monitored(at_peak=split.to_json(), process_peak_bytes=500 * MIB))
    lines = lines_of(report, "Lines that sum to what nvidia-smi shows")
    shown = lines.pop("what nvidia-smi shows (device)")
    assert shown == 600 * MIB
    assert sum(lines.values()) == shown
    assert lines["rounding, kernel scratch"] == 20 * MIB - report["peak_bytes"]
    assert lines["other processes and driver"] == 100 * MIB


def test_contradicting_readings_still_sum() -> None:
    split = reconcile(
        allocated_bytes=20 * MIB,
        reserved_bytes=64 * MIB,
        process_used_bytes=50 * MIB,
        device_used_bytes=60 * MIB,
    )
    assert split.shortfall_bytes > 0
    lines = lines_of(profile(monitored(at_peak=split.to_json())), "Lines that sum to what nvidia")
    shown = lines.pop("what nvidia-smi shows (device)")
    assert sum(lines.values()) == shown == 60 * MIB


def test_without_the_driver_the_lines_of_a_gpu_profile_sum_to_what_torch_reserves() -> None:
    allocator = {"peak_allocated_bytes": 20 * MIB, "peak_reserved_bytes": 32 * MIB}
    report = profile(monitored(allocator=allocator))
    lines = lines_of(report, "Lines that sum to what torch reserves")
    shown = lines.pop("reserved by torch's allocator")
    assert sum(lines.values()) == shown == 32 * MIB
    assert lines["rounding, kernel scratch"] == 20 * MIB - report["peak_bytes"]
    text = to_markdown(report)
    assert "What nvidia-smi shows is not available: no driver." in text
    assert "before the model was loaded" not in text  # which is on the host


def test_the_lines_of_a_cpu_profile_sum_to_its_memory() -> None:
    lines = lines_of(profile(monitored()), "Lines that sum to this process")
    shown = lines.pop("largest resident set size (RSS)")
    assert shown == 900 * MIB  # of the steps without the ledger
    assert sum(lines.values()) == shown


def test_a_source_that_is_missing_says_why() -> None:
    text = to_markdown(profile(monitored()))
    assert "NVML: not available: no driver." in text
    assert "allocator: not available: no CUDA." in text
    assert "energy per token: 2.00 mJ (energy counter)" in text


def test_a_report_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind 'sonnet'"):
        to_markdown({"kind": "sonnet"})
