"""Updates in backward against the same updates after it: bits, bytes, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import memrt
from memrt.errors import ConflictError, NonFiniteGradientError
from memrt.planning import plan, simulate
from memrt.profiling.ledger import Ledger
from memrt.profiling.timeline import Timeline
from memrt.registry import parse_all
from memrt.runner import model_loss, start, train_step
from memrt.session import Session
from memrt.structure import RunSettings
from memrt.testing import tiny_batches, tiny_config
from tests import trainer_runs
from tests.strategies.active_runs import OUTSIDE, steps_of, train, weights
from tests.strategies.runs import assert_equal, batch_of, model_of, states

ONE, TWO = "in_backward", "in_backward(clip='two_pass')"
FORMS = {ONE: 0.0, TWO: 0.3}
"""Both forms, with the `max_grad_norm` that they are tried with (it binds)."""

OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


# ---------------------------------------------------------------- equal bits


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("family", "dtype", "stack"),
    [
        ("llama", torch.float32, ["int8_states", "fused_loss(chunk_tokens=8)"]),
        ("gpt2", torch.float32, ["int8_states", "activation_checkpoint"]),
        ("gpt2", torch.bfloat16, ["int8_states", "offload_activations(min_bytes=0)"]),
        ("plain", torch.float32, ["int8_states", "lisa(layers=1, every=2)"]),
        ("llama", torch.bfloat16, ["galore(rank=4, every=3)"]),
        ("gpt2", torch.bfloat16, ["apollo(rank=4)", "fp8_states"]),
        ("llama", torch.float32, ["fira(rank=4)"]),  # projects a gradient that is formed
        ("gpt2", torch.float32, ["galore(rank=4, every=3)", "badam(every=2)", "int8_states"]),
        ("llama", torch.bfloat16, ["galore(rank=4, every=3, form='plain')", "fp8_states"]),
        ("gpt2", torch.float32, ["q_galore(rank=4, every=3)"]),
        ("llama", torch.bfloat16, ["apollo_mini(every=3)"]),
        ("plain", torch.bfloat16, ["int4_states"]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else str(value),
)
def test_same_bits_as_updates_after_backward(
    family: str, stack: list[str], form: str, dtype: torch.dtype
) -> None:
    """GPT-2's embedding is its head, too, and it has dropout; weights, state, norms."""
    models, found = [], []
    for specs in (stack, [*stack, form]):
        model = model_of(family, dtype=dtype, hidden=64, layers=3)
        run = memrt.prepare(model, specs, max_grad_norm=FORMS[form], **OPTIONS)
        norms = []
        for step in range(4):
            torch.manual_seed(500 + step)
            with run.micro_batch():
                run.backward(model_loss(model, batch_of(family, seed=step)))
            norms.append(run.gradient_norm())
            run.step()
        models.append(model)
        found.append(({n: p.detach() for n, p in model.named_parameters()}, norms, run))
    assert_equal(found[1][0], found[0][0])
    assert torch.equal(torch.stack(found[1][1]), torch.stack(found[0][1]))
    assert max(found[0][1]) > max(FORMS.values())
    ours, theirs = (states(f[2].optimizer, m) for f, m in zip(found, models, strict=True))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert_equal(ours[name], theirs[name])


@pytest.mark.parametrize("form", FORMS)
def test_float32_weights_have_the_bits_of_torchs_adamw(form: str) -> None:
    plain, model = model_of("llama"), model_of("llama")
    reference = memrt.prepare(plain, [], max_grad_norm=FORMS[form], **OPTIONS)
    assert type(reference.optimizer) is torch.optim.AdamW
    run = memrt.prepare(model, [form], max_grad_norm=FORMS[form], **OPTIONS)
    train(reference, "llama", count=4)
    train(run, "llama", count=4)
    assert_equal(weights(model), weights(plain))


