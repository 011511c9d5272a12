"""The table of losses, from a record alone."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.methods import METHODS
from benchmarks.quality.table import markdown


def row_of(method: str, loss: float, above: float | None) -> dict[str, Any]:
    return {
        "task": "gsm8k",
        "method": method,
        "evaluation_loss": loss,
        "above_adamw": above,
        "learning_rate": 1e-3,
        "proxy_losses": {"0.0003": 5.25, "0.001": 4.125, "0.003": None},
        "peak_bytes": 3 << 20,
        "account_maxima": {"weights": 2 << 20, "activations": 1 << 20},
        "tokens_per_second": 1234.5,
        "of_adamws_speed": 0.875,
    }


def test_every_task_has_a_table_that_says_what_is_missing() -> None:
    record = {
        "conditions": {"configuration": {"steps": 150, "proxy_steps": 40}},
        "summary": {
            "base_evaluation_loss": {"gsm8k": 8.5, "wikitext2": 4.75},
            "rows": [row_of("adamw", 4.0, 0.0), row_of("galore", 4.25, 0.25)],
        },
    }
    first, second = markdown(record).split("**wikitext2**")
    assert "150 steps after 40" in first
    assert "the base's own loss is 8.500" in first
    cells = [line.split(" | ") for line in first.splitlines() if line.startswith("| galore")]
    assert cells == [
        [
            *("| galore", "4.250", "+0.250", "0.001 (0.0003: 5.250, 0.001: 4.125, 0.003: none)"),
            *("3", "2", "0", "0", "1", "0", "1,234 (0.88) |"),
        ]
    ]
    assert "Not in this result: int8_states;" in first
    assert "4.750" in second
    assert second.strip().endswith(f"{list(METHODS)[-1]}.")
