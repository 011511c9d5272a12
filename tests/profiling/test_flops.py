"""FLOPs against formulas: a small network by hand, a Llama by 6 N T, checkpointing by layers."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memrt.kernels
from memrt import registry
from memrt.planning import plan, simulate
from memrt.profiling.flops import FlopCounter, _formula, flops_of
from memrt.profiling.ledger import Ledger
from memrt.runner import start, train_step
from memrt.structure import RunSettings
from memrt.testing import tiny_batches, tiny_model
from tests.contract import specs

BATCH, TOKENS = 2, 64
LAYERS = 3


def _config(**overrides: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **{
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
            "use_cache": False,
            **overrides,
        }
    )


def _weights(config: Any) -> tuple[int, int]:
    """Elements of a layer's and of the head's matrices."""
    hidden = config.hidden_size
    keys = hidden * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * config.intermediate_size
    return layer, hidden * config.vocab_size


def _attention(config: Any) -> int:
    """One layer's forward: scores and their product with the values."""
    return 2 * 2 * BATCH * TOKENS**2 * int(config.hidden_size)


@cache
def _planned(*stack: str, **options: Any) -> dict[str, Any]:
    shape = {"batch_size": BATCH, "sequence_length": TOKENS}
    return plan(_config(), stack, **shape, **options).to_json()


def test_a_network_of_two_layers_is_counted_exactly() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3, bias=False))
    x = torch.randn(11, 5)
    with FlopCounter() as counter:
        model(x).sum().backward()
    # forward twice, dW twice, and dX of the second alone: the first one's input needs none
    assert counter.total == 2 * 11 * (5 * 7 + 7 * 3) * 2 + 2 * 11 * 7 * 3
    assert not counter.uncounted


def test_a_llama_takes_six_flops_a_weight_and_token() -> None:
    layer, head = _weights(_config())
    num_weights, tokens = LAYERS * layer + head, BATCH * TOKENS
    found = _planned()
    # attention: 2 products forward, and 5 backward, for the scores are made again
    attention = LAYERS * _attention(_config()) * 7 // 2
    assert found["flops"] == 6 * num_weights * tokens + attention
    assert found["flops"] == pytest.approx(6 * num_weights * tokens, rel=0.15)
    assert found["flops_by_phase"]["forward"] == (
        2 * num_weights * tokens + LAYERS * _attention(_config())
    )
    assert found["first_step_flops"] == found["flops"]
    assert found["transfer_bytes"] == 0
    assert not found["uncounted_operators"]


def test_accumulation_counts_every_micro_batch() -> None:
    assert _planned(accumulation_steps=2)["flops"] == 2 * _planned()["flops"]


def test_checkpointing_counts_the_layers_forward_once_more() -> None:
    layer, _ = _weights(_config())
    down = 128 * 256  # a layer's last product is kept by nobody, so torch stops before it
    again = LAYERS * (2 * (layer - down) * BATCH * TOKENS + _attention(_config()))
    assert _planned("activation_checkpoint")["flops"] == _planned()["flops"] + again


def test_offload_moves_one_input_of_every_layer_out_and_back() -> None:
    stack = ("activation_checkpoint", "offload_activations")
    shape = {"batch_size": BATCH, "sequence_length": TOKENS}
    found = plan(_config(), stack, **shape).to_json()
    deeper = plan(_config(num_hidden_layers=LAYERS + 1), stack, **shape).to_json()
    layer_input = BATCH * TOKENS * 128 * 4
    assert set(found["transfers"]) == {"device to host", "host to device"}
    for direction, moved in found["transfers"].items():
        assert deeper["transfers"][direction] == moved + layer_input
    assert found["transfer_bytes"] == sum(found["transfers"].values())
    assert deeper["place_peaks"]["host"] == found["place_peaks"]["host"] + layer_input
    assert found["pinned_peak_bytes"] >= found["place_peaks"]["host"]


@pytest.mark.parametrize(
    "stack",
    [
        [],
        ["galore"],
        ["ladder"],
        ["int8", "fused_lora", "fused_loss"],
        ["activation_checkpoint", "offload_activations"],
        ["q_galore", "fused_loss"],
    ],
    ids=lambda s: "+".join(s) or "none",
)
def test_the_plan_counts_what_the_run_does(stack: list[str]) -> None:
    strategies = registry.parse_all(specs(stack))
    settings = RunSettings(max_grad_norm=1.0, accumulation_steps=2)
    window = tiny_batches("llama", count=2)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return tiny_model("llama")

    planned = simulate(build, strategies, window, settings=settings)
    ledger = Ledger()
    with ledger, FlopCounter(ledger.now) as counter:
        run = start(build(), strategies, settings=settings, ledger=ledger)
        for _ in range(2):
            train_step(run, window)
    ledger.close()
    assert planned.flops == counter.flops
    assert planned.moved == ledger.moved
    assert planned.uncounted == counter.uncounted == set()
    assert bool(planned.moved) is ("offload_activations" in stack)


def test_every_operator_of_ours_is_counted_or_known_to_be_free() -> None:
    for module in pkgutil.iter_modules(memrt.kernels.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"memrt.kernels.{module.name}")
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("memrt::")}
    assert "memrt::ladder_down" in names
    unknown = set()
    for name in names:
        func = getattr(torch.ops.memrt, name.removeprefix("memrt::").split(".")[0]).default
        if _formula(func) is None and flops_of(func, (), {}, None) is None:
            unknown.add(name)
    assert not unknown, "give it a formula in profiling/flops.py, or a line in _ELEMENTWISE"


def test_what_multiplies_without_a_formula_is_named() -> None:
    @torch.library.custom_op("memrt_tests::product", mutates_args=())
    def product(left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    x = torch.randn(4, 4)
    with FlopCounter() as counter:
        product(x, x)
        torch.linalg.svd(x)
        x.norm()
        torch.nn.functional.group_norm(x, 2)
    assert counter.uncounted == {"memrt_tests::product", "aten::_linalg_svd"}
    assert counter.total == 0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda a: torch.mv(a, a[0]), 2 * 8 * 6),
        (lambda a: torch.addmv(a[:, 0], a, a[0]), 2 * 8 * 6),
        (lambda a: torch.dot(a[0], a[1]), 2 * 6),
        (lambda a: torch.zeros(6, 6).addmm_(a.t(), a), 2 * 6 * 8 * 6),
        (lambda a: torch.zeros(2, 6, 6).baddbmm_(*[torch.zeros(2, 6, 6)] * 2), 2 * 2 * 6**3),
        (lambda a: torch.linalg.qr(a), 4 * 36 * 8 - 4 * 216 // 3),
        (lambda a: torch.linalg.eigh(a.t() @ a), 2 * 6 * 8 * 6 + 9 * 216),
        (lambda a: functional.linear(a, torch.zeros(3, 6), torch.zeros(3)), 2 * 8 * 6 * 3),
        (lambda a: torch.einsum("ij,kj->ik", a, a), 2 * 8 * 6 * 8),
        (lambda a: functional.conv1d(a[None], torch.zeros(3, 8, 2)), 2 * 5 * 3 * 8 * 2),
    ],
)
def test_formulas(call: Any, expected: int) -> None:
    with FlopCounter() as counter:
        call(torch.randn(8, 6))
    assert counter.total == expected
    assert not counter.uncounted
