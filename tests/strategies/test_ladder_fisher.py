"""A ladder's first weights by Fisher scores: scores, choices, memory, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import memrt
from memrt.errors import ConflictError
from memrt.ladder.attach import CHILD
from memrt.ladder.fisher import Scores, fisher_scores
from memrt.profiling.ledger import Ledger
from memrt.session import Session
from memrt.testing import PlainModel, tiny_batches, tiny_config, tiny_model
from tests.strategies.runs import assert_equal

FISHER = "ladder(reduction=2, init='fisher', probe_batches=2)"


def source(family: str, **shape: int) -> Callable[[int], Iterator[dict[str, Tensor]]]:
    return lambda count: iter(tiny_batches(family, count=count, seed=7, **shape))


def linears(model: nn.Module) -> tuple[list[nn.Module], dict[str, nn.Module]]:
    """A model's blocks, and the linear modules in them by name."""
    run = Session(model, [])
    blocks = [layer for stack in run.facts.structure.stacks for layer in stack.layers]
    inside = {module for block in blocks for module in block.modules()}
    return blocks, {
        name: module
        for name, module in model.named_modules()
        if module in inside and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
    }


def scored(model: nn.Module, family: str, **shape: int) -> dict[str, tuple[Tensor, Tensor]]:
    run = Session(model, [], probe_batches=source(family, **shape))
    frozen = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    blocks, named = linears(model)
    scores: Scores = fisher_scores(run, blocks, list(named.values()), count=2)
    for parameter, required in frozen.items():
        parameter.requires_grad_(required)
    return {name: scores[module] for name, module in named.items()}


def plain_scores(
    model: nn.Module, weights: dict[str, nn.Parameter], family: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Autograd's own gradients of whole weights [out, in], squared."""
    found: dict[str, Tensor] = {}
    model.eval()
    for batch in source(family)(2):
        loss = model(**batch)["loss"]
        for (name, _), gradient in zip(
            weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            found[name] = found.get(name, 0.0) + gradient.double().square() / 2
    return {name: (total.sum(dim=1), total.sum(dim=0)) for name, total in found.items()}


def assert_close(
    found: dict[str, tuple[Tensor, Tensor]], wanted: dict[str, tuple[Tensor, Tensor]]
) -> None:
    assert found.keys() == wanted.keys()
    for name, pair in found.items():
        for one, other in zip(pair, wanted[name], strict=True):
            assert other.norm() > 0
            assert (one.double() - other).norm() <= 1e-5 * other.norm(), name


# ---------------------------------------------------------------- the scores


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "plain"])
def test_scores_are_those_of_plain_autograd(family: str) -> None:
    """Dropout in the model and training mode: scored as in evaluation, and left as it was."""
    torch.manual_seed(0)
    model = tiny_model(family).train()
    before = torch.get_rng_state()
    found = scored(model, family)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    _, named = linears(model)
    weights = {name: module.weight for name, module in named.items()}
    wanted = plain_scores(model, weights, family)  # type: ignore[arg-type]
    if family == "gpt2":  # Conv1D's weights are [in, out]
        wanted = {name: (columns, rows) for name, (rows, columns) in wanted.items()}
    assert_close(found, wanted)


def test_scores_of_a_four_bit_base_are_those_of_its_dense_weights() -> None:
    model = memrt.load(tiny_config("llama", hidden=64), ["nf4"], seed=0)
    found = scored(model, "llama")
    _, named = linears(model)
    dense: Any = tiny_model("llama", hidden=64)
    weights = {}
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, parameter in dense.named_parameters():
            packed = own[name]
            module: Any = named.get(name.rpartition(".")[0])
            parameter.copy_(packed if module is None else module.dense(packed))
            if module is not None:
                weights[name.rpartition(".")[0]] = parameter
    assert {p.dtype for p in own.values()} == {torch.uint8, torch.float32}
    wanted = plain_scores(dense, weights, "llama")
    assert_close(found, wanted)
    stack = ["nf4", FISHER]
    expected = model(**tiny_batches("llama", count=1)[0])["logits"]
    memrt.prepare(model, stack, probe_batches=source("llama"))
    assert torch.equal(model(**tiny_batches("llama", count=1)[0])["logits"], expected)


def probe_peak(layers: int, hidden: int = 64) -> int:
    model = tiny_model("llama", layers=layers, hidden=hidden).train()
    shape = {"length": 8}
    with Ledger() as ledger:
        run = memrt.prepare(
            model,
            [f"ladder(reduction={hidden // 16}, init='fisher', probe_batches=2, taps='pooled')"],
            ledger=ledger,
            probe_batches=source("llama", **shape),
        )
    run.detach()
    weights = sum(p.numel() * 4 for p in model.parameters())
    peak = ledger.timeline.peak(where=lambda region: region.phase == "probe")
    return peak.peak_bytes - weights


