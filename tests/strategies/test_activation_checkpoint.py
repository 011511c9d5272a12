"""Activation checkpointing: the same bits, fewer bytes, and only the FLOPs that it says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import memrt
from memrt.errors import ConflictError
from memrt.runner import model_loss
from memrt.testing import PlainModel
from tests.strategies.runs import (
    assert_equal,
    batch_of,
    counted,
    gradients,
    held_for_backward,
    model_of,
    one_pass,
)

CHECKPOINT = "activation_checkpoint"
SPECS = [
    CHECKPOINT,
    "activation_checkpoint(every=2)",
    "activation_checkpoint(selective=['matmul'])",
    "activation_checkpoint(selective=['attention'])",
    "activation_checkpoint(every=3, selective=['matmul', 'attention'])",
]
DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.1},
    "gpt2": {},  # 0.1 on embeddings, attention and residuals
    "bert": {},  # 0.1 on hidden states and attention
}
LENGTH = 32
TOKENS = 2 * LENGTH
INPUT_BYTES = TOKENS * 32 * 4
"""A layer's input: [tokens, hidden] in fp32."""


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("family", DROPOUT)
@pytest.mark.parametrize("spec", SPECS)
def test_losses_gradients_and_random_numbers_are_those_of_the_plain_run(
    family: str, spec: str
) -> None:
    model = model_of(family, **DROPOUT[family])
    batches = [batch_of(family, seed=seed) for seed in (0, 1)]
    plain = one_pass(model, [], batches)
    ours = one_pass(model, [spec], batches)
    assert ours.loss == plain.loss
    assert_equal(ours.gradients, plain.gradients)
    assert torch.equal(ours.rng_state, plain.rng_state)


@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_is_on_in_the_test_above(family: str) -> None:
    model = model_of(family, **DROPOUT[family])
    batches = [batch_of(family)]
    assert one_pass(model, [], batches).loss != one_pass(model, [], batches, seed=4).loss


@pytest.mark.parametrize("spec", SPECS[:3])
def test_autocast_is_replayed(spec: str) -> None:
    model = model_of("gpt2")
    batches = [batch_of("gpt2")]
    plain = one_pass(model, [], batches, autocast=True)
    ours = one_pass(model, [spec], batches, autocast=True)
    assert ours.loss == plain.loss
    assert_equal(ours.gradients, plain.gradients)
    assert plain.loss != one_pass(model, [], batches).loss  # autocast does something


def test_bf16_weights() -> None:
    model = model_of("llama", dtype=torch.bfloat16)
    plain, ours = (one_pass(model, s, [batch_of("llama")]) for s in ([], [CHECKPOINT]))
    assert_equal(ours.gradients, plain.gradients)


# ---------------------------------------------------------------- what is computed again


