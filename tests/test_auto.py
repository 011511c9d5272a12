"""The first stack that fits, with a sentence for every choice; and what to change where none."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memrt
from memrt import gpus
from memrt.advice import MAX_PLANS, Remedy, advise
from memrt.auto import Choice, choose
from memrt.auto_search import ASSUMED_BYTES_PER_SECOND, ASSUMED_FLOPS_PER_SECOND
from memrt.gpus import Gpu, Host, next_card
from memrt.planning import Plan, plan
from memrt.registry import parse_all
from memrt.structure import RunSettings
from memrt.testing import tiny_config

OVERHEAD = Gpu.required_bytes(0)["high"]
SHAPE: dict[str, Any] = {"batch_size": 4, "sequence_length": 64}


def _config(**overrides: Any) -> Any:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return LlamaConfig(
        **{**sizes, "num_hidden_layers": 2, "vocab_size": 1024, "use_cache": False, **overrides}
    )


def _high(*stack: str, **shape: int) -> int:
    return plan(_config(), stack, **{**SHAPE, **shape}).device_bytes["high"]


def _chosen(budget: int, *stack: str, **options: Any) -> Choice:
    return choose(_config(), stack, **{"budget": f"{budget}B", **SHAPE, **options})


def test_what_fits_as_it_is_stays_as_it_is() -> None:
    choice = memrt.choose(_config(), budget=str(_high()), **SHAPE)
    assert choice.fits
    assert choice.strategies == ()
    assert choice.plan.device_bytes["high"] == _high()
    assert [c.verdict for c in choice.candidates if c.stack == "none"] == ["chosen"]
    assert len(choice.plan.strategies) == 0


def test_the_cheapest_that_fits_is_taken_by_its_flops_and_transfers() -> None:
    # above what checkpointing with a fused loss needs, below everything that costs less
    needed = _high("activation_checkpoint", "fused_loss")
    budget = needed + 1
    choice = _chosen(budget)
    assert choice.fits
    assert choice.plan.device_bytes["high"] <= budget
    fitting = [c for c in choice.candidates if c.verdict in ("chosen", "costs more")]
    costs = {
        c.stack: (c.flops or 0) / ASSUMED_FLOPS_PER_SECOND
        + (c.transfer_bytes or 0) / ASSUMED_BYTES_PER_SECOND
        for c in fitting
    }
    assert min(costs, key=lambda stack: costs[stack]) == "+".join(choice.strategies)
    for candidate in choice.candidates:  # cheaper ones were planned and are too large
        if candidate.stack in ("none", "fused_loss"):
            assert candidate.verdict == "too large"
            assert "over" in candidate.sentence
    assert all(c.sentence for c in choice.candidates)
    assert len(choice.reasons) == len(choice.strategies) > 0
    assert "not predictions of time" in choice.explain()


def test_smaller_state_comes_after_ways_of_keeping_activations() -> None:
    least = _high("activation_checkpoint", "fused_loss", "offload_activations")
    with_state = _high("int8_states", "activation_checkpoint", "fused_loss", "offload_activations")
    tight = OVERHEAD + int((with_state - OVERHEAD) * 1.02)
    assert tight < least
    choice = _chosen(tight)
    assert choice.fits
    assert "int8_states" in choice.strategies
    assert choice.rung == "full fine-tuning, 8-bit optimizer state"
    assert "keeps full fine-tuning; optimizer state in 8 bits" in choice.explain()
    assert not {"lisa", "peft", "galore"} & {s.split("(")[0] for s in choice.strategies}


def test_what_is_offloaded_and_not_computed_again_may_keep_least(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer that is computed again is on the device as a whole."""
    for constants in (gpus._CONTEXT_BYTES, gpus._CUBLAS_BYTES):
        for bound in constants:
            monkeypatch.setitem(constants, bound, 0)
    config, shape = tiny_config("llama", layers=2), {"batch_size": 2, "sequence_length": 64}
    named = ["int8_states", "in_backward(clip='two_pass')"]
    offloaded = [*named, "fused_loss", "offload_activations"]
    least, both = (
        plan(config, stack, **shape).device_bytes["high"]
        for stack in (offloaded, [*offloaded, "activation_checkpoint"])
    )
    assert both > 1.1 * least
    choice = choose(config, named, budget=f"{least}B", **shape)
    assert choice.fits
    assert set(choice.strategies) == set(map(str, parse_all(offloaded)))
    tight = choose(config, named, budget=f"{least // 2}B", full_parameters=True, **shape)
    assert not tight.fits
    assert set(tight.strategies) == set(choice.strategies)
    planned = [c for c in tight.candidates if c.rung == choice.rung and c.device_bytes]
    assert sorted(c.device_bytes or 0 for c in planned) == [least, both]
    assert f"taken to need more than {'+'.join(choice.strategies)}" in tight.explain()


