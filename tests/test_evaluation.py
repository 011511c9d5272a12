"""Evaluation keeps no logits that nobody asks for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import memrt
from memrt import evaluation
from memrt.evaluation import is_streamed
from memrt.profiling.ledger import Ledger
from tests.trainer_runs import assert_same, examples, model_of, trainer_of


def evaluated(folder: Path, *, strategies: list[str], batch: int = 4, **options: Any) -> Any:
    return trainer_of(
        folder,
        per_device_eval_batch_size=batch,
        options={"strategies": strategies, "eval_dataset": examples("llama", count=12), **options},
    )


def largest_bytes(ledger: Ledger) -> int:
    return max(record.num_bytes for record in ledger.timeline.records)


def test_without_metrics_the_head_makes_no_logits(tmp_path: Path) -> None:
    plain = evaluated(tmp_path / "plain", strategies=[], batch=12)
    frugal = evaluated(tmp_path / "frugal", strategies=["fused_loss(chunk_tokens=4)"], batch=12)
    frugal.model.load_state_dict(plain.model.state_dict())
    vocabulary = plain.model.config.vocab_size
    logits = 12 * 8 * vocabulary * 4  # [batch, tokens, vocabulary] in fp32
    with Ledger() as whole:
        expected = plain.evaluate()["eval_loss"]
    with Ledger() as chunked:
        found = frugal.evaluate()["eval_loss"]
    assert largest_bytes(whole) >= logits
    assert largest_bytes(chunked) < logits
    assert found == pytest.approx(expected, rel=1e-6)


def accuracy(prediction: transformers.EvalPrediction) -> dict[str, float]:
    logits, labels = map(torch.as_tensor, (prediction.predictions, prediction.label_ids))
    return {"right": float((logits.argmax(-1) == labels).float().mean())}


class StreamedAccuracy:
    """The same, added up batch by batch."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.right = self.count = 0

    def __call__(
        self, prediction: transformers.EvalPrediction, *, compute_result: bool
    ) -> dict[str, float]:
        self.sizes.append(len(prediction.predictions))
        hits = prediction.predictions.argmax(-1) == prediction.label_ids
        self.right, self.count = self.right + int(hits.sum()), self.count + hits.numel()
        return {"right": self.right / self.count} if compute_result else {}


def test_metrics_are_those_of_transformers(tmp_path: Path) -> None:
    trainers = [
        trainer_of(
            tmp_path / kind.__module__,
            cls=kind,
            per_device_eval_batch_size=4,
            options={"eval_dataset": examples("llama", count=12), "compute_metrics": accuracy},
        )
        for kind in (transformers.Trainer, memrt.Trainer)
    ]
    expected, found = (trainer.evaluate() for trainer in trainers)
    for name in ("eval_loss", "eval_right"):
        assert found[name] == expected[name]
    predicted = [t.predict(examples("llama", count=12)).predictions for t in trainers]
    assert_same(torch.as_tensor(predicted[0]), torch.as_tensor(predicted[1]))


def test_metrics_see_logits_where_a_strategy_owns_the_head(tmp_path: Path) -> None:
    plain = evaluated(tmp_path / "a", strategies=[], compute_metrics=accuracy)
    owned = evaluated(tmp_path / "b", strategies=["fused_loss"], compute_metrics=accuracy)
    owned.model.load_state_dict(plain.model.state_dict())
    assert owned.evaluate()["eval_right"] == plain.evaluate()["eval_right"]


def test_a_streamed_metric_is_given_one_batch_at_a_time(tmp_path: Path) -> None:
    streamed = StreamedAccuracy()
    trainer = evaluated(tmp_path, strategies=[], compute_metrics=streamed)
    found = trainer.evaluate()["eval_right"]
    assert streamed.sizes == [4, 4, 4]
    trainer.compute_metrics = accuracy
    assert found == pytest.approx(trainer.evaluate()["eval_right"])
    assert trainer.args.batch_eval_metrics is False