class _Operators(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def _flops(model: nn.Module, strategies: list[str]) -> int:
    with FlopCounterMode(display=False) as counter:
        one_pass(model, strategies, [batch_of("llama")])
    return int(counter.get_total_flops())


def _forward_flops_of_a_layer() -> int:
    """Of two models that differ by one layer, in the forward alone."""

    def forward(layers: int) -> int:
        model = model_of("llama", layers=layers)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model_loss(model, batch_of("llama"))
        return int(counter.get_total_flops())

    return forward(3) - forward(2)


@pytest.mark.parametrize(("every", "recomputed"), [(1, 4), (2, 2), (3, 2), (4, 1)])
def test_every_chosen_layer_is_computed_exactly_once_more(every: int, recomputed: int) -> None:
    """The last product of a layer is left out: recomputation stops where nothing more is saved."""
    model = model_of("llama")
    last_product = 2 * 2 * 16 * 64 * 32  # down projection of 2 × 16 tokens, 64 to 32
    extra = _flops(model, [f"activation_checkpoint(every={every})"]) - _flops(model, [])
    assert extra == recomputed * (_forward_flops_of_a_layer() - last_product)


def test_selective_computes_no_product_again() -> None:
    model = model_of("llama")
    spec = "activation_checkpoint(selective=['matmul', 'attention'])"
    assert _flops(model, [spec]) == _flops(model, [])


def _calls(strategies: list[str], **overrides: Any) -> Counter[str]:
    model = model_of("llama", **overrides)
    with _Operators() as operators:
        one_pass(model, strategies, [batch_of("llama")])
    return operators.calls


def test_selective_keeps_the_named_operators_and_no_others() -> None:
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    plain = _calls([])
    matmul = _calls(["activation_checkpoint(selective=['matmul'])"])
    kept_attention = _calls(["activation_checkpoint(selective=['attention'])"])
    assert plain[attention] == 4
    assert plain["aten::mm"] > 0
    assert matmul["aten::mm"] == plain["aten::mm"]
    assert matmul[attention] == 8
    assert kept_attention[attention] == 4
    assert kept_attention["aten::mm"] > plain["aten::mm"]


def test_selective_keeps_the_batched_products_of_eager_attention() -> None:
    plain = _calls([], attn_implementation="eager")
    matmul = _calls(["activation_checkpoint(selective=['matmul'])"], attn_implementation="eager")
    assert plain["aten::bmm"] > 0
    assert matmul["aten::bmm"] == plain["aten::bmm"]
    assert matmul["aten::mm"] == plain["aten::mm"]


# ---------------------------------------------------------------- bytes


def _held_bytes(strategies: list[str], *, layers: int) -> int:
    model = model_of("llama", layers=layers)
    batch = batch_of("llama", length=LENGTH)
    return sum(record.num_bytes for record in held_for_backward(model, strategies, batch))


def _most_activations(strategies: list[str], *, layers: int) -> int:
    model = model_of("llama", layers=layers)
    timeline = counted(model, strategies, [batch_of("llama", length=LENGTH)])
    return timeline.account_maxima()["activations"]


def test_a_layer_more_keeps_one_layer_input_more() -> None:
    for measure in (_held_bytes, _most_activations):
        assert measure([CHECKPOINT], layers=5) - measure([CHECKPOINT], layers=4) == INPUT_BYTES


def test_the_most_is_the_inputs_what_lies_outside_and_one_layer() -> None:
    per_layer = _held_bytes([], layers=5) - _held_bytes([], layers=4)
    outside = _held_bytes([], layers=4) - 4 * per_layer
    masks = TOKENS * LENGTH + TOKENS * 4  # arguments of the layers: a mask of bytes, positions
    most = _most_activations([CHECKPOINT], layers=4)
    assert most <= outside + masks + 4 * INPUT_BYTES + per_layer
    assert most < _most_activations([], layers=4) / 3


def test_every_second_layer_keeps_half_of_the_layers_whole() -> None:
    per_layer = _held_bytes([], layers=5) - _held_bytes([], layers=4)
    half = "activation_checkpoint(every=2)"
    assert _held_bytes([half], layers=6) - _held_bytes([half], layers=4) == per_layer + INPUT_BYTES


def test_selective_keeps_what_the_operators_give_and_no_more() -> None:
    """A Llama layer, hidden 32, two of four heads for keys, MLP 64: products and layer input."""
    products = TOKENS * 4 * (32 + 16 + 16 + 32 + 64 + 64 + 32)  # q k v o gate up down
    spec = "activation_checkpoint(selective=['matmul'])"
    per_layer = _held_bytes([spec], layers=5) - _held_bytes([spec], layers=4)
    assert per_layer == products + INPUT_BYTES
    full = _held_bytes([CHECKPOINT], layers=5)
    assert full < _held_bytes([spec], layers=5) < _held_bytes([], layers=5)


def test_nothing_is_kept_of_frozen_first_layers() -> None:
    model = model_of("llama")
    for name, parameter in model.named_parameters():
        frozen = ("embed_tokens", "layers.0.", "layers.1.")
        parameter.requires_grad_(not any(part in name for part in frozen))
    batch = batch_of("llama", length=LENGTH)
    held = held_for_backward(model, [CHECKPOINT], batch)
    inputs = [r for r in held if r.num_bytes == INPUT_BYTES and "layers" in r.module]
    # the input of layer 2 was made by layer 1, that of layer 3 by 2, the final norm's by 3
    assert sorted({r.module.split(".")[2] for r in inputs}) == ["1", "2", "3"]
    assert not [r for r in held if "layers.0" in r.module]
    plain, ours = (one_pass(model, s, [batch]) for s in ([], [CHECKPOINT]))
    assert_equal(ours.gradients, plain.gradients)
    assert not any("layers.0." in name for name in ours.gradients)


# ---------------------------------------------------------------- arguments of layers


class _Cache:
    """Looks like a key-value cache."""

    def __init__(self) -> None:
        self.updates = 0

    def update(self) -> None:
        self.updates += 1

    def get_seq_length(self) -> int:
        return self.updates


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        pair: tuple[Tensor, float],
        *,
        scale: Tensor,
        past_key_values: _Cache | None = None,
        flag: bool = False,
    ) -> tuple[Tensor, int]:
        if past_key_values is not None:
            past_key_values.update()
        hidden = torch.tanh(self.linear(hidden) * scale) * mask + pair[0] * pair[1]
        return hidden, 7 if flag else 0


