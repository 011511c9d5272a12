"""One run of `memrt train`: check everything, predict, train, evaluate, write model and report."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from memrt.checkpoint import load_state
from memrt.checkpoint_loading import read_trainer_state
from memrt.cli.train_budget import with_saved_choice, within_budget
from memrt.cli.train_classes import (
    classifier_of,
    data_for,
    frozen_head,
    metrics_for,
    require_metric,
    without_unused_types,
)
from memrt.cli.train_config import folder_of
from memrt.cli.train_console import ConsoleCallback, Intervals, Speed
from memrt.cli.train_elsewhere import hub_errors, require_callbacks, require_hub
from memrt.cli.train_folder import RunFolder, best_beside
from memrt.cli.train_length import require_longer
from memrt.cli.train_model import TrainedModel, tokenizer_for
from memrt.cli.train_optimizer import require_optimizer
from memrt.cli.train_plan import predict
from memrt.cli.train_publish import write_trained
from memrt.cli.train_report import conditions_of, deliver, read_counted
from memrt.data import Collator, load_examples
from memrt.data_files import require_file
from memrt.memory_report import NUM_STEPS, losses_of
from memrt.model_source import CLASSIFICATION
from memrt.profiling.fake import NotPlannableError
from memrt.profiling.monitor import Monitor
from memrt.profiling.render_train import peak_line
from memrt.profiling.report import SCHEMA
from memrt.trainer import Trainer

if TYPE_CHECKING:
    from memrt.cli.train_config import TrainConfig
    from memrt.cli.train_words import Words

__all__ = ["TrainRun"]

_MOST_LABELS = 10


class TrainRun:
    """Everything that one run needs; the output folder is touched when all of it is checked."""

    def __init__(self, settings: TrainConfig, words: Words) -> None:
        self.settings = settings
        self._words = words
        self._folder: RunFolder | None = None
        self._began_from: str | None = None
        self._predicted: dict[str, Any] | None = None
        self._loading: dict[str, Any] = {}
        self._is_chosen = False

    def last_checkpoint(self) -> str | None:
        """The newest whole checkpoint, if the run came that far, or the one that it began from."""
        newest = None if self._folder is None else self._folder.last_checkpoint()
        return newest or self._began_from

    def train(self) -> None:
        """The whole run."""
        _require_one_process()
        for argument, path in self.settings.data.paths():
            if path is not None:
                require_file(path, f"data.{argument}")
        # errors of the settings come before the model is read
        require_optimizer(self.settings.arguments)
        require_callbacks(self.settings.arguments.report_to)
        require_hub(self.settings.arguments)
        folder = self._claim()
        self._began_from = None if folder.checkpoint is None else str(folder.checkpoint)
        _say(
            f"output: {folder.path}" + (f", from {folder.checkpoint}" if folder.checkpoint else "")
        )
        with _memory_errors(self.settings.arguments.device), _without_bars():
            self._prepare(folder)
            kept = folder.open(self.settings)
            self._folder = folder
            if kept is not None:
                _say(f"the earlier run is now {kept}")
            self._train(folder)

    # ---------------------------------------------------------------- before

    def _claim(self) -> RunFolder:
        if self._words.resume:
            named = self._words.resume_from
            start = None if named is None else folder_of(named)
            saved = RunFolder.settings_of(start or self.settings.output)
            chosen = None if saved is None else with_saved_choice(self.settings, saved)
            if chosen is not None:
                self.settings, self._is_chosen = chosen, True
            return RunFolder.resumed(self.settings, start)
        folder = RunFolder.fresh(self.settings.output, overwrite=self._words.overwrite)
        folder.require_outside(self.settings)
        return folder

    def _prepare(self, folder: RunFolder) -> None:
        settings = self.settings
        self._model = TrainedModel.resolve(settings)
        require_metric(settings.arguments, self._model.task)
        self._load_data(folder)
        train, evaluation = self._data.train, self._data.evaluation
        held_out = "" if evaluation is None else f", {len(evaluation):,} to evaluate on"
        _say(f"{self._model.name}; {len(train):,} examples to train on{held_out}")
        if folder.checkpoint is not None:
            require_longer(folder.checkpoint, settings.arguments, num_examples=len(train))
        if not self._is_chosen:
            settings = within_budget(settings, self._model, train, self._collator, _say)
        self.settings = settings
        try:
            self._predicted = predict(settings, self._model, train, self._collator)
        except (RuntimeError, NotImplementedError, NotPlannableError) as error:
            # a model that fake tensors cannot run can still be trained
            _say(f"no prediction: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            _say(peak_line(self._predicted))

    def _load_data(self, folder: RunFolder) -> None:
        """The tokenizer, the examples, and a model with what of these its config holds."""
        data = data_for(self.settings, self._model.task)
        self._tokenizer, self._tokenizer_name = tokenizer_for(
            self.settings, self._model, data, checkpoint=folder.checkpoint
        )
        self._model = self._model.with_tokens_of(self._tokenizer)
        self._collator = Collator.for_tokenizer(self._tokenizer)
        if not self._is_classifier:
            self._data = load_examples(data, self._tokenizer)
            return
        self._model, labels = classifier_of(self._model, data, self._tokenizer, self._collator)
        examples = load_examples(data, self._tokenizer, labels=labels)
        self._data = without_unused_types(examples, self._model.config)
        names = ", ".join(labels.names[:_MOST_LABELS])
        more = "" if len(labels.names) <= _MOST_LABELS else ", ..."
        _say(f"classification; {len(labels.names)} labels: {names}{more}")

    @property
    def _is_classifier(self) -> bool:
        return self._model.task == CLASSIFICATION

    def _trainer(self) -> tuple[Trainer, Speed, ConsoleCallback]:
        settings, arguments = self.settings, self.settings.arguments
        model, notes = self._load_model() if arguments.memory_report else self._model.load(settings)
        for note in notes:
            _say(f"note: {note}")
        with hub_errors(arguments):
            trainer = Trainer(
                model=model,
                args=arguments,
                train_dataset=self._data.train,
                eval_dataset=self._data.evaluation,
                data_collator=self._collator,
                processing_class=self._tokenizer,
                # for strategies that look at data before the first step
                probe_dataset=self._data.train if arguments.strategies else None,
                **metrics_for(self._model.task),
            )
        if self._is_classifier:
            # its loss is a mean over each micro-batch, whatever the number of items it is told
            trainer.model_accepts_loss_kwargs = False
            self._tell_of_frozen_head(model)
        speed = Speed(num_counted_steps=NUM_STEPS if arguments.memory_report else 0)
        console = ConsoleCallback(speed, with_bar=not arguments.disable_tqdm)
        for theirs in (PrinterCallback, ProgressCallback):  # they write to stdout
            trainer.remove_callback(theirs)
        for ours in (Intervals(), speed, console):
            trainer.add_callback(ours)
        return trainer, speed, console

    def _load_model(self) -> tuple[Any, list[str]]:
        """The model and what to tell of it, with loading watched for the memory report."""
        with Monitor(device=self.settings.arguments.device) as monitor, monitor.phase("load"):
            loaded: tuple[Any, list[str]] = self._model.load(self.settings)
        self._loading = monitor.report().to_json()["phases"]
        return loaded

    def _tell_of_frozen_head(self, model: Any) -> None:
        frozen = frozen_head(model)
        if frozen and self._model.has_new_head:
            _say(
                f"note: the new head ({', '.join(frozen)}) stays as it was drawn, for the "
                "strategies freeze it; with peft: peft(options={'modules_to_save': "
                f"['{frozen[0].partition('.')[0]}']}})"
            )

    # ---------------------------------------------------------------- the run

    def _train(self, folder: RunFolder) -> None:
        trainer, speed, console = self._trainer()
        conditions = conditions_of(
            self.settings, self._model, self._data, tokenizer=self._tokenizer_name, trainer=trainer
        )
        checkpoint = folder.checkpoint
        if checkpoint is not None and _steps_left(trainer, checkpoint) <= 0:
            _say(f"{checkpoint} is the last step; nothing is left to train")
            self._load_finished(trainer, checkpoint)
        else:
            try:
                trainer.train(
                    resume_from_checkpoint=None if checkpoint is None else str(checkpoint)
                )
            finally:
                console.close()
        self._evaluate(trainer)
        conditions["steps"] = trainer.state.max_steps
        report = {
            **self._report(trainer, speed, folder),
            "conditions": conditions,
        }
        # adapters alone would lose a head that was drawn for this run
        known = self._model.has_weights and not self._model.has_new_head
        base = self._model.name if known else None
        made = folder.publish_model(lambda made: write_trained(trainer, made, base=base))
        deliver(report, folder.path, as_json=self._words.json)
        _say(f"{made}: {folder.path}, report: {folder.path / 'memrt' / 'report.md'}")

    def _load_finished(self, trainer: Trainer, checkpoint: Path) -> None:
        """The model as the run left it: transformers' `train` would take one more step."""
        trainer._load_from_checkpoint(str(checkpoint))
        if self.settings.strategies:
            assert trainer.session is not None
            state = load_state(checkpoint, self.settings.strategies)
            trainer.session.load_strategy_state(state)
        trainer.state = read_trainer_state(checkpoint)
        best = trainer.state.best_model_checkpoint
        if self.settings.arguments.load_best_model_at_end and best is not None:
            trainer.state.best_model_checkpoint = str(best_beside(checkpoint, Path(best)))
            trainer._load_best_model()

    def _evaluate(self, trainer: Trainer) -> None:
        """At the end, unless the last step was evaluated and is what is kept."""
        if self._data.evaluation is None:
            return
        done = losses_of(trainer.state.log_history, "eval_loss")
        is_last = bool(done) and done[-1]["step"] == trainer.state.global_step
        if not is_last or self.settings.arguments.load_best_model_at_end:
            trainer.evaluate()

    def _report(self, trainer: Trainer, speed: Speed, folder: RunFolder) -> dict[str, Any]:
        losses = losses_of(trainer.state.log_history, "loss")
        evaluations = losses_of(trainer.state.log_history, "eval_loss")
        accuracies = [
            {"step": log["step"], "accuracy": log["eval_accuracy"]}
            for log in trainer.state.log_history
            if "eval_accuracy" in log
        ]
        return {
            "schema": SCHEMA,
            "kind": "train",
            **_with_phases(read_counted(folder.path), self._loading),
            "predicted": self._predicted,
            "tokens_per_second": speed.tokens_per_second,
            "loss": losses[-1]["loss"] if losses else None,
            "losses": losses,
            "evaluation_loss": evaluations[-1]["loss"] if evaluations else None,
            "evaluation_losses": evaluations,
            "evaluation_accuracy": accuracies[-1]["accuracy"] if accuracies else None,
            "evaluation_accuracies": accuracies,
            "steps": trainer.state.global_step,
            "resumed_from": None if folder.checkpoint is None else str(folder.checkpoint),
            "output": str(folder.path),
            "data": {**self._data.summary.as_dict(), "label_names": self._data.label_names},
        }


