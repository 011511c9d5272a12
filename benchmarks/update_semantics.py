"""What training a part at a time, or updating in backward, keeps of ordinary training.

Every cell is found by asking or by trying, on a module of a few thousand parameters (some ten
thousand where moments have fewer bits, which small parameters do not get): what a stack refuses is
what `memrt.compose.conflicts` says of it, and what it keeps is shown by runs that must agree (see
the functions below, one a column). `docs/update-time.md` has the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memrt import registry
from memrt.compose import conflicts
from memrt.profiling.ledger import Ledger
from memrt.runner import Run, start, train_step
from memrt.strategy import Strategy
from memrt.structure import Facts, RunSettings, discover
from memrt.testing import PlainModel, tiny_batches

__all__ = ["COLUMNS", "FORMS", "markdown", "semantics"]

TWO = "(clip='two_pass')"
FORMS: tuple[tuple[str, ...], ...] = (
    ("lisa(layers=2, every=1)",),
    ("badam(every=1)",),
    ("in_backward",),
    (f"in_backward{TWO}",),
    ("galore(rank=4)", "in_backward"),
    ("galore(rank=4)", f"in_backward{TWO}"),
    ("lomo",),
    (f"lomo{TWO}",),
    ("adalomo",),
    (f"adalomo{TWO}",),
    ("galore(rank=4, form='plain')", "in_backward"),
    ("q_galore(rank=4)", "in_backward"),
    ("apollo(rank=4)", "in_backward"),
    ("apollo_mini", "in_backward"),
    ("fira(rank=4)", "in_backward"),
    ("int8_states", "in_backward"),
    ("fp8_states", "in_backward"),
    ("int4_states", "in_backward"),
)
"""The stacks of the rows."""

KEPT, REFUSED, LOST = "kept", "refused", "not kept"
FEW_BITS = ("q_galore", "int8_states", "fp8_states", "int4_states")
"""Formats of moments, which parameters of fewer than 4096 elements do not take."""
_EPSILON = 1.0  # makes AdamW feel the size of a gradient, which it otherwise divides out


def _model(
    form: tuple[str, ...], kind: type[PlainModel] = PlainModel, *, layers: int = 3
) -> nn.Module:
    hidden = 48 if any(spec.startswith(FEW_BITS) for spec in form) else 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(hidden=hidden, layers=layers).train()


def updates_in_backward(form: tuple[str, ...]) -> bool:
    """Whether this is an in-backward form; the others train a part at a time."""
    return form[-1].startswith(("in_backward", "lomo", "adalomo"))


def _settings(form: tuple[str, ...], **options: Any) -> RunSettings:
    own_rule = form[0].startswith(("lomo", "adalomo"))
    epsilon = {} if own_rule else {"epsilon": _EPSILON}
    return RunSettings(**{"learning_rate": 0.1, **epsilon, **options})


def _refuses(form: tuple[str, ...], model: nn.Module | None = None, **options: Any) -> bool:
    model = _model(form) if model is None else model
    facts = Facts(model=model, structure=discover(model), settings=_settings(form, **options))
    return bool(conflicts(registry.parse_all(form), facts))


def _run(
    form: tuple[str, ...],
    *,
    model: nn.Module | None = None,
    strategies: list[Strategy] | None = None,
    **options: Any,
) -> Run:
    model = _model(form) if model is None else model
    strategies = registry.parse_all(form) if strategies is None else strategies
    return start(model, strategies, settings=_settings(form, **options))


def _train(run: Run, *, steps: int = 2, parts: int = 1, factor: float = 1.0) -> dict[str, Tensor]:
    """Every step sees its batch, `parts` times; the loss is their mean, times `factor`."""
    loss_of = run.loss_of
    run.loss_of = lambda model, batch: loss_of(model, batch) * factor
    for step in range(steps):
        train_step(run, tiny_batches("plain", seed=step) * parts)
    return {name: p.detach().clone() for name, p in run.session.model.named_parameters()}


def _agree(one: Mapping[str, Tensor], other: Mapping[str, Tensor], *, rtol: float = 0.0) -> str:
    equal = all(torch.allclose(one[name], other[name], rtol=rtol, atol=rtol) for name in one)
    return KEPT if equal else LOST


def _held(form: tuple[str, ...], parts: int) -> str:
    """The largest gradients account that the ledger counts, of the bytes of all parameters."""
    if parts > 1 and _refuses(form, accumulation_steps=parts):
        return REFUSED
    ledger, model = Ledger(), _model(form, layers=12)
    with ledger:
        run = start(model, registry.parse_all(form), settings=_settings(form), ledger=ledger)
        for step in range(2):
            train_step(run, tiny_batches("plain", seed=step, length=4) * parts)
    ledger.close()
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return f"{ledger.timeline.account_maxima()['gradients'] / whole:.0%}".replace("%", " %")


# ---------------------------------------------------------------- columns


def accumulation(form: tuple[str, ...]) -> str:
    """A batch that comes twice, at half the loss, gives the bits of the batch that comes once.

    Projected gradients are summed inside a matrix product, which rounds in another order.
    """
    if _refuses(form, accumulation_steps=2):
        return REFUSED
    one, other = _run(form), _run(form)
    rtol = 0.0 if one.session.norm_kind == "exact" else 1e-5
    return _agree(_train(one, parts=2), _train(other), rtol=rtol)


def clipping(form: tuple[str, ...]) -> str:
    """With `max_grad_norm` a loss that is 1024 times as large gives the same weights."""
    if _refuses(form, max_grad_norm=1e-2):
        return REFUSED
    one, other = (_run(form, max_grad_norm=1e-2) for _ in range(2))
    return _agree(_train(one), _train(other, factor=1024.0), rtol=1e-3)


def grad_norm(form: tuple[str, ...]) -> str:
    """The norm that is logged is that of the gradients that autograd gives a plain model."""
    run = _run(form)
    if run.session.norm_kind != "exact":
        return run.session.norm_kind
    return KEPT if _norm_is_true(run, _model(form)) else LOST


def _norm_is_true(run: Run, plain: nn.Module) -> bool:
    (batch,) = tiny_batches("plain")
    run.session.train_micro_batch(lambda: run.loss_of(run.session.model, batch))
    trains = {name for name, p in run.session.model.named_parameters() if p.requires_grad}
    torch.autograd.backward(run.loss_of(plain, batch))
    gradients = [p.grad for name, p in plain.named_parameters() if name in trains]
    expected = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return bool(torch.allclose(run.session.gradient_norm(), expected, rtol=1e-6))


def schedulers(form: tuple[str, ...]) -> str:
    """A rate that a schedule sets to 0 after two steps stops every weight."""
    run = _run(form)
    assert run.session.optimizer is not None
    scheduler = torch.optim.lr_scheduler.StepLR(run.session.optimizer, step_size=2, gamma=0.0)
    moved = _train(run, steps=1)
    scheduler.step()
    before = _train(run, steps=1)
    scheduler.step()
    still = _agree(_train(run, steps=1), before) == KEPT
    return KEPT if still and _agree(moved, before) == LOST else LOST


def group_options(form: tuple[str, ...]) -> str:
    """A group with the rate 0 stays, and the others move."""
    run = _run(form)
    named = list(run.session.model.named_parameters())
    before = {name: p.detach().clone() for name, p in named}
    frozen = [item for item in named if item[1].ndim == 1]
    rest = [item for item in named if item[1].ndim != 1]
    groups: list[dict[str, Any]] = [{"params": frozen, "lr": 0.0}, {"params": rest}]
    run.session.adopt_optimizer(run.session.build_optimizer(groups))
    after = _train(run)
    stay = all(torch.equal(after[name], before[name]) for name, _ in frozen)
    move = any(not torch.equal(after[name], before[name]) for name, _ in rest)
    return KEPT if stay and move else LOST


class _Tied(PlainModel):
    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.head.weight = self.embedding.weight


def tied_weights(form: tuple[str, ...]) -> str:
    """The gradient of a weight that is used twice is the sum, in one update."""
    after_backward = tuple(spec for spec in form if not spec.startswith("in_backward"))
    if _run(form).session.norm_kind != "exact":  # of a projected gradient only the update shows it
        one, other = (_run(each, model=_model(form, _Tied)) for each in (form, after_backward))
        return _agree(_train(one), _train(other))
    return (
        KEPT if _norm_is_true(_run(form, model=_model(form, _Tied)), _model(form, _Tied)) else LOST
    )


def checkpointing(form: tuple[str, ...]) -> str:
    """Layers that are run again in backward give the bits of layers that are not."""
    with_it = (*form, "activation_checkpoint")
    return REFUSED if _refuses(with_it) else _agree(_train(_run(with_it)), _train(_run(form)))


class _Reentrant(PlainModel):
    """Told to checkpoint with `use_reentrant=True`; its embeddings' output always wants a gradient.

    transformers sees to the latter: a reentrant checkpoint gives none where no input wants one.
    """

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = partial(checkpoint, use_reentrant=True)

    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        hidden = hidden if hidden.requires_grad else hidden.requires_grad_()
        for layer in self.layers:
            hidden = hidden + self._gradient_checkpointing_func(layer, hidden)
        logits = self.head(hidden)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def reentrant(form: tuple[str, ...]) -> str:
    """A model that checkpoints with `use_reentrant=True` gives the bits of one that does not."""
    if _refuses(form, _model(form, _Reentrant)):
        return REFUSED
    return _agree(_train(_run(form, model=_model(form, _Reentrant))), _train(_run(form)))


class _Mixed(PlainModel):
    def forward(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden.bfloat16()).float()
        logits = self.head(hidden)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def mixed_dtypes(form: tuple[str, ...]) -> str:
    """Layers in bf16 between an embedding and a head in fp32: dtypes stay, layers move."""
    model = _model(form, _Mixed)
    model.get_submodule("layers").bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = _train(_run(form, model=model), steps=6)
    sound = all(
        after[n].dtype is before[n].dtype and bool(torch.isfinite(after[n]).all()) for n in after
    )
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    return KEPT if sound and any(after[n].dtype is torch.bfloat16 for n in moved) else LOST


def fp16_scaling(form: tuple[str, ...]) -> str:
    """With torch's scaler the same bits (its factor is a power of two), an overflow skipped."""
    if _refuses(form, fp16=True):
        return REFUSED
    scaled, plain = _run(form), _run(form)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = scaled.session.optimizer
    assert optimizer is not None
    for step in range(3):
        (batch,) = tiny_batches("plain", seed=step)
        overflows = step == 1
        factor = math.inf if overflows else 1.0
        with scaled.session.micro_batch():  # what trains is chosen here
            loss = scaled.loss_of(scaled.session.model, batch) * factor
            scaled.session.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scaled.session.end_step()
        if overflows:
            plain.session.begin_step()
            plain.session.end_step()
        else:
            train_step(plain, [batch])
    one, other = (dict(run.session.model.named_parameters()) for run in (scaled, plain))
    return _agree(one, other)


