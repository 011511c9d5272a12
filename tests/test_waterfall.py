"""What every strategy of a stack saves."""

from __future__ import annotations

from memrt import registry
from memrt.planning import plan
from memrt.strategy import Strategy
from memrt.testing import tiny_config
from memrt.waterfall import waterfall

NAMES = ("activation_checkpoint", "int8_states", "fused_loss")
SAVINGS = {"int8_states": 30, "activation_checkpoint": 50, "fused_loss": 4}


def _peak(strategies: list[Strategy]) -> int:
    names = {strategy.name for strategy in strategies}
    saved = sum(SAVINGS[name] for name in names)
    # the smaller peak of the two hides what the other saves
    return 100 - (saved if names != {"activation_checkpoint", "int8_states"} else 60)


def test_rows_come_in_phase_order_with_both_numbers() -> None:
    rows = waterfall(registry.parse_all(NAMES), _peak)
    assert [row["strategy"] for row in rows] == [
        *("none", "int8_states", "activation_checkpoint", "fused_loss")
    ]
    assert [row["peak_bytes"] for row in rows] == [100, 70, 40, 16]
    assert [row["step_bytes"] for row in rows] == [None, 30, 30, 24]
    assert [row["saved_bytes"] for row in rows] == [None, 30, 50, 24]
    assert not any(row["reason"] for row in rows)


def test_no_stack_is_planned_twice() -> None:
    planned: list[str] = []

    def peak(strategies: list[Strategy]) -> int:
        planned.append("+".join(map(str, strategies)))
        return _peak(strategies)

    waterfall(registry.parse_all(NAMES), peak)
    assert len(planned) == len(set(planned)) == 6


def test_a_stack_that_cannot_run_says_why_and_the_others_keep_their_numbers() -> None:
    def peak(strategies: list[Strategy]) -> int:
        if {strategy.name for strategy in strategies} == {"int8_states"}:
            raise ValueError("needs\na partner")
        return _peak(strategies)

    rows = waterfall(registry.parse_all(NAMES), peak)
    assert rows[1]["peak_bytes"] is rows[1]["step_bytes"] is rows[2]["step_bytes"] is None
    assert rows[1]["reason"] == "needs a partner"
    assert rows[1]["saved_bytes"] == 30  # it can be left out of the whole
    assert rows[3]["step_bytes"] == 24


def test_the_numbers_are_those_of_plans() -> None:
    config = tiny_config("llama", layers=3)

    def peak(strategies: list[Strategy]) -> int:
        return plan(config, strategies, batch_size=2, sequence_length=16).peak_bytes

    rows = waterfall(registry.parse_all(["activation_checkpoint", "int8_states"]), peak)
    assert rows[0]["peak_bytes"] == peak([])
    assert rows[-1]["peak_bytes"] == peak(
        registry.parse_all(["int8_states", "activation_checkpoint"])
    )
    assert rows[-1]["saved_bytes"] == (
        peak(registry.parse_all(["int8_states"])) - rows[-1]["peak_bytes"]
    )
