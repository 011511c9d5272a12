"""Plans of models that are for something else than the next token: the run, to the byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import memrt
from memrt import registry
from memrt.auto_trainer import choice_for_trainer
from memrt.model_source import for_task
from memrt.planning import Shape, plan
from memrt.profiling.ledger import Ledger
from memrt.profiling.outside import EVALUATE, Outside
from memrt.profiling.timeline import Breakdown
from memrt.random_batches import batches_of
from memrt.runner import copied, evaluate, start, train_step
from memrt.structure import RunSettings
from tests.tiny_models import CONFIGS

CLASSES = "sequence-classification"


def _config(family: str, **fields: Any) -> Any:
    config = CONFIGS[family]()
    if family == "t5":
        config.decoder_start_token_id = 0
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def _counted(
    config: Any, strategies: list[str], shape: Shape
) -> tuple[Breakdown, dict[str, int], Outside]:
    """The same run on real tensors: peak and maxima of its steps, and what lies outside them."""
    parsed = registry.parse_all(strategies)
    loading = Ledger()
    with loading:
        model = memrt.load(config, parsed, dtype=torch.float32, seed=0)
    windows = [copied(batches_of(config, shape)) for _ in range(3)]
    settings = RunSettings(max_grad_norm=1.0, accumulation_steps=shape.accumulation_steps)
    with Ledger() as ledger:
        run = start(model, parsed, settings=settings, ledger=ledger)
        while len(windows) > 1:
            train_step(run, windows.pop())
        steps_end = ledger.timeline.now
        maxima = ledger.timeline.account_maxima()
        with ledger.phase(EVALUATE):
            evaluate(run, windows.pop()[0])
        ledger.close()
    outside = Outside.of(ledger.timeline, loading=loading.timeline, steps_end=steps_end)
    return ledger.timeline.peak(), maxima, outside


def _nightly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


CASES: list[Any] = [
    (CLASSES, "bert", [], {"num_labels": 3}),
    (CLASSES, "bert", ["activation_checkpoint", "int8_states"], {}),
    (CLASSES, "bert", ["galore(rank=4)"], {"num_hidden_layers": 7}),
    _nightly(CLASSES, "bert", [], {"num_labels": 1}),
    (CLASSES, "bert", [], {"problem_type": "multi_label_classification"}),
    (CLASSES, "llama", ["nf4", "peft(rank=2)"], {"pad_token_id": 0}),
    _nightly(CLASSES, "t5", [], {}),
    _nightly("token-classification", "bert", [], {}),
    ("question-answering", "bert", [], {}),
    ("image-classification", "vit", ["activation_checkpoint"], {}),
]


@pytest.mark.parametrize(("task", "family", "strategies", "fields"), CASES, ids=str)
def test_a_plan_for_a_task_equals_the_ledger_of_the_run(
    task: str, family: str, strategies: list[str], fields: dict[str, Any]
) -> None:
    config = _config(family, **fields)
    shape = {"batch_size": 2, "sequence_length": 16, "accumulation_steps": 2}
    planned = plan(config, strategies, task=task, **shape)
    peak, maxima, outside = _counted(for_task(config, task), strategies, planned.shape)
    found = planned.simulation.peak
    assert (found.peak_bytes, found.accounts) == (peak.peak_bytes, peak.accounts)
    assert (found.owners, found.places) == (peak.owners, peak.places)
    assert planned.simulation.account_maxima == maxima
    assert planned.simulation.outside == outside
    if fields.get("num_hidden_layers", 0) > 6:
        assert planned.simulated_layers == (4, 5, 6)


def test_the_head_is_the_task_s_and_the_config_stays_as_it_was() -> None:
    config = CONFIGS["llama"]()
    before = config.to_dict()
    words, classes = (
        plan(config, sequence_length=16),
        plan(config, sequence_length=16, task=CLASSES),
    )
    assert config.to_dict() == before
    head = config.hidden_size * (config.vocab_size - config.num_labels) * 4
    difference = words.simulation.peak.accounts["weights"]
    assert difference - classes.simulation.peak.accounts["weights"] == head
    # several texts want a padding token, and the config names none
    assert plan(config, batch_size=3, sequence_length=16, task=CLASSES).peak_bytes > 0


def test_a_task_that_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"task='masked-lm': transformers has no such class"):
        plan(CONFIGS["llama"](), task="masked-lm")
    with pytest.raises(ValueError, match="has no effect on a model given as"):
        plan(lambda: torch.nn.Linear(2, 2), task=CLASSES, window=[{}])


def test_a_stack_is_chosen_for_a_classifier() -> None:
    shape = {"batch_size": 4, "sequence_length": 64, "task": CLASSES}
    needed = plan(CONFIGS["bert"](), **shape).device_bytes["high"]
    choice = memrt.choose(CONFIGS["bert"](), budget=str(needed - 1), **shape)
    assert choice.fits
    assert choice.strategies
    assert not any("fused_loss" in strategy for strategy in choice.strategies)


def test_a_trainer_plans_the_class_of_its_model(tmp_path: Path) -> None:
    """transformers names a class in a config when the model is saved, and not before."""
    model = transformers.BertForSequenceClassification(CONFIGS["bert"]())
    arguments = memrt.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    rows = [{"input_ids": [1, 5, 2], "labels": 1}, {"input_ids": [1, 7, 2], "labels": 0}]
    trainer = memrt.Trainer(model=model, args=arguments, train_dataset=rows)
    found = choice_for_trainer(trainer, [], "24GiB")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert found.plan.simulation.peak.accounts["weights"] == weights + buffers