SWITCHES = ("embeddings", "head")


def _switched(form: tuple[str, ...], value: bool) -> list[Strategy]:
    """The stack with every option that is about embeddings or head set so."""
    return [
        replace(each, **{f.name: value for f in fields(each) if f.name in SWITCHES})
        for each in registry.parse_all(form)
    ]


def embeddings_and_head(form: tuple[str, ...]) -> str:
    """An option takes them in and leaves them out.

    Of what trains: all of them move, or none. Of what is updated in backward: their gradients are
    gone afterwards, or all there, waiting for the step, which gives the same bits.
    """
    on, off = (_run(form, strategies=_switched(form, value)) for value in (True, False))
    structure = on.session.facts.structure
    names = [name for name, _ in on.session.model.named_parameters()]
    outside = {name for name in names if structure.layer_of(name) is None}
    if not updates_in_backward(form):
        found = [_moved(run) & outside for run in (on, off)]
        return KEPT if found == [outside, set()] else LOST
    found = [_waiting(run) & outside for run in (on, off)]
    if found != [set(), outside]:
        return LOST
    return _agree(*(_train(_run(form, strategies=_switched(form, v))) for v in (True, False)))


def _moved(run: Run) -> set[str]:
    """What changes in as many steps as the longest round of blocks has."""
    before = {name: p.detach().clone() for name, p in run.session.model.named_parameters()}
    after = _train(run, steps=5)
    return {name for name in after if not torch.equal(after[name], before[name])}