@pytest.mark.parametrize("form", FORMS)
def test_groups_and_schedules_are_heeded(form: str) -> None:
    found = []
    for specs in (["int8_states"], ["int8_states", form]):
        model = model_of("plain", hidden=64)
        run = Session(model, parse_all(specs), settings=RunSettings(max_grad_norm=FORMS[form]))
        named = list(model.named_parameters())
        groups: list[dict[str, Any]] = [
            {"params": [item for item in named if item[1].ndim > 1], "weight_decay": 0.5},
            {"params": [item for item in named if item[1].ndim == 1], "lr": 1e-4},
        ]
        run.adopt_optimizer(run.build_optimizer(groups))
        assert run.optimizer is not None
        scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, gamma=0.5)
        for _ in steps_of(run, "plain", count=4):
            scheduler.step()
        found.append(weights(model))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("form", FORMS)
def test_several_micro_batches_are_summed_first(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Equal bits, and a warning that this saves nothing."""
    found = []
    for specs in (["int8_states"], ["int8_states", form]):
        model = model_of("gpt2", hidden=64)
        run = memrt.prepare(model, specs, max_grad_norm=FORMS[form], **OPTIONS)
        caplog.clear()
        train(run, "gpt2", count=3, micro_batches=3)
        found.append(weights(model))
    assert_equal(found[1], found[0])
    (record,) = caplog.records
    assert "saves nothing" in record.getMessage()
    caplog.clear()
    memrt.prepare(model_of("plain"), [form], accumulation_steps=4)
    assert "saves nothing" in caplog.text


def test_experts_that_the_last_micro_batch_leaves_out_are_updated_too() -> None:
    """Their gradient of an earlier micro-batch waits for the step."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

        def forward(self, x: Tensor, expert: int) -> Tensor:
            loss: Tensor = self.experts[expert](x).square().mean()
            return loss

    found = []
    for specs in (["int8_states"], ["int8_states", ONE]):
        torch.manual_seed(0)
        model = Two()
        run = memrt.prepare(model, specs, **OPTIONS)
        for step in range(4):
            for index in range(2):
                with run.micro_batch(last=index == 1):
                    run.backward(model(torch.full((2, 4), 1.0 + step), index if step else 0))
            norm = run.gradient_norm()
            run.step()
        found.append(weights(model))
    assert_equal(found[1], found[0])
    assert norm > 0


# ---------------------------------------------------------------- bytes


def _counted(family: str, specs: list[str], *, count: int = 1, **options: Any) -> Timeline:
    ledger = Ledger()
    with ledger:
        run = start(
            model_of(family, **options),
            parse_all(specs),
            settings=RunSettings(max_grad_norm=0.0),
            ledger=ledger,
        )
        for step in range(2):
            train_step(run, tiny_batches(family, count=count, seed=step))
    ledger.close()
    return ledger.timeline


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("gpt2", torch.bfloat16), ("plain", torch.float32)],
)
def test_the_gradients_account_holds_the_largest_gradient_alone(
    family: str, form: str, dtype: torch.dtype
) -> None:
    """And what one operator gives with it: a bias, or what GPT-2's head adds to its embedding."""
    sizes = sorted(
        p.numel() * dtype.itemsize for p in model_of(family, dtype=dtype, layers=6).parameters()
    )
    whole = _counted(family, [], dtype=dtype, layers=6).account_maxima()["gradients"]
    held = _counted(family, [form], dtype=dtype, layers=6).account_maxima()["gradients"]
    assert whole == sum(sizes)
    assert sizes[-1] <= held <= sizes[-1] + sizes[-2]
    assert held < whole / 3
    several = _counted(family, [form], dtype=dtype, layers=6, count=2).account_maxima()
    assert several["gradients"] >= whole  # nothing is saved, and the ledger says so


