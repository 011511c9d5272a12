"""Strategies by name, string, JSON and entry point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from memrt import registry
from memrt.strategies.lisa import Lisa
from memrt.strategy import Strategy


@pytest.mark.parametrize("name", registry.names())
def test_settings_survive_json_and_print_back_to_themselves(name: str) -> None:
    strategy = registry.parse(name)
    assert registry.from_json(strategy.to_json()) == strategy
    assert registry.parse(str(strategy)) == strategy


@pytest.mark.parametrize("name", registry.names())
def test_settings_are_frozen_slotted_and_documented(name: str) -> None:
    strategy = registry.parse(name)
    assert "__dict__" not in dir(strategy)
    with pytest.raises((AttributeError, TypeError)):
        strategy.phase = None  # type: ignore[misc,assignment]
    assert strategy.lowers, "a strategy says which account it lowers"
    assert (type(strategy).__doc__ or "").strip()


def test_parse_reads_options() -> None:
    assert registry.parse("lisa(layers=3, every=5, parked='host')") == Lisa(
        layers=3, every=5, parked="host"
    )
    assert registry.from_json({"lisa": {"layers": 3}}) == Lisa(layers=3)
    assert registry.from_json({"lisa": None}) == Lisa()
    assert str(Lisa(layers=3)) == "lisa(layers=3)"
    assert str(Lisa()) == "lisa"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lisaa", ["unknown strategy 'lisaa'", "did you mean 'lisa'"]),
        ("lisa(layer=3)", ["no option 'layer'", "did you mean 'layers'"]),
        ("lisa(3)", ["options need names"]),
        ("lisa(layers=foo)", ["'layers'", "plain value"]),
        ("lisa(layers=0)", ["layers=0", "1 or more"]),
        ("lisa(layers='2')", ["layers='2'"]),
        ("lisa(layers=True)", ["layers=True"]),
        ("lisa(", ["not of the form"]),
        ("__import__('os')", ["options need names"]),
        ("lisa(parked='moon')", ["parked='moon'", "host"]),
        ("activation_checkpoint(every=0)", ["every=0"]),
        ("activation_checkpoint(selective=['matmull'])", ["'matmull'", "did you mean 'matmul'"]),
        ("offload_activations(place='cloud')", ["place='cloud'", "host"]),
        ("fused_loss(chunk_tokens=0)", ["chunk_tokens=0"]),
    ],
)
def test_bad_specs_name_argument_value_and_remedy(spec: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        registry.parse(spec)
    for word in words:
        assert word in str(raised.value)


def test_a_stack_is_a_list_in_phase_order_without_repeats() -> None:
    stack = registry.parse_all(["fused_loss", "activation_checkpoint", "lisa"])
    assert [s.name for s in stack] == ["lisa", "activation_checkpoint", "fused_loss"]
    with pytest.raises(ValueError, match="listed twice"):
        registry.parse_all(["lisa", "lisa(layers=3)"])
    with pytest.raises(ValueError, match="must be a list"):
        registry.parse_all("lisa")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"galore": {"rank": 4}}, r"must be a list, got .*; write \[\{'galore': \{'rank': 4\}\}\]"),
        (registry.parse("lisa"), r"must be a list, got 'lisa'; write \['lisa'\]"),
        (None, "strategies=None: must be a list"),
        ([3], "strategy 3: must be text such as"),
        ([None], "strategy None: must be text such as"),
        ([{"galore": 64}], r"strategy \{'galore': 64\}: its options must be a mapping"),
        (["galore(rank=4, rank=5)"], "'rank' is given twice"),
        (["galore(rank=4)+int8_states"], "joins several with '\\+'.*an element of the list"),
    ],
    ids=str,
)
def test_what_is_no_list_of_strategies_is_refused(specs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.parse_all(specs)


def test_third_parties_register_by_decorator_and_entry_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Foreign(Strategy):
        """From another package."""

        name: ClassVar[str] = "foreign_for_test"
        strength: int = 1

    class EntryPoint:
        @staticmethod
        def load() -> type[Strategy]:
            return Foreign

    monkeypatch.setattr(registry, "_third_party", lambda: {"foreign_for_test": EntryPoint})
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    assert "foreign_for_test" in registry.names()
    assert registry.parse("foreign_for_test(strength=2)") == Foreign(strength=2)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Thief(Strategy):
        """Wants a name that is taken."""

        name: ClassVar[str] = "foreign_for_test"

    with pytest.raises(ValueError, match="is taken by"):
        registry.register(Thief)
