"""The matrix says what the check before a run says, pair by pair, and its page is its output."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import combinations
from typing import ClassVar

import pytest

from benchmarks import generated_pages
from memrt import registry
from memrt.cli.main import main
from memrt.compatibility import (
    KINDS,
    Compatibility,
    Verdict,
    buildable,
    facts_of_kinds,
    survey,
    verdict_of,
)
from memrt.compatibility_sections import matrix_sections
from memrt.compose import conflicts
from memrt.profiling.fake import fake_tensors
from memrt.profiling.render import sections_to_markdown
from memrt.session import Session
from memrt.strategy import Claim, Slot, Strategy
from memrt.structure import Facts, RunSettings, discover
from memrt.testing import tiny_model
from tests.contract import SPECS

FAMILIES = {"llama": "decoder", "gpt2": "fused decoder", "bert": "encoder", "plain": "plain"}
"""A family of the pairs test -> the kind of model that stands for it on the page."""


@pytest.fixture(scope="module")
def facts() -> dict[str, Facts]:
    return facts_of_kinds()


@pytest.fixture(scope="module")
def matrix(facts: dict[str, Facts]) -> Compatibility:
    strategies, unbuilt = buildable(generated_pages.built_in())
    return survey(strategies, facts, unbuilt=unbuilt)


def test_every_cell_agrees_with_the_pairs_test(matrix: Compatibility) -> None:
    """`tests/test_stacks.py` trains exactly the pairs that the matrix calls possible."""
    for family, kind in FAMILIES.items():
        with fake_tensors():
            model = tiny_model(family)
        tiny = {
            kind: Facts(model=model, structure=discover(model), settings=RunSettings()),
        }
        specs = {s.name: registry.parse(SPECS[s.name]) for s in matrix.strategies}
        for one, other in combinations(specs, 2):
            trains = verdict_of([specs[one], specs[other]], tiny).text == "yes"
            asked = matrix.pair(one, other).reasons
            shown = kind in asked and not asked[kind]
            assert shown == trains, f"{one} + {other} on {family}"


def test_the_matrix_has_every_strategy_and_pair(matrix: Compatibility) -> None:
    names = [strategy.name for strategy in matrix.strategies]
    assert {*names, *matrix.unbuilt} == set(generated_pages.built_in())
    assert len(matrix.pairs) == len(names) * (len(names) - 1) // 2
    assert matrix.pair("lisa", "badam") is matrix.pair("badam", "lisa")
    assert matrix.pair("lisa", "badam").text == "no"
    assert matrix.settings[("lisa", "fsdp")].text == "no"
    assert json.loads(json.dumps(matrix.to_json()))["schema"] == "memrt.compatibility/1"


def test_who_builds_on_memrts_optimizer_is_refused_where_parameters_are_split() -> None:
    """FSDP and DeepSpeed exchange the parameters that the optimizer was given; DDP does not."""
    words, bringing = "needs that parameters stay whole tensors, which {} breaks", set()
    for name, spec in SPECS.items():
        strategy, model = registry.parse(spec), tiny_model("llama")
        facts = Facts(model=model, structure=discover(model), settings=RunSettings())
        if conflicts([strategy], facts):
            continue  # it changes nothing but beside another
        refused = {
            sharded: "\n".join(
                conflicts([strategy], replace(facts, settings=RunSettings(sharded=sharded)))
            )
            for sharded in ("fsdp", "deepspeed", "distributed data parallel")
        }
        session = Session(model, [strategy])
        if session.rules():
            bringing.add(name)
        session.detach()
        for sharded in ("fsdp", "deepspeed"):
            assert (words.format(sharded) in refused[sharded]) is (name in bringing), name
        assert "whole" not in refused["distributed data parallel"], name
    assert {"int8_states", "fp8_states", "int4_states", "apollo", "fira", "galore"} <= bringing


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnDecoders(Strategy):
    name: ClassVar[str] = "one"

    def claims(self, facts: Facts) -> list[Claim]:
        return [Claim(slot=Slot.HEAD)] if facts.structure.head == "lm_head" else []


@dataclass(frozen=True, slots=True, kw_only=True)
class _Everywhere(_OnDecoders):
    name: ClassVar[str] = "other"

    def check(self, facts: Facts) -> None:
        if facts.structure.model_type == "vit":
            raise ValueError("no | images")

    def claims(self, facts: Facts) -> list[Claim]:
        return [Claim(slot=Slot.HEAD)]


def test_a_pair_that_only_some_models_refuse(facts: dict[str, Facts]) -> None:
    found = survey([_OnDecoders(), _Everywhere()], facts, unbuilt={"third": "needs a file"})
    pair = found.pair("other", "one")
    assert pair.text == "some"
    assert "images" not in pair.reasons  # refused alone: that is not the pair's doing
    assert "decoder" not in pair.runs_on
    assert "plain" in pair.runs_on
    text = sections_to_markdown(matrix_sections(found))
    assert "| 1 one    |   | ± |" in text
    assert "other: no | images. On: images." in text
    assert "- third: needs a file" in text


def test_reasons_that_differ_by_names_alone_are_one() -> None:
    verdict = Verdict(
        reasons={"a": ("both own x.0.y and 7 more",), "b": ("both own z.1 and 31 more",), "c": ()}
    )
    assert verdict.grouped() == [("both own x.0.y and 7 more", ["a", "b"])]
    assert Verdict(reasons={}).text == "none"


def test_the_command_prints_the_page(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = generated_pages.built_in()  # other tests may have registered theirs
    monkeypatch.setattr(registry, "names", lambda: names)
    assert main(["compat"]) == 0
    assert generated_pages.compatibility_page().endswith(capsys.readouterr().out)
    assert not caplog.records  # advice is for runs


def test_a_stack_is_told_in_order_and_by_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compat", "fused_loss", "int8_states+lisa"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# lisa + int8_states + fused_loss\n")
    assert "- on images: fused_loss: ViTForImageClassification has no language-model" in shown
    assert main(["compat", "lisa", "badam", "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["verdict"] == "no"
    assert set(report["reasons"]) == set(KINDS)
    assert "both own the active set" in report["reasons"]["decoder"][0]


def test_the_json_of_a_stack_has_the_order_that_the_text_has(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compat", "fused_loss", "galore+lisa"]) == 0
    _, _, text = capsys.readouterr().out.partition("## In this order (on a ")
    assert main(["compat", "fused_loss", "galore+lisa", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert text.startswith(f"{report['kind']} model)")
    lines = []
    for each in report["order"]:
        owned = ", ".join(f"{claim['slot']} of " + _scope(claim["scope"]) for claim in each["owns"])
        lines.append(f"- {each['phase']}: {each['strategy']}: owns {owned or 'nothing'}")
        lines += [f"  - breaks: {promise}" for promise in each["breaks"]]
    assert len(report["order"]) == 3 < len(lines)
    assert "\n".join(lines) in text


def _scope(names: list[str]) -> str:
    if names == ["*"]:
        return "every parameter and module"
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def test_one_strategy_beside_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compat", "galore(norm='exact')"]) == 0
    shown = capsys.readouterr().out
    assert "norm='exact' cannot be had over several micro-batches" in shown
    assert main(["compat", "lisa", "--json"]) == 0
    pairs = json.loads(capsys.readouterr().out)["pairs"]
    assert all("lisa" in pair["strategies"] for pair in pairs)
    assert main(["compat", "lizard"]) == 1
    assert "did you mean 'lisa'" in capsys.readouterr().err
