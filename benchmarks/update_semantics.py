"""What training a part at a time, or updating in backward, keeps of ordinary training.

Every cell is found by asking or by trying, on a module of a few thousand parameters: what a stack
refuses is what `memrt.compose.conflicts` says of it, and what it keeps is shown by runs that must
agree (see the functions below, one a column). `docs/update-time.md` has the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memrt import registry
from memrt.compose import conflicts
from memrt.profiling.ledger import Ledger
from memrt.runner import Run, start, train_step
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
)
"""The stacks of the rows."""

KEPT, REFUSED, LOST = "kept", "refused", "not kept"
_EPSILON = 1.0  # makes AdamW feel the size of a gradient, which it otherwise divides out


def _model(kind: type[PlainModel] = PlainModel, *, layers: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(hidden=16, layers=layers).train()


def _settings(form: tuple[str, ...], **options: Any) -> RunSettings:
    own_rule = form[0].startswith(("lomo", "adalomo"))
    epsilon = {} if own_rule else {"epsilon": _EPSILON}
    return RunSettings(**{"learning_rate": 0.1, **epsilon, **options})


def _refuses(form: tuple[str, ...], model: nn.Module | None = None, **options: Any) -> bool:
    model = _model() if model is None else model
    facts = Facts(model=model, structure=discover(model), settings=_settings(form, **options))
    return bool(conflicts(registry.parse_all(form), facts))


def _run(form: tuple[str, ...], *, model: nn.Module | None = None, **options: Any) -> Run:
    model = _model() if model is None else model
    return start(model, registry.parse_all(form), settings=_settings(form, **options))


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
    ledger, model = Ledger(), _model(layers=12)
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
    return KEPT if _norm_is_true(run, _model()) else LOST


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
        one, other = (_run(each, model=_model(_Tied)) for each in (form, after_backward))
        return _agree(_train(one), _train(other))
    return KEPT if _norm_is_true(_run(form, model=_model(_Tied)), _model(_Tied)) else LOST


def checkpointing(form: tuple[str, ...]) -> str:
    """Layers that are run again in backward give the bits of layers that are not."""
    with_it = (*form, "activation_checkpoint")
    return REFUSED if _refuses(with_it) else _agree(_train(_run(with_it)), _train(_run(form)))


def reentrant(form: tuple[str, ...]) -> str:
    """Whether a model that checkpoints with `use_reentrant=True` is refused."""
    model = _model()
    vars(model).update(
        gradient_checkpointing=True,
        _gradient_checkpointing_func=partial(checkpoint, use_reentrant=True),
    )
    return REFUSED if _refuses(form, model) else "not refused"


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
    model = _model(_Mixed)
    model.get_submodule("layers").bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = _train(_run(form, model=model), steps=6)
    sound = all(
        after[n].dtype is before[n].dtype and bool(torch.isfinite(after[n]).all()) for n in after
    )
    moved = {n for n in after if not torch.equal(after[n], before[n])}
    return KEPT if sound and any(after[n].dtype is torch.bfloat16 for n in moved) else LOST


COLUMNS: dict[str, Callable[[tuple[str, ...]], str]] = {
    "gradients held, 1 micro-batch": partial(_held, parts=1),
    "2 micro-batches": partial(_held, parts=2),
    "accumulation": accumulation,
    "max_grad_norm": clipping,
    "grad_norm": grad_norm,
    "schedulers": schedulers,
    "options of groups": group_options,
    "tied weights": tied_weights,
    "checkpointing": checkpointing,
    "reentrant": reentrant,
    "mixed dtypes": mixed_dtypes,
    "fp16 scaling": lambda form: REFUSED if _refuses(form, fp16=True) else "not refused",
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