def _with_phases(counted: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """What a memory report holds, with phases that were over before the Trainer watched."""
    monitor = counted["monitor"]
    if monitor is None:
        return counted
    return {**counted, "monitor": {**monitor, "phases": {**earlier, **monitor["phases"]}}}


def _steps_left(trainer: Trainer, checkpoint: Path) -> int:
    """Steps from a checkpoint to the end; tells where the end is another than when it was saved."""
    state = read_trainer_state(checkpoint)
    loader = trainer.get_train_dataloader()
    total = int(trainer.set_initial_training_values(trainer.args, loader)[-1])
    left = total - int(state.global_step)
    if left > 0 and total != state.max_steps:
        _say(
            f"the run was to have {state.max_steps} steps and now has {total}: after its next step "
            "the learning rate follows the new schedule"
        )
    return left


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _require_one_process() -> None:
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        raise ValueError(
            f"WORLD_SIZE={size}: `memrt train` is one process; for several use memrt.Trainer in a "
            "script of your own under torchrun"
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws no bar for every file that it writes."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    """torch's out-of-memory errors as Python's, with a remedy."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).partition("\n")[0]
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text):
            raise
        raise MemoryError(
            f"out of memory on {device}: {text} Lower training.per_device_train_batch_size or "
            "data.sequence_length, or add strategies; `memrt plan` tells what a run needs"
        ) from error