def test_the_peak_falls_by_the_gradients_that_are_not_there() -> None:
    """A model whose weights outweigh its activations."""
    options = {"hidden": 256, "layers": 4}
    whole = _counted("plain", ["int8_states"], **options)
    freed = _counted("plain", ["int8_states", ONE], **options)
    gradients = whole.account_maxima()["gradients"]
    assert whole.peak().peak_bytes - freed.peak().peak_bytes > 0.6 * gradients


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "stack",
    [
        [],
        ["galore(rank=4)", "int8_states"],
        ["activation_checkpoint", "fused_loss(chunk_tokens=8)"],
    ],
    ids=lambda s: "+".join(s) or "alone",
)
def test_the_plan_is_the_ledger_of_the_run(stack: list[str], form: str) -> None:
    """With one micro-batch a step; tests/test_planning.py has two."""
    strategies = parse_all([*stack, form])
    settings = RunSettings(max_grad_norm=FORMS[form])
    window = tiny_batches("llama", count=1)
    planned = simulate(lambda: model_of("llama", layers=2), strategies, window, settings=settings)
    ledger = Ledger()
    with ledger:
        run = start(model_of("llama", layers=2), strategies, settings=settings, ledger=ledger)
        for _ in range(2):
            train_step(run, window)
    ledger.close()
    counted = ledger.timeline.peak()
    assert planned.peak.peak_bytes == counted.peak_bytes
    assert planned.peak.accounts == counted.accounts
    assert planned.peak.owners == counted.owners
    assert planned.phases() == ledger.timeline.phase_peaks()
    assert planned.account_maxima == ledger.timeline.account_maxima()


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_extrapolated(form: str) -> None:
    options: dict[str, Any] = {"sequence_length": 16, "max_grad_norm": FORMS[form]}
    config = tiny_config("llama", layers=7)
    quick = plan(config, [form], **options)
    whole = plan(config, [form], full=True, **options)
    assert len(quick.simulated_layers) == 3
    assert quick.simulation.peak.accounts == whole.simulation.peak.accounts
    assert quick.simulation.account_maxima == whole.simulation.account_maxima


# ---------------------------------------------------------------- embeddings and head