def test_predictions_beside_a_streamed_metric_leave_a_device_and_must_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metric has each batch on the device, and what `predict` returns waits on the host."""
    rows = examples("llama", count=12)
    streamed = StreamedAccuracy()
    trainer = evaluated(tmp_path, strategies=[], compute_metrics=streamed)
    expected = trainer.predict(rows)
    assert streamed.sizes == [4, 4, 4]
    moves: list[torch.device] = []

    def moved(value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            moves.append(device)
        return value

    monkeypatch.setattr(evaluation, "_moved", moved)
    trainer.predict(rows)
    assert moves == []  # on a CPU they are on the host
    device = torch.device("meta")
    monkeypatch.setattr(transformers.TrainingArguments, "device", property(lambda _: device))
    monkeypatch.setattr(trainer, "_prepare_inputs", lambda inputs: inputs)
    trainer.model_accepts_loss_kwargs = False  # transformers would bring a count to the device
    trainer.compute_metrics = streamed = StreamedAccuracy()
    gather = trainer.gather_function
    found = trainer.predict(rows)
    # of each batch losses, logits and labels to the host, and logits and labels back for the metric
    cpu = torch.device("cpu")
    assert moves == 3 * [cpu, cpu, cpu, device, device]
    assert streamed.sizes == [4, 4, 4]
    assert_same(torch.as_tensor(found.predictions), torch.as_tensor(expected.predictions))
    assert found.metrics["test_right"] == expected.metrics["test_right"]
    assert trainer.compute_metrics is streamed

    monkeypatch.setattr(evaluation, "_NOTED_BYTES", 1)
    monkeypatch.setattr(evaluation, "_available_bytes", lambda: 2)
    with pytest.raises(ValueError, match=r"take .* of host memory, .*: 0.0 GiB are free; give"):
        trainer.predict(rows)
    assert trainer.gather_function == gather
    trainer.evaluate()  # keeps nothing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_memory_that_is_told_is_what_the_predictions_take(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        evaluation, "_check_host_memory", lambda n, *, joins: told.append((n, joins))
    )
    trainer = trainer_of(tmp_path, model=model_of("llama").to(dtype), per_device_eval_batch_size=4)
    rows = examples("llama", count=12)
    found = trainer.predict(rows).predictions
    trainer.args.eval_do_concat_batches = False
    trainer.predict(rows)
    assert told == [(found.nbytes, True), (found.nbytes, False)]


def test_joining_needs_the_predictions_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_available_bytes", lambda: 3 * 2**30)
    evaluation._check_host_memory(2**31, joins=False)
    with pytest.raises(ValueError, match=r"2.0 GiB of host memory, and as much again .*3.0 GiB"):
        evaluation._check_host_memory(2**31, joins=True)


def _with_default(prediction: Any, compute_result: bool = True) -> dict[str, float]:
    return {}


@pytest.mark.parametrize(
    ("metric", "streamed"),
    [(None, False), (accuracy, False), (_with_default, False), (StreamedAccuracy(), True)],
)
def test_which_metrics_are_streamed(metric: Callable[..., Any] | None, streamed: bool) -> None:
    assert is_streamed(metric) is streamed


def test_predictions_leave_a_device_after_each_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = evaluated(tmp_path, strategies=[], compute_metrics=accuracy)
    with trainer._frugal_arguments(predicts=True):
        assert trainer.args.eval_accumulation_steps is None  # they are on the host already
    monkeypatch.setattr(
        transformers.TrainingArguments, "device", property(lambda _: torch.device("meta"))
    )
    with trainer._frugal_arguments(predicts=False):
        assert trainer.args.eval_accumulation_steps is None
    with trainer._frugal_arguments(predicts=True):
        assert trainer.args.eval_accumulation_steps == 1
    assert trainer.args.eval_accumulation_steps is None


def test_predictions_that_do_not_fit_are_refused_after_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = evaluated(tmp_path, strategies=[], compute_metrics=accuracy)
    monkeypatch.setattr(evaluation, "_NOTED_BYTES", 1)
    with caplog.at_level(logging.WARNING, logger="memrt.evaluation"):
        trainer.evaluate()
    assert "give preprocess_logits_for_metrics" in caplog.text
    steps = []
    forward = type(trainer.model).forward
    monkeypatch.setattr(evaluation, "_available_bytes", lambda: 2)
    monkeypatch.setattr(
        type(trainer.model), "forward", lambda *a, **k: steps.append(1) or forward(*a, **k)
    )
    with pytest.raises(ValueError, match=r"take .* of host memory, .* are free; give prepro"):
        trainer.evaluate()
    assert len(steps) == 1
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    trainer.compute_metrics = lambda prediction: {}
    trainer.evaluate()