class _WithArguments(nn.Module):
    """Layers with positional and keyword tensors, a tuple with a tensor, a cache and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(3))
        self.scale = nn.Parameter(torch.rand(8))
        self.shift = nn.Parameter(torch.rand(8))
        self.cache = _Cache()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mask = (x > -0.5).float()
        scale, shift = self.scale.exp(), self.shift * 2
        for layer in self.layers:
            x, seven = layer(
                x, mask, (shift, 0.5), scale=scale, past_key_values=self.cache, flag=True
            )
            assert seven == 7
        return {"loss": x.square().mean()}


def test_layers_get_every_argument_as_it_was_given_but_no_cache() -> None:
    torch.manual_seed(0)
    model = _WithArguments().train()
    batch = {"x": torch.randn(4, 8)}
    plain = one_pass(model, [], [batch])
    updates, model.cache.updates = model.cache.updates, 0
    ours = one_pass(model, [CHECKPOINT], [batch])
    assert ours.loss == plain.loss
    assert_equal(ours.gradients, plain.gradients)
    assert {"scale", "shift"} < ours.gradients.keys()
    assert updates == 3
    assert model.cache.updates == 0  # neither in forward nor again in backward


def test_a_cache_of_transformers_stays_empty_in_training() -> None:
    model = model_of("llama")
    batch = batch_of("llama")
    model(**batch, use_cache=True).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    run = memrt.prepare(model, [CHECKPOINT])
    with run.micro_batch():
        output = model(**batch, use_cache=True)
        run.backward(output.loss)
    assert_equal(gradients(model), plain)
    assert output.past_key_values.get_seq_length() == 0


@pytest.mark.parametrize("spec", [CHECKPOINT, "activation_checkpoint(every=2)"])
def test_a_cache_that_holds_something_is_refused(spec: str) -> None:
    """As prefix tuning hands it in; one that layers fill that are not checkpointed is none."""
    model, batch = model_of("llama", layers=3), batch_of("llama", batch=2)
    run = memrt.prepare(model, [spec])
    run.train_micro_batch(lambda: model(**batch, use_cache=True).loss)
    run.step()
    cache = transformers.DynamicCache()
    for layer in range(3):
        cache.update(*torch.randn(2, 2, 4, 3, 8), layer)
    with pytest.raises(ValueError, match=r"this one holds 3 positions before the batch"):
        run.train_micro_batch(lambda: model(**batch, past_key_values=cache).loss)


# ---------------------------------------------------------------- otherwise the model is as ever


def test_evaluation_is_not_checkpointed() -> None:
    """With gradients on, too: bits, FLOPs and the cache are those of the plain model."""
    batch = batch_of("llama")

    def evaluate(strategies: list[str]) -> tuple[int, dict[str, Tensor], int]:
        model = model_of("llama").eval()
        memrt.prepare(model, strategies)
        with FlopCounterMode(display=False) as counter:
            output = model(**batch, use_cache=True)
            output.loss.backward()
        length = output.past_key_values.get_seq_length()
        return int(counter.get_total_flops()), gradients(model), length

    plain, ours = evaluate([]), evaluate([CHECKPOINT])
    assert ours[0] == plain[0]
    assert_equal(ours[1], plain[1])
    assert ours[2] == plain[2] == 16


def test_training_mode_without_gradients_computes_nothing_twice() -> None:
    model = model_of("gpt2")
    torch.manual_seed(5)
    with torch.no_grad():
        plain = model_loss(model, batch_of("gpt2"))
    memrt.prepare(model, [CHECKPOINT])
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(model_loss(model, batch_of("gpt2")), plain)


# ---------------------------------------------------------------- refusals


def test_more_than_the_layers_is_refused() -> None:
    with pytest.raises(ConflictError, match=r"every=5 is more than the model has layers"):
        memrt.prepare(model_of("llama"), ["activation_checkpoint(every=5)"])


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConflictError, match="Linear has no list of repeated layers"):
        memrt.prepare(nn.Linear(4, 4), [CHECKPOINT])


def test_a_layer_whose_forward_was_replaced_is_refused() -> None:
    """The class's forward would never run, and nothing would be checkpointed."""
    model = PlainModel()
    layer = model.layers[2]
    layer.forward = layer.forward  # type: ignore[method-assign]
    with pytest.raises(ConflictError, match=r"forward of layers\.2 was replaced on this instance"):
        memrt.prepare(model, [CHECKPOINT])
    memrt.prepare(model, ["activation_checkpoint(every=4)"])  # takes layer 0 alone


def test_keeping_attention_that_no_operator_computes_is_refused() -> None:
    model = model_of("llama", attn_implementation="eager")
    with pytest.raises(ConflictError, match=r"computes attention by 'eager'.*attn_implementation"):
        memrt.prepare(model, ["activation_checkpoint(selective=['attention'])"])
    memrt.prepare(model, ["activation_checkpoint(selective=['matmul'])"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("activation_checkpoint(every=0)", r"every=0: must be"),
        ("activation_checkpoint(every=True)", r"every=True: must be"),
        ("activation_checkpoint(selective='matmul')", r"must be a list"),
        ("activation_checkpoint(selective=['matmull'])", r"did you mean 'matmul'"),
    ],
)
def test_values_are_checked(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memrt.prepare(PlainModel(), [spec])