@pytest.mark.parametrize(
    ("spec", "norm"),
    [
        ("in_backward", 0.0),
        ("in_backward(clip='two_pass')", 0.3),
        ("lomo(clip='two_pass')", 0.3),
        ("adalomo", 0.0),
    ],
    ids=["one pass", "two passes", "lomo", "adalomo"],
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_lies_outside_the_layers_can_wait_for_the_step(
    family: str, spec: str, norm: float
) -> None:
    """Equal bits and norms; its gradients are there after backward, and the layers' are not."""
    found = []
    for value in (True, False):
        (strategy,) = parse_all([spec])
        model = model_of(family, hidden=64, layers=3)
        run = Session(
            model,
            [dataclasses.replace(strategy, embeddings=value)],  # type: ignore[call-arg]
            settings=RunSettings(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=norm),
        )
        named = list(model.named_parameters())
        run.adopt_optimizer(run.build_optimizer([{"params": named}]))
        norms = []
        for step in range(3):
            torch.manual_seed(500 + step)
            with run.micro_batch():
                run.backward(model_loss(model, batch_of(family, seed=step)))
            waiting = {name for name, p in named if p.grad is not None}
            assert waiting == (set() if value else OUTSIDE[family])
            norms.append(run.gradient_norm())
            run.step()
        found.append((weights(model), norms))
    assert_equal(found[1][0], found[0][0])
    assert torch.equal(torch.stack(found[1][1]), torch.stack(found[0][1]))
    assert max(found[0][1]) > norm


def test_what_waits_is_in_the_gradients_account() -> None:
    model = model_of("plain", layers=6)
    sizes = {name: p.numel() * 4 for name, p in model.named_parameters()}
    waiting = sum(sizes[name] for name in OUTSIDE["plain"])
    largest = max(size for name, size in sizes.items() if name not in OUTSIDE["plain"])
    held = _counted("plain", ["in_backward(embeddings=False)"], layers=6).account_maxima()
    assert waiting <= held["gradients"] <= waiting + 2 * largest < sum(sizes.values()) / 2


def test_a_switch_without_effect_is_refused() -> None:
    spec = "in_backward(embeddings=False)"
    model = model_of("plain")
    for name in ("embedding", "head"):
        model.get_submodule(name).requires_grad_(False)
    with pytest.raises(ConflictError, match="no effect: nothing outside the layers trains"):
        memrt.prepare(model, [spec])
    with pytest.raises(ConflictError, match="leaves nothing of Linear to update in backward"):
        memrt.prepare(nn.Linear(2, 2), [spec])
    with pytest.raises(ValueError, match="embeddings=0: must be True or False"):
        memrt.prepare(model, ["lomo(embeddings=0)"])


# ---------------------------------------------------------------- gradients that are not finite


def _spoil(model: nn.Module, factor: float = math.inf) -> Any:
    """A hook that makes one gradient, in the middle of backward, NaN or infinite."""
    weight = dict(model.named_parameters())["layers.1.0.weight"]
    return weight.register_hook(lambda gradient: gradient * factor)


def test_one_pass_stops_and_names_the_last_good_checkpoint() -> None:
    model = model_of("plain")
    run = memrt.prepare(model, [ONE], **OPTIONS)
    train(run, "plain", count=2)
    run.last_checkpoint = "run/checkpoint-2"
    _spoil(model, math.nan)
    with pytest.raises(NonFiniteGradientError, match=r"step 3.*run/checkpoint-2.*two_pass"):
        train(run, "plain", first=2, count=1)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("stack", [["int8_states"], ["galore(rank=4, every=2)"]], ids=str)
def test_two_passes_skip_such_a_step_as_a_whole_and_count_it(
    stack: list[str], micro_batches: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of("plain")
    run = memrt.prepare(model, [*stack, TWO], max_grad_norm=1.0, **OPTIONS)
    assert run.optimizer is not None
    train(run, "plain", count=2, micro_batches=micro_batches)
    before, state = weights(model), copy.deepcopy(states(run.optimizer, model))
    hook = _spoil(model)
    for index in range(micro_batches):
        with run.micro_batch(last=index == micro_batches - 1):
            run.backward(model_loss(model, batch_of("plain", seed=index)))
    norm = run.step()
    hook.remove()
    assert norm is not None
    assert not math.isfinite(norm)
    assert_equal(weights(model), before)
    after = states(run.optimizer, model)
    for name in state:
        assert_equal(after[name], state[name])
    assert "step 3 is not finite; the step is skipped (1 so far)" in caplog.text
    attachment = next(a for a in run.attachments if a.name == "in_backward")
    assert attachment.state_dict() == {"skipped_steps": 1}
    train(run, "plain", first=3, count=1, micro_batches=micro_batches)
    assert not torch.equal(weights(model)["head.weight"], before["head.weight"])
    attachment.load_state_dict({"skipped_steps": 5})
    assert attachment.state_dict() == {"skipped_steps": 5}


# ---------------------------------------------------------------- under the Trainer


@pytest.mark.parametrize("accumulation", [1, 5])
@pytest.mark.parametrize("form", [*FORMS, "in_backward(clip='two_pass', embeddings=False)"])
def test_the_trainer_trains_logs_and_calls_back_as_with_updates_after_backward(
    form: str, accumulation: int, tmp_path: Path
) -> None:
    """12 micro-batches an epoch: windows of 5 leave one of two."""
    runs = []
    for index, strategies in enumerate([["int8_states"], ["int8_states", form]]):
        recorder = trainer_runs.Recorder()
        runs.append(
            (
                trainer_runs.run(
                    tmp_path / str(index),
                    family="gpt2",
                    options={"strategies": strategies, "callbacks": [recorder]},
                    gradient_accumulation_steps=accumulation,
                    max_grad_norm=FORMS.get(form, 0.3),
                    lr_scheduler_type="cosine",
                    weight_decay=0.1,
                    max_steps=-1,
                    num_train_epochs=1,
                ),
                recorder,
            )
        )
    (after, events), (during, same_events) = runs
    trainer_runs.assert_equal(trainer_runs.weights(during), trainer_runs.weights(after))
    assert trainer_runs.history(during) == trainer_runs.history(after)
    norms = [entry["grad_norm"] for entry in trainer_runs.history(during) if "loss" in entry]
    assert min(norms) > 0.3
    assert same_events.events == events.events


def test_the_trainers_error_names_its_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_runs.trainer_of(
        tmp_path,
        family="plain",
        options={"strategies": [ONE]},
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=1,
        save_only_model=False,
    )

    class Spoil(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                _spoil(kwargs["model"], math.nan)

    trainer.add_callback(Spoil())
    with pytest.raises(NonFiniteGradientError, match="checkpoint-2"):
        trainer.train()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1 .* use in_backward\(clip='two_pass'\)"),
        ({"fp16": True}, r"fp16=True needs .* in_backward breaks"),
        ({"sharded": "distributed data parallel"}, r"distributed data parallel.* in_backward"),
        ({"optimizer": "adafactor"}, r"optimizer='adafactor' .* use AdamW"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_need_all_gradients_are_refused_by_name(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConflictError, match=message):
        Session(model_of("plain"), parse_all([ONE]), settings=RunSettings(**settings))


def test_two_passes_are_refused_where_one_is() -> None:
    for settings in ({"fp16": True}, {"sharded": "fsdp"}):
        with pytest.raises(ConflictError, match="in_backward breaks"):
            Session(model_of("plain"), parse_all([TWO]), settings=RunSettings(**settings))
    with pytest.raises(ValueError, match="clip='global': use one of none, two_pass"):
        memrt.prepare(model_of("plain"), ["in_backward(clip='global')"])


class Overwriting(torch.autograd.Function):
    """silu(gate) up, whose backward writes over what it saved, where no version counter sees it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        share = gate.sigmoid()
        of_gate = gradient * (share + gate * share * (1 - share)) * up
        up.data.copy_(gradient * gate * share)
        gate.data.copy_(of_gate)
        return gate.detach(), up.detach()


class Gated(nn.Module):
    """An MLP over it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(8, 16)])
        self.down = nn.Linear(16, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = (layer(hidden) for layer in self.layers)
        loss: Tensor = self.down(Overwriting.apply(gate, up)).square().mean()  # type: ignore
        return loss


@pytest.mark.parametrize("name", ["in_backward", "lomo"])
def test_two_passes_refuse_kernels_that_write_over_what_they_saved(
    name: str, tmp_path: Path
) -> None:
    """As Liger's do: by the Trainer's setting, and in any loop by what they make of a gradient."""
    spec = f"{name}(clip='two_pass')"
    run = memrt.prepare(Gated(), [spec], max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match=r"gradient of layers\.\d.*Liger"), run.micro_batch():
        run.backward(run.model(torch.linspace(-2, 2, 40).view(5, 8)))
    with pytest.raises(ConflictError, match=r"use_liger_kernel=True writes .* clip='two_pass'"):
        trainer_runs.trainer_of(tmp_path, options={"strategies": [spec]}, use_liger_kernel=True)
    once = {"strategies": [name]}
    trainer_runs.trainer_of(tmp_path, options=once, use_liger_kernel=True, max_grad_norm=0.0)


class Shared(nn.Module):
    """One layer, used twice, each time in a checkpoint."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embedding = nn.Embedding(7, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        for _ in range(2):
            hidden = checkpoint(self.layer, hidden, use_reentrant=self.reentrant).tanh()
        loss: Tensor = hidden.square().mean()
        return loss


def test_a_layer_used_twice_under_checkpoints_is_updated_once() -> None:
    found = []
    for specs in (["int8_states"], ["int8_states", ONE]):
        model = Shared(reentrant=False)
        run = memrt.prepare(model, specs, **OPTIONS)
        for _ in range(3):
            with run.micro_batch():
                run.backward(model(torch.arange(7)))
            run.step()
        found.append(weights(model))
    assert_equal(found[1], found[0])


class Sparse(nn.Module):
    """A model whose embedding has sparse gradients, by its module or by a function."""

    def __init__(self, *, kind: type[nn.Embedding | nn.EmbeddingBag] | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4) if kind is None else kind(8, 4, sparse=True)
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = nn.functional.embedding(ids, self.embedding.weight, sparse=True)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


ALL_FORMS = [*FORMS, "lomo", "adalomo"]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_sparse_embedding_is_refused_by_its_name(
    form: str, kind: type[nn.Embedding | nn.EmbeddingBag]
) -> None:
    """Before anything is touched; one that rests is let be."""
    model, name = Sparse(kind=kind), kind.__name__
    words = rf"embedding is {name}\(sparse=True\).* use {name}\(sparse=False\)"
    with pytest.raises(ConflictError, match=words):
        memrt.prepare(model, [form])
    model.embedding.requires_grad_(False)
    memrt.prepare(model, [form])


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_sparse_gradient_is_refused_by_its_name(form: str) -> None:
    run = memrt.prepare(Sparse(), [form])
    words = (
        r"the gradient of embedding\.weight is torch\.sparse_coo, .* nn\.Embedding\(sparse=False\)"
    )
    with pytest.raises(ValueError, match=words), run.micro_batch():
        run.backward(run.model(torch.tensor([1, 2])).sum())


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_in_pieces_is_refused(form: str) -> None:
    """Reentrant checkpointing, or a second backward, would update on the first piece alone."""
    model = Shared(reentrant=True)
    run = memrt.prepare(model, [form])
    with pytest.raises(RuntimeError, match=r"layer\.\w+ arrived twice"), run.micro_batch():
        run.backward(model.forward(torch.arange(7)))  # by no hook of the model
    model = Shared(reentrant=False)
    run = memrt.prepare(model, [ONE])
    with run.micro_batch():
        run.backward(model(torch.arange(7)))
        with pytest.raises(RuntimeError, match="call backward once, on the sum of the losses"):
            run.backward(model(torch.arange(7)))


class Headed(Shared):
    """Its head's gradient is there before those of the checkpoints; gives what it is told to."""

    def __init__(self, *, gives: str) -> None:
        super().__init__(reentrant=True)
        self.head = nn.Linear(8, 8)
        self.gives = gives

    def forward(self, input_ids: Tensor) -> Any:
        hidden = self.embedding(input_ids)
        for _ in range(2):
            hidden = checkpoint(self.layer, hidden, use_reentrant=self.reentrant).tanh()
        loss = self.head(hidden).square().mean()
        given = {"tensor": loss, "tuple": (None, loss), "dict": {"loss": loss}}
        return given[self.gives]


def _one_micro_batch(run: Session, *, own_backward: bool) -> None:
    with run.micro_batch():
        given = run.model(torch.arange(7))
        loss: Any = next(leaf for leaf in tree_leaves(given) if leaf is not None)
        loss.backward() if own_backward else run.backward(loss)


@pytest.mark.parametrize("own_backward", [False, True])
@pytest.mark.parametrize("gives", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("form", [ONE, "lomo", "adalomo"])
def test_a_models_own_reentrant_checkpoints_are_refused_before_the_first_update(
    form: str, gives: str, own_backward: bool
) -> None:
    model = Headed(gives=gives)
    run, before = memrt.prepare(model, [form]), weights(model)
    words = (
        r"Headed checkpoints with use_reentrant=True.* use checkpoint\(\.\.\., use_reentrant=False"
    )
    with pytest.raises(ValueError, match=words):
        _one_micro_batch(run, own_backward=own_backward)
    assert_equal(weights(model), before)
    assert not model._forward_hooks


def test_the_trainer_refuses_a_models_own_reentrant_checkpoints_before_the_first_update(
    tmp_path: Path,
) -> None:
    model: Any = model_of("llama")
    layer = model.model.layers[0].mlp
    layer.forward = partial(checkpoint, layer.forward, use_reentrant=True)
    trainer = trainer_runs.trainer_of(
        tmp_path, model=model, options={"strategies": [ONE]}, max_grad_norm=0.0
    )
    before = trainer_runs.weights(trainer)
    with pytest.raises(ValueError, match="LlamaForCausalLM checkpoints with use_reentrant=True"):
        trainer.train()
    trainer_runs.assert_equal(trainer_runs.weights(trainer), before)


def test_the_graph_is_looked_at_once_in_a_run() -> None:
    """By the first forward that has one; no hook stays on the model."""
    model = Shared(reentrant=False)
    run, hooks = memrt.prepare(model, [ONE]), []
    for _ in range(2):
        with run.micro_batch():
            with torch.no_grad():
                model(torch.arange(7))
            hooks.append(len(model._forward_hooks))
            run.backward(model(torch.arange(7)))
        hooks.append(len(model._forward_hooks))
        run.step()
    assert hooks == [1, 0, 0, 0]


@pytest.mark.parametrize("form", FORMS)
def test_reentrant_checkpointing_is_refused_before_the_first_update(
    form: str, tmp_path: Path
) -> None:
    model = model_of("llama")
    checkpointing = trainer_runs.CHECKPOINTING
    getattr(model, f"{checkpointing}_enable")({"use_reentrant": True})
    with pytest.raises(ConflictError, match=r"use_reentrant=True.*'use_reentrant': False"):
        memrt.prepare(model, [form])
    trainer = trainer_runs.trainer_of(
        tmp_path,
        options={"strategies": [form]},
        max_grad_norm=FORMS[form],
        **{checkpointing: True, f"{checkpointing}_kwargs": {"use_reentrant": True}},
    )
    before = trainer_runs.weights(trainer)
    with pytest.raises(ValueError, match="use_reentrant=True"):
        trainer.train()
    trainer_runs.assert_equal(trainer_runs.weights(trainer), before)


def test_a_micro_batch_after_the_last_is_refused() -> None:
    model = model_of("plain")
    run = memrt.prepare(model, [ONE])
    with run.micro_batch():
        run.backward(model_loss(model, batch_of("plain")))
    with pytest.raises(RuntimeError, match="pass last=False"), run.micro_batch():
        pass


def test_two_passes_need_their_own_backward() -> None:
    model = model_of("plain")
    run = memrt.prepare(model, [TWO])
    with pytest.raises(RuntimeError, match=r"run.backward\(loss\) in place of"), run.micro_batch():
        model_loss(model, batch_of("plain")).backward()


def test_an_abandoned_step_leaves_no_trace_and_detach_no_hook() -> None:
    model = model_of("plain")
    run = memrt.prepare(model, [TWO], max_grad_norm=1.0)
    with run.micro_batch():
        run.backward(model_loss(model, batch_of("plain")))
    run.abandon_step()
    train(run, "plain", count=1)
    run.detach()
    before = weights(model)
    model_loss(model, batch_of("plain")).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert_equal(weights(model), before)


def test_gradients_outside_a_micro_batch_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model = model_of("plain")
    run = memrt.prepare(model, [ONE])
    train(run, "plain", count=1)
    before = weights(model)
    model_loss(model, batch_of("plain")).backward()  # such as a user's own probe
    assert_equal(weights(model), before)
    assert all(p.grad is not None for p in model.parameters())