def test_memory_grows_with_a_layer_by_its_input_and_its_scores() -> None:
    """No gradient outlives its layer: those of one layer would be 18 times the bound."""
    few, many = probe_peak(3), probe_peak(6)
    model = tiny_model("llama", layers=1, hidden=64)
    _, named = linears(model)
    sums = sum(4 * (m.in_features + m.out_features) for m in named.values())  # type: ignore
    inputs = 2 * 8 * 64 * 4
    assert 0 < many - few <= 3 * (sums + inputs)


# ---------------------------------------------------------------- what they choose


def test_the_side_is_cut_out_by_the_scores() -> None:
    torch.manual_seed(0)
    model: Any = tiny_model("llama", hidden=64, intermediate_size=128).train()
    scores = scored(model, "llama")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memrt.prepare(model, [FISHER], probe_batches=source("llama"))
    total = torch.zeros(64)
    for name, (rows, columns) in scores.items():
        one = rows if name.endswith(("o_proj", "down_proj")) else columns
        total += one / one.sum()
    channels = total.argsort(descending=True)[:32].sort().values
    for index, layer in enumerate(model.model.layers):
        assert torch.equal(layer.ladder.tap.weight.argmax(dim=1), channels)
        mlp = {n: scores[f"model.layers.{index}.mlp.{n}_proj"] for n in ("gate", "up", "down")}
        score = sum(
            pair[axis] / pair[axis].sum()
            for pair, axis in ((mlp["gate"], 0), (mlp["up"], 0), (mlp["down"], 1))
        )
        neurons = score.argsort(descending=True)[:64].sort().values  # type: ignore[union-attr]
        up = weights[f"model.layers.{index}.mlp.up_proj.weight"]
        assert torch.equal(layer.ladder.block.mlp.up_proj.weight, up[neurons][:, channels])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "plain"])
def test_it_starts_as_the_backbone_to_the_bit_and_leaves_it_so(family: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(family).eval()
    batch = tiny_batches(family, count=1)[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**batch)["logits"]
    run = memrt.prepare(model.train(), [FISHER], lr=1e-2, probe_batches=source(family))
    with torch.no_grad():
        assert torch.equal(model(**batch)["logits"], expected)
    run.train_micro_batch(lambda: model(**batch)["loss"])
    run.step()
    run.detach()
    assert_equal(dict(model.state_dict()), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_saved_side_network_needs_no_data(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_model("llama").eval()
    batch = tiny_batches("llama", count=1)[0]
    run = memrt.prepare(model, [FISHER], lr=1e-2, probe_batches=source("llama"))
    run.train_micro_batch(lambda: model(**batch)["loss"])
    run.step()
    memrt.save_ladder(run, tmp_path / "side")
    with torch.no_grad():
        expected = model(**batch)["logits"]
    run.detach()
    again = memrt.load_ladder(model, tmp_path / "side")
    with torch.no_grad():
        assert torch.equal(model(**batch)["logits"], expected)
    again.detach()


# ---------------------------------------------------------------- what it refuses


def test_without_data_it_is_refused_with_what_to_do_and_the_model_is_left_alone() -> None:
    model = tiny_model("llama").train()
    message = r"init='fisher'.*probe_dataset.*probe_batches.*init='magnitude'"
    with pytest.raises(ValueError, match=message):
        memrt.prepare(model, [FISHER])
    assert not [name for name, _ in model.named_parameters() if CHILD in name.split(".")]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_that_is_no_number_is_refused() -> None:
    def unlabelled(count: int) -> list[dict[str, Tensor]]:
        batches = tiny_batches("llama", count=count)
        return [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches]

    model = tiny_model("llama").train()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="loss on a probe batch is nan; leave rows without labels"):
        memrt.prepare(model, [FISHER], probe_batches=unlabelled)
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_hooks for module in model.modules())


def test_a_weight_that_is_read_without_its_module_has_no_score() -> None:
    class Reading(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](functional.linear(x, self[0].weight).tanh())

    model = PlainModel()
    for index in range(4):
        model.layers[index] = Reading(nn.Linear(32, 64, bias=False), nn.Linear(64, 32))
    with pytest.raises(ValueError, match=r"layers\.0\.0 is read without calling the module"):
        memrt.prepare(model, [FISHER], probe_batches=source("plain"))


def test_settings_without_effect_and_blocks_that_pruning_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="probe_batches=2: init='auto' looks at no data"):
        memrt.prepare(nn.Linear(2, 2), ["ladder(probe_batches=2)"])
    with pytest.raises(ConflictError, match=r"use ladder\(init='random'\)"):
        memrt.prepare(tiny_model("mixtral"), [FISHER], probe_batches=source("mixtral"))
