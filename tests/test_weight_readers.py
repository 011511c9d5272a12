"""Layers whose owner reads their weight itself: what is found, packed, refused and adapted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import memrt
from memrt.errors import ConflictError
from memrt.packed_weights import packed_layers
from memrt.weight_readers import reader_of

_T5 = {
    "d_model": 32,
    "d_kv": 16,
    "num_heads": 2,
    "d_ff": 64,
    "num_layers": 2,
    "vocab_size": 96,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
IDS = torch.arange(3, 15)[None]
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}


def _longt5() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.LongT5Config(**_T5, local_radius=3)
    return transformers.LongT5ForConditionalGeneration(config), BOTH


def _mamba() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.MambaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8, use_cache=False
    )
    return transformers.MambaForCausalLM(config), {"input_ids": IDS}


def _bloom(**options: Any) -> tuple[Any, dict[str, Tensor]]:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=2, **options)
    return transformers.BloomForCausalLM(config), {"input_ids": IDS}


def _left_dense(model: nn.Module) -> set[str]:
    packed = {name for name, _ in packed_layers(model)}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in linears - packed if any(part.isdigit() for part in name.split("."))}
    return {name.rpartition(".")[2] for name in inside if "lora" not in name}


@pytest.mark.parametrize(
    ("build", "target", "dense"),
    [
        (_longt5, "q", {"wo"}),  # the hidden state takes its dtype
        (_mamba, "in_proj", {"dt_proj", "out_proj", "x_proj"}),  # and what fused kernels are given
        (_bloom, "query_key_value", set()),  # reads two of them for a setting that nobody has
    ],
)
def test_what_its_owner_reads_stays_dense(
    build: Callable[[], tuple[Any, dict[str, Tensor]]], target: str, dense: set[str]
) -> None:
    torch.manual_seed(0)
    model, batch = build()
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
    memrt.prepare(model, ["int8", f"peft(rank=2, targets=['{target}'])"])
    assert _left_dense(model) == dense
    with torch.no_grad():
        found = model.eval()(**batch).logits  # adapters begin as nothing
    assert float((found - wanted).norm() / wanted.norm()) < 0.05  # 8 bits: half a percent a weight


def test_a_setting_that_makes_the_owner_read_is_seen() -> None:
    model, _ = _bloom(slow_but_exact=True, pretraining_tp=2)
    assert type(reader_of(model, "transformer.h.0.mlp.dense_4h_to_h")).__name__ == "BloomMLP"
    assert reader_of(model, "transformer.h.0.mlp.dense_h_to_4h") is None


def test_a_head_that_the_model_reads_is_not_packed_on_request() -> None:
    model, _ = _mamba()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ConflictError, match=r"MambaForCausalLM reads lm_head\.weight itself"):
        memrt.prepare(model, ["int8(head=True)", "peft(rank=2, targets=['in_proj'])"])
    assert not packed_layers(model)


class _Owner(nn.Module):
    """Reads weights in the ways that are looked for."""

    def __init__(self) -> None:
        super().__init__()
        names = ("read", "called", "shown", "inside", "begun")
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for _ in range(2)
        )
        first: Any = self.blocks[0]
        self.begun = first.begun.weight.dtype  # initialization reads what it likes

    @property
    def dtype(self) -> torch.dtype:
        first: Any = self.blocks[0]
        return first.shown.weight.dtype  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        blocks: Any = self.blocks
        first = blocks[0]

        def each() -> Iterator[Tensor]:
            return (block.inside.weight for block in blocks)

        return first.called(x) @ first.read.weight + sum(each())  # type: ignore[no-any-return]


def test_readers_are_found_in_properties_inner_functions_and_from_further_out() -> None:
    owner = _Owner()
    names = [name for name, _ in owner.blocks[1].named_children()]
    model = nn.Sequential(owner)
    found = {name for name in names if reader_of(model, f"0.blocks.1.{name}")}
    assert found == {"read", "shown", "inside"}


# ---------------------------------------------------------------- torch's encoder layers


class _Encoder(nn.Module):
    """Embedding, torch's encoder and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            32, nhead=2, dim_feedforward=64, dropout=0.0, batch_first=True
        )
        self.embedding = nn.Embedding(16, 32)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 16)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        hidden = self.encoder(self.embedding(ids), src_key_padding_mask=padding)
        logits: Tensor = self.head(hidden)
        return logits


def _trained(stack: list[str]) -> tuple[nn.Module, Any, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model, ids = _Encoder().train(), torch.randint(0, 16, (2, 8))
    padding = torch.arange(8) >= torch.tensor([[8], [6]])

    def loss() -> Tensor:
        labels = ids.masked_fill(padding, -100)
        return cross_entropy(model(ids, padding).flatten(0, 1), labels.flatten())

    run = memrt.prepare(model, stack, lr=1e-2)
    for _ in range(10):
        run.train_micro_batch(loss)
        run.step()
    return model, run, loss


@pytest.mark.parametrize(
    "stack",
    [
        ["peft(rank=4, targets=['linear1', 'linear2'])"],
        ["int8", "peft(rank=4, targets=['linear1', 'linear2'])"],
        ["nf4", "ladder(reduction=2)"],
    ],
    ids=str,
)
def test_evaluation_over_torch_s_encoder_layers_is_training_s(stack: list[str]) -> None:
    """Their shortcut goes past adapters and reads packed weights as dense ones."""
    model, run, loss = _trained(stack)
    trained = float(loss().detach())
    with torch.no_grad():
        assert float(loss_in_evaluation(model, loss)) == pytest.approx(trained, rel=1e-5)
    kinds = [type(module) for module in _Encoder().modules()]
    run.detach()
    assert [type(module) for module in model.modules()] == kinds


def loss_in_evaluation(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    model.eval()
    found = loss()
    model.train()
    return found


def test_adapters_on_the_last_layer_of_torch_s_attention_are_refused() -> None:
    model = _Encoder()
    with pytest.raises(ConflictError, match=r"multiplies by the weight of .*out_proj itself"):
        memrt.prepare(model, ["peft(targets=['linear1', 'out_proj'])"])
    assert all(parameter.requires_grad for parameter in model.parameters())