def test_what_was_named_stays_and_nothing_collides_with_it() -> None:
    choice = _chosen(1024, "fp8_states", "lisa(layers=1)", full_parameters=True)
    assert not choice.fits
    assert {"fp8_states", "lisa(layers=1)"} <= set(choice.strategies)
    assert "fp8_states: you named it" in choice.reasons
    for candidate in choice.candidates:
        assert "fp8_states" in candidate.stack
        assert "int8_states" not in candidate.stack


def test_what_trains_a_network_of_its_own_is_not_called_full_fine_tuning() -> None:
    choice = _chosen(1024, "ladder(reduction=4)")
    assert not choice.fits
    assert "full fine-tuning" not in choice.explain()
    titles = {candidate.rung for candidate in choice.candidates}
    assert {"what you named", "what you named, 8-bit optimizer state"} <= titles


def test_full_parameters_forbids_what_changes_what_is_trained() -> None:
    choice = _chosen(1024, full_parameters=True, dtype=torch.bfloat16)
    assert not choice.fits
    assert not {"peft", "nf4", "ladder", "badam"} & {s.split("(")[0] for s in choice.strategies}
    left_out = [c for c in choice.candidates if "full_parameters=True" in c.sentence]
    assert {"nf4+peft", "nf4+ladder"} <= {c.stack for c in left_out}
    # what to change: both what it forbids, with its number, and a card
    assert any("full_parameters=False" in r.change and r.device_bytes for r in choice.remedies)
    assert any("larger card: t4" in r.change for r in choice.remedies)
    assert choice.to_json()["fits"] is False
    # what the weights alone show is not planned: weights and gradients in bf16, tied nowhere
    parameters = 2 * 1024 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    held = next(c for c in choice.candidates if c.stack == "none")
    assert held.sentence.endswith(f"take {2 * 2 * parameters / 2**10:.1f} KiB")


def test_a_smaller_batch_is_advised_where_it_fits() -> None:
    stack = ("fused_loss(chunk_tokens=16)", "activation_checkpoint")
    budget = _high(*stack, batch_size=8)
    assert budget < _high(*stack, batch_size=16)
    planned = plan(_config(), stack, gpu=str(budget), **{**SHAPE, "batch_size": 16})
    assert planned.fits is False
    plans: list[Plan] = []

    def plan_of(strategies: Any, **changed: int) -> Plan:
        options = {**SHAPE, "batch_size": 16, **changed}
        plans.append(plan(_config(), strategies, gpu=str(budget), **options))
        return plans[-1]

    options = {"hidden_size": 64, "max_grad_norm": 1.0, "shapes_are_free": True}
    found = advise(planned, parse_all(stack), plan_of, **options)
    assert len(plans) <= MAX_PLANS
    batch = [r for r in found if r.change == "a batch of 8 instead of 16"]
    assert [r.fits for r in batch] == [True]
    assert batch[0].device_bytes == budget
    added = [r for r in found if r.change.startswith("add ")]
    assert added
    assert added[-1].fits is (
        added[-1].device_bytes is not None and added[-1].device_bytes <= budget
    )


def _advice(stack: tuple[str, ...], *, over_bytes: int) -> list[Remedy]:
    """What is advised where a stack is so much over the budget; a batch of one short sequence."""
    config = tiny_config("llama", hidden=256, intermediate_size=512)
    options: dict[str, Any] = {"batch_size": 1, "sequence_length": 32, "dtype": torch.bfloat16}
    budget = plan(config, stack, **options).device_bytes["high"] - over_bytes

    def plan_of(strategies: Any, **changed: int) -> Plan:
        return plan(config, strategies, gpu=str(budget), **{**options, **changed})

    strategies = parse_all(stack)
    return advise(
        plan_of(strategies),
        strategies,
        plan_of,
        hidden_size=256,
        max_grad_norm=1.0,
        shapes_are_free=True,
    )


def test_what_conflicts_is_left_out_of_the_advice_and_the_rest_is_added() -> None:
    """A ladder owns the recomputation of the layers, so that none can be checkpointed beside it."""
    least = "ladder(reduction=2, taps='pooled', checkpoint=True)"
    found = _advice(("nf4", least, "fused_loss"), over_bytes=2**19)
    added = [remedy for remedy in found if remedy.change.startswith("add ")]
    sentence = "add int8_states (int8_states: optimizer state in 8 bits instead of fp32 or bf16)"
    assert [(remedy.change, remedy.fits) for remedy in added] == [(sentence, True)]