def _waiting(run: Run) -> set[str]:
    """What has a gradient when backward is over."""
    (batch,) = tiny_batches("plain")
    run.session.train_micro_batch(lambda: run.loss_of(run.session.model, batch))
    return {name for name, p in run.session.model.named_parameters() if p.grad is not None}


COLUMNS: dict[str, Callable[[tuple[str, ...]], str]] = {
    "gradients held, 1 micro-batch": partial(_held, parts=1),
    "2 micro-batches": partial(_held, parts=2),
    "accumulation": accumulation,
    "max_grad_norm": clipping,
    "grad_norm": grad_norm,
    "schedulers": schedulers,
    "options of groups": group_options,
    "embeddings and head switchable": embeddings_and_head,
    "tied weights": tied_weights,
    "checkpointing": checkpointing,
    "reentrant": reentrant,
    "mixed dtypes": mixed_dtypes,
    "fp16 scaling": fp16_scaling,
    "DDP": lambda form: (
        REFUSED if _refuses(form, sharded="distributed data parallel") else "not refused"
    ),
}
"""Column -> how a cell is found."""


def semantics() -> dict[str, dict[str, str]]:
    """Stack -> column -> cell."""
    return {
        "+".join(form): {title: find(form) for title, find in COLUMNS.items()} for form in FORMS
    }


def markdown() -> str:
    """The table."""
    rows = [("stack", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    rows += [(f"`{stack}`", *cells.values()) for stack, cells in semantics().items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
