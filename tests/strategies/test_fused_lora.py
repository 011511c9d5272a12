"""`fused_lora`: PEFT's numbers with a third of its activations, by the ledger."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import memrt
from memrt.adapters import adapter_layers
from memrt.errors import ConflictError
from memrt.profiling.ledger import Ledger
from memrt.runner import model_loss
from memrt.testing import tiny_batches, tiny_model

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
HIDDEN, LENGTH = 128, 256
UNIT = 2 * HIDDEN * LENGTH


def decoder(layers: int) -> nn.Module:
    """A bf16 decoder of Llama-7B's proportions: MLP 2.69 times as wide, no grouped queries."""
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=344,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=64,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).train()


def kept_units(stack: list[str]) -> float:
    """Units that a layer keeps between forward and backward, from two depths."""
    found = []
    ids = torch.arange(LENGTH)[None] % 64
    for layers in (2, 4):
        model = decoder(layers)
        with Ledger() as ledger:
            session = memrt.prepare(model, stack, ledger=ledger)
            with session.micro_batch():
                loss = model(input_ids=ids, labels=ids).loss
                at_end = ledger.timeline.breakdown(ledger.timeline.now - 1).accounts["activations"]
                session.backward(loss)
        found.append(at_end)
    return (found[1] - found[0]) / 2 / UNIT


@pytest.mark.parametrize(("dropout", "low", "high"), [(0.0, 29.5, 30.5), (0.05, 42.0, 44.5)])
def test_seventeen_units_a_layer_where_peft_keeps_thirty_to_forty(
    dropout: float, low: float, high: float
) -> None:
    adapters = f"peft(rank=8, dropout={dropout}, targets={TARGETS})"
    assert low <= kept_units([adapters]) <= high
    assert 14 <= kept_units([adapters, "fused_lora"]) <= 17
    assert 14 <= kept_units(["nf4", adapters, "fused_lora"]) <= 17


def trained(
    family: str, stack: list[str], dtype: torch.dtype
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and adapter gradients of two micro-batches, with noise on the adapters."""
    torch.manual_seed(0)
    model = tiny_model(family, dtype=dtype).train()
    session = memrt.prepare(model, stack)
    generator = torch.Generator().manual_seed(2)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    losses = []
    for index, batch in enumerate(tiny_batches(family, count=2)):
        torch.manual_seed(10 + index)
        with session.micro_batch(last=index == 1):
            loss = model_loss(model, batch)
            session.backward(loss)
        losses.append(float(loss.detach()))
    return losses, {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "plain"])
@pytest.mark.parametrize(
    "beside",
    [[], ["nf4"], ["activation_checkpoint"], ["offload_activations(min_bytes=0)"]],
    ids=str,
)
def test_losses_and_gradients_of_peft_with_dropout(
    beside: list[str], family: str, dtype: torch.dtype
) -> None:
    adapters = "peft(rank=4, dropout=0.1)"
    losses, found = trained(family, [adapters, "fused_lora", *beside], dtype)
    expected, wanted = trained(family, [adapters, *beside], dtype)
    assert losses == pytest.approx(expected, rel=2 * torch.finfo(dtype).eps)
    assert found.keys() == wanted.keys()
    allowed = 64 * torch.finfo(dtype).eps  # sums in another order, over the depth of the model
    wrong = {
        name: float((found[name] - wanted[name]).norm() / wanted[name].norm())
        for name in found
        if (found[name] - wanted[name]).norm() > allowed * wanted[name].norm()
    }
    assert not wrong


def test_every_lora_layer_and_gated_mlp_is_fused_and_given_back() -> None:
    model = tiny_model("llama").train()
    session = memrt.prepare(model, ["peft(rank=4)", "fused_lora"])
    forwards = {type(layer).forward.__qualname__ for _, layer in adapter_layers(model)}
    assert len(forwards) == 1
    assert "_fused_layer" not in {type(m).__name__ for m in model.modules()}
    mlps = [m for m in model.modules() if type(m).__name__ == "LlamaMLP"]
    assert all(type(m).__mro__[1].__name__ == "Fused" for m in mlps)
    session.detach()
    assert type(mlps[0]) is type(tiny_model("llama").get_submodule("model.layers.0.mlp"))


def test_evaluation_is_pefts_own() -> None:
    results = []
    for stack in (["peft(rank=4)"], ["peft(rank=4)", "fused_lora"]):
        torch.manual_seed(0)
        model: Any = tiny_model("llama")
        memrt.prepare(model, stack)
        with torch.no_grad():
            results.append(model.eval()(**tiny_batches("llama")[0]).logits)
    assert torch.equal(*results)


def test_an_mlp_that_computes_something_else_is_left_alone() -> None:
    model = tiny_model("llama").train()
    mlp = model.get_submodule("model.layers.0.mlp")

    class Doubled(type(mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    mlp.__class__ = Doubled
    memrt.prepare(model, ["peft(rank=4)", "fused_lora"])
    assert type(mlp) is Doubled


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (["fused_lora"], r"has no LoRA layers of PEFT; add \"peft\(method='lora'\)\""),
        (["fused_lora", "peft(method='ia3')"], r"peft\(method='ia3'\) is not LoRA"),
        (["fused_lora", "peft(rank=4)", "galore(rank=2)"], "galore breaks"),
    ],
)
def test_stacks_that_cannot_be_are_refused(stack: list[str], message: str) -> None:
    with pytest.raises(ConflictError, match=message):
        memrt.prepare(tiny_model("llama"), stack)


def test_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the adapted layers can be fused"):
        memrt.prepare(tiny_model("llama"), ["fused_lora", "peft(options={'use_dora': True})"])