def test_the_advice_keeps_what_trains() -> None:
    """No adapters and no low-rank updates beside a side network, and nothing is proposed twice."""
    found = _advice(("ladder(reduction=2)",), over_bytes=2**26)
    added = [remedy.change.partition(" (")[0] for remedy in found if "add " in remedy.change]
    assert added == ["add fused_loss", "add int8_states, fused_loss", "add nf4, fused_loss"]
    assert "taps='pooled', checkpoint=True) instead of" in found[0].change  # what keeps least
    assert not any("float8" in remedy.change for remedy in found)
    assert not any("full fine-tuning" in remedy.change for remedy in found)


def test_another_format_of_the_states_stays_and_others_are_added() -> None:
    found = _advice(("fp8_states",), over_bytes=2**26)
    changes = [remedy.change for remedy in found]
    assert len(changes) == len(set(changes))
    assert not any("int8_states" in change for change in changes)
    assert any(change.startswith("add galore(rank=16), activation_check") for change in changes)


def test_the_host_can_be_what_does_not_fit() -> None:
    stack = ["activation_checkpoint", "offload_activations(min_bytes=0)"]
    options = {**SHAPE, "gpu": "80GiB"}
    found = plan(_config(), stack, host="1GiB", **options)
    assert found.fits is found.fits_host is True
    pinned = found.host_bytes["pinned"]
    # layer inputs are 64 KiB each, a power of two; two layers
    assert pinned >= found.host_bytes["counted"] >= 2 * 4 * 64 * 64 * 4
    assert plan(_config(), stack, host=f"{pinned}B", **options).fits is True
    small = plan(_config(), stack, host=f"{pinned - 1}B", **options)
    assert small.fits is small.fits_host is False
    assert small.to_json()["host"]["total_bytes"] == pinned - 1
    assert plan(_config(), stack, host="1KiB", **SHAPE).fits is False
    on_disk = plan(_config(), ["offload_activations(min_bytes=0, place='disk')"], **SHAPE)
    assert on_disk.disk_bytes > 0
    assert on_disk.host_bytes == {"counted": 0, "pinned": 0}


def test_a_function_is_chosen_for_with_its_window() -> None:
    from memrt.testing import tiny_batches, tiny_model

    window = tiny_batches("plain", count=1)
    choice = choose(lambda: tiny_model("plain"), budget="1KiB", window=window)
    assert not choice.fits
    assert not any("batch" in remedy.change for remedy in choice.remedies)
    assert any(c.verdict == "refused" for c in choice.candidates)  # it has no head to fuse


def test_bad_budgets_are_refused_before_anything_is_planned() -> None:
    with pytest.raises(ValueError, match=r"^budget='much' is neither .* 24GiB"):
        choose(_config(), budget="much", on_plan=lambda stack: pytest.fail(stack))
    with pytest.raises(ValueError, match=r"^budget=24: must be text, such as '24GiB'"):
        choose(_config(), budget=24)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="64GiB"):
        Host.parse("big")
    with pytest.raises(ValueError, match="batch_size"):
        choose(_config(), budget="24GiB", batch_size=0)


def test_the_next_card_is_the_smallest_that_holds_it() -> None:
    assert next_card(20 * 2**30) == "a10"
    assert next_card(Gpu.parse("h200").total_bytes) == "h200"
    assert next_card(Gpu.parse("h200").total_bytes + 1) is None


@pytest.mark.parametrize(
    ("told", "refused"),
    [
        (RunSettings(gradient_checkpointing=True), "activation_checkpoint"),
        (RunSettings(label_smoothing=0.1), "fused_loss"),
        (RunSettings(custom_loss=True), "fused_loss"),
    ],
)
def test_what_a_trainer_s_settings_refuse_is_not_chosen(told: RunSettings, refused: str) -> None:
    choice = _chosen(_high() - 1, settings=told)
    assert choice.fits
    assert refused not in choice.strategies
    candidates = [each for each in choice.candidates if refused in each.stack.split("+")]
    assert {each.verdict for each in candidates} == {"refused"}


def test_several_micro_batches_of_a_window_count_as_accumulation() -> None:
    """Updates in backward are no rung then: every gradient lives until the last of them."""
    batch = {"input_ids": torch.ones(4, 64, dtype=torch.int64)}
    batch["labels"] = batch["input_ids"]
    choice = choose(_config(), budget="1KiB", window=[batch, batch], **SHAPE)
    assert not any("in_backward" in each.stack for each in choice.candidates)
