"""Strategies under Hugging Face's face: a mixin over transformers' Trainer, and `Trainer` itself.

    class T(MemoryMixin, SFTTrainer): ...       # over any subclass of transformers.Trainer

The mixin attaches a `Session` at the end of `__init__` and drives it from the Trainer's own
extension points; the training loop stays transformers'. Without strategies it changes nothing but
how a checkpoint comes to its name (`memrt.checkpoint`).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from memrt import registry
from memrt.arguments import settings_of
from memrt.auto_trainer import strategies_within
from memrt.callback import MemoryProfilerCallback, two_counts
from memrt.checkpoint import recover
from memrt.errors import ConflictError
from memrt.evaluation import EvaluationMixin
from memrt.gpus import check_budget
from memrt.memory_report import MemoryReport, ReportMixin
from memrt.optimizer_slots import needs_memrt
from memrt.own_groups import groups_of
from memrt.plain_loop import refuse_untrained, refuse_unused_rounding
from memrt.refused_optimizers import require_served
from memrt.session import Session
from memrt.structure import RunSettings
from memrt.training_step import TrainingStepMixin
from memrt.translation import join, with_own_optimizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from memrt.auto import Choice
    from memrt.strategy import Strategy

__all__ = ["MemoryMixin", "Trainer", "unwrap_mixed_precision"]

_OWN_OPTIMIZER = (
    "leave it out of optimizers and give its class and settings as optimizer_cls_and_kwargs, from "
    "which the Trainer makes it over all that trains"
)


class _Steps(transformers.TrainerCallback):  # type: ignore[misc]
    """Tells the mixin where training and its optimizer steps begin and end."""

    def __init__(self, trainer: MemoryMixin) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begin_training()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._begin_step()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self._trainer._report is not None:
            self._trainer._report.begin_update()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._trainer._end_step()


class MemoryMixin(TrainingStepMixin, EvaluationMixin, ReportMixin):
    """Put it before a Trainer class: `class T(MemoryMixin, SomeTrainer)`.

    The fields of `memrt.TrainingArguments` that plain arguments (of transformers, of TRL) lack are
    keywords too; what both say must be the same.

    strategies: names such as `"lisa(layers=2)"`, JSON, or Strategy objects; only in one place.
    memory_budget: a card or a size, such as `"24GiB"`: adds the strategies that change training
        least and fit it, when the Trainer is made; `memory_choice` says which, and why.
    memory_report: count the first 3 optimizer steps, watch the rest, and write
        `<output_dir>/memrt/report.md`, `.json` and `.html`.
    probe_dataset: the held-out data that some strategies look at.
    """

    args: Any
    optimizer: Any
    memory_choice: Choice | None = None
    """What `memory_budget` chose, and why; None without it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if transformers.Trainer in order[: order.index(MemoryMixin)]:
            raise TypeError(f"{cls.__name__}: MemoryMixin must come before the Trainer class")

    def __init__(
        self,
        *args: Any,
        strategies: Sequence[str | Strategy | Mapping[str, Any]] | None = None,
        memory_budget: str | None = None,
        memory_report: bool | None = None,
        probe_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        self._built: torch.optim.Optimizer | None = None
        if memory_budget is not None:
            check_budget(memory_budget)
        if memory_report is not None and not isinstance(memory_report, bool):
            raise ValueError(f"memory_report={memory_report!r}: must be True or False")
        super().__init__(*args, **kwargs)
        in_arguments = getattr(self.args, "strategies", [])
        if strategies and in_arguments:
            raise ValueError(
                f"strategies={list(strategies)!r} were given to the Trainer and "
                f"{in_arguments!r} in its arguments; give them in one place"
            )
        require_served(self.args.optim)
        self.args, named = with_own_optimizer(self.args)
        self._strategies = registry.parse_all(
            join(registry.parse_all(strategies or in_arguments), named, subject="args.optim")
        )
        budget = _said_once("memory_budget", memory_budget, self.args)
        if budget is not None:
            unwrap_mixed_precision(self._bare_model())
            self._strategies = strategies_within(self, self._strategies, budget)
        if probe_dataset is not None and not self._strategies:
            raise ValueError("probe_dataset is what strategies look at, and there is none")
        self._probe_dataset = probe_dataset
        self._stop_on_nonfinite = getattr(self.args, "stop_on_nonfinite", False)
        self._report_is_due = bool(_said_once("memory_report", memory_report, self.args))
        if self._strategies or self._report_is_due:
            self._attach()
            self.add_callback(_Steps(self))
            # first in the row, so that the user's callbacks see what the strategies made active
            callbacks = self.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop())

    # ---------------------------------------------------------------- session

    def _attach(self) -> None:
        """A session over the model of now; refuses before anything is touched."""
        report = MemoryReport(device=self.args.device) if self._report_is_due else None
        settings = self._run_settings()
        model = self._bare_model()
        unwrap_mixed_precision(model)  # an earlier Trainer's would hide a forward of a strategy's
        before = set(model.parameters())
        session = Session(
            model,
            self._strategies,
            settings=settings,
            ledger=None if report is None else report.ledger,
            probe_batches=None if self._probe_dataset is None else self._probe_batches,
        )
        try:
            if session.rules() and settings.optimizer != "adamw":
                raise _optimizer_conflict(settings.optimizer, session)
            if not settings.stochastic_rounding:
                refuse_unused_rounding(session, settings.stochastic_rounding)
            self._refuse_own_step(session)
            if session.attachments and self.optimizer is not None:
                refuse_untrained(session, self.optimizer, before=before, remedy=_OWN_OPTIMIZER)
        except BaseException:
            session.detach()
            raise
        if self._report is not None:
            self._report.close()  # it watches a model that is gone
        self.session, self._report = session, report

    def _run_settings(self) -> RunSettings:
        args = self.args
        sharded = "fsdp" if args.fsdp else "deepspeed" if self.is_deepspeed_enabled else None
        if sharded is None and args.world_size > 1:
            sharded = "distributed data parallel"  # expects of gradients what the others do
        found = settings_of(args)
        recomputes = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        return replace(
            found,
            optimizer=self._own_optimizer() or found.optimizer,
            fp16=self.accelerator.mixed_precision == "fp16",
            sharded=sharded,
            gradient_checkpointing=recomputes or found.gradient_checkpointing,
            custom_loss=self.compute_loss_func is not None,
        )

    def _own_optimizer(self) -> str | None:
        """The name of an optimizer that the user gave, or its class."""
        if self.optimizer is not None:
            return type(self.optimizer).__name__
        if self.optimizer_cls_and_kwargs is not None:
            return str(self.optimizer_cls_and_kwargs[0].__name__)
        return None

    def _probe_batches(self, count: int) -> list[Any]:
        """The first `count` batches of the probe set; no RNG and no loader is advanced."""
        collate = self._get_collator_with_removed_columns(self.data_collator, description="probe")
        with torch.random.fork_rng(devices=[]):
            rows = iter(self._probe_dataset)
            chunks = [list(islice(rows, self.args.eval_batch_size)) for _ in range(count)]
            return [self._prepare_inputs(collate(chunk)) for chunk in chunks if chunk]

    # ---------------------------------------------------------------- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `train`, once what a killed save may have left is in order."""
        if self._strategies and not getattr(self.session, "attachments", None):
            raise RuntimeError("the model was exported without its strategies; make a new Trainer")
        if self._report_is_due and any(
            isinstance(each, MemoryProfilerCallback) for each in self.callback_handler.callbacks
        ):
            raise two_counts()
        if self.args.should_save:
            recover(Path(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

    def _hp_search_setup(self, trial: Any) -> None:
        """Every `train()` comes here when model and arguments are final: `model_init` has run."""
        super()._hp_search_setup(trial)
        if self.session is not None and self.session.model is not self._bare_model():
            self._attach()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            self._end_report()

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The Trainer's own, or the strategies' over the groups of that one."""
        session = self.session
        composes = session is not None and self.optimizer is None and bool(session.rules())
        optimizer = super().create_optimizer(*([] if model is None else [model]))
        if session is not None and composes and type(self.optimizer) is torch.optim.AdamW:
            groups = groups_of(self.optimizer, session, self.model if model is None else model)
            optimizer = self.optimizer = self._built = session.build_optimizer(groups)
        if session is not None:
            self._adopt(session)
        return optimizer

    def _adopt(self, session: Session) -> None:
        raw = self.optimizer
        while hasattr(raw, "optimizer"):  # accelerate's wrapper
            raw = raw.optimizer
        if needs_memrt(session.rules()) and raw is not self._built:
            raise _optimizer_conflict(type(raw).__name__, session)
        if session.optimizer is not raw:
            session.adopt_optimizer(raw)

    def _begin_training(self) -> None:
        assert self.session is not None
        self.session.abandon_step()
        self._adopt(self.session)  # a subclass may make its optimizer in another way
        if self._report is not None:
            self._report.begin_training()

    def _begin_step(self) -> None:
        assert self.session is not None
        if self._report is not None:
            self._report.begin_step()
        self.session.last_checkpoint = self._last_checkpoint
        self.session.begin_step()

    def _end_step(self) -> None:
        assert self.session is not None
        self.session.end_step()
        if self._report is not None and self._report.end_step():
            self.session.drop_ledger()
            self._write_report(self._report)  # now, for who looks while the run goes on

    # ---------------------------------------------------------------- gradient norm

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.session is not None and self.session.has_hidden_gradients:
            return self.session.clip_gradients(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        session = self.session
        if grad_norm is None and session is not None and session.has_hidden_gradients:
            grad_norm = session.gradient_norm()
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' `log`; a norm that is not the gradient's own is not called so."""
        kind = "exact" if self.session is None else self.session.norm_kind
        if kind != "exact" and "grad_norm" in logs:
            new = f"grad_norm_{kind}"
            logs = {new if key == "grad_norm" else key: value for key, value in logs.items()}
        super().log(logs, *args, **kwargs)


def unwrap_mixed_precision(model: nn.Module) -> None:
    """Take off the forward that accelerate puts on a model's instance for bf16 and fp16."""
    original = vars(model).pop("_original_forward", None)
    if original is None:
        return
    vars(model).pop("forward", None)
    # otherwise accelerate takes the model for wrapped, and the next run has no autocast
    vars(model).pop("_is_accelerate_prepared", None)
    if getattr(original, "__func__", None) is not type(model).forward:
        model.forward = original  # it was the instance's own before


def _said_once(name: str, keyword: Any, arguments: Any) -> Any:
    """A setting of the Trainer's keywords or of its arguments, which may not differ."""
    found = getattr(arguments, name, None)
    if keyword is None:
        return found
    if found and found != keyword:
        raise ValueError(
            f"{name}={keyword!r} was given to the Trainer and {name}={found!r} in its arguments; "
            "give it in one place"
        )
    return keyword


def _optimizer_conflict(optimizer: str, session: Session) -> ConflictError:
    bringing = ", ".join(a.name for a in session.attachments if a.rules())
    return ConflictError(
        [
            f"the optimizer {optimizer} has its own update rule and {bringing} builds on memrt's "
            "AdamW; leave the optimizer out (optim='adamw_torch_fused', the default)"
        ]
    )


class Trainer(MemoryMixin, transformers.Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with memory strategies."""
