"""What a run needs between its steps, predicted and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import memrt
from memrt import registry
from memrt.checkpoint import MAX_SHARD_BYTES
from memrt.planning import batches_of, plan
from memrt.profiling.ledger import Ledger
from memrt.profiling.outside import EVALUATE, Outside
from memrt.profiling.render_outside import outside_sections, watched_sections
from memrt.runner import copied, evaluate, start, train_step
from memrt.structure import RunSettings
from memrt.testing import tiny_config

STACKS: tuple[list[str], ...] = (
    [],
    ["fused_loss(chunk_tokens=8)", "activation_checkpoint"],
    ["int8_states", "galore(rank=4)"],
    ["nf4", "peft(rank=2)"],
)


def counted(config: Any, strategies: list[str], shape: Any) -> Outside:
    """The same run on real tensors."""
    parsed = registry.parse_all(strategies)
    loading = Ledger()
    with loading:
        model = memrt.load(config, parsed, dtype=torch.float32, seed=0)
    windows = [copied(batches_of(config, shape)) for _ in range(3)]
    with Ledger() as ledger:
        run = start(model, parsed, settings=RunSettings(max_grad_norm=1.0), ledger=ledger)
        while len(windows) > 1:
            train_step(run, windows.pop())
        steps_end = ledger.timeline.now
        with ledger.phase(EVALUATE):
            evaluate(run, windows.pop()[0])
        ledger.close()
    return Outside.of(ledger.timeline, loading=loading.timeline, steps_end=steps_end)


@pytest.mark.parametrize("strategies", STACKS, ids="+".join)
def test_plan_and_ledger_are_equal(strategies: list[str]) -> None:
    config = tiny_config("llama", layers=8, hidden=64)
    planned = plan(config, strategies, batch_size=2, sequence_length=16)
    assert planned.simulated_layers == (4, 5, 6)
    found = counted(config, strategies, planned.shape)
    assert planned.simulation.outside == found
    whole = plan(config, strategies, batch_size=2, sequence_length=16, full=True)
    assert whole.outside == planned.outside


def test_an_evaluation_without_logits_is_smaller() -> None:
    config = tiny_config("llama", layers=7, vocab_size=2048)
    logits = 4 * 64 * config.vocab_size * 4  # [batch, tokens, vocabulary] in fp32
    shape = {"batch_size": 4, "sequence_length": 64}
    plain, fused = (plan(config, s, **shape).outside for s in ([], ["fused_loss(chunk_tokens=8)"]))
    assert plain["evaluate"]["device"] - fused["evaluate"]["device"] > logits


def test_nothing_is_more_than_a_file_and_a_layer_above_the_state() -> None:
    config = tiny_config("llama", layers=8, hidden=64)
    planned = plan(config, ["int8_states"], batch_size=1, sequence_length=8)
    found = planned.simulation.outside
    assert found is not None
    layer = (found.weights_bytes - 2 * found.largest_weight_bytes) // 8
    file = min(MAX_SHARD_BYTES, found.weights_bytes)
    for name, peaks in planned.outside.items():
        state = found.loaded_bytes if name == "load" else found.rest_bytes
        assert peaks["device"] <= state + max(layer, found.largest_weight_bytes), name
        assert peaks["host"] <= file + layer, name


def test_a_file_of_weights_bounds_the_host_s_part_of_a_save() -> None:
    outside = Outside(
        load_bytes=120,
        loaded_bytes=100,
        rest_bytes=300,
        rest_host_bytes=7,
        evaluate_bytes=310,
        evaluate_host_bytes=7,
        weights_bytes=100,
        largest_weight_bytes=20,
        largest_state_bytes=30,
    )
    assert outside.phases(largest_file_bytes=1000)["save"] == {"device": 300, "host": 107}
    assert outside.phases(largest_file_bytes=50)["save"] == {"device": 300, "host": 57}
    assert outside.phases(largest_file_bytes=5)["save"] == {"device": 300, "host": 37}
    assert outside.phases(largest_file_bytes=5)["load"] == {"device": 120, "host": 20}
    assert outside.phases(largest_file_bytes=5)["resume"] == {"device": 330, "host": 37}


def test_a_checkpoint_is_written_within_the_bound(tmp_path: Path) -> None:
    """The Trainer's own save, counted: nothing of the model's size lives twice."""
    from tests.trainer_runs import trainer_of

    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 2,
        "options": {"strategies": ["int8_states"]},
    }
    trainer = trainer_of(tmp_path, **options)
    state = _state_bytes(trainer)
    largest = max(p.nbytes for p in trainer.model.parameters())
    with Ledger() as ledger:
        trainer._save_checkpoint(trainer.model, None)
    assert ledger.timeline.peak().peak_bytes <= state + 2 * largest


def _state_bytes(trainer: Any) -> int:
    trainer.train()
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    moments = [
        t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
    ]
    return sum(t.nbytes for t in [*trainer.model.state_dict().values(), *moments])


def test_the_plan_and_the_run_s_report_show_them() -> None:
    config = tiny_config("llama", layers=7)
    planned = plan(config, [], batch_size=1, sequence_length=8).to_json()
    (section,) = outside_sections(planned)
    assert section.table is not None
    assert [row[0] for row in section.table.cells()] == ["load", "evaluate", "save", "resume"]
    phase = {
        "num_times": 2,
        "allocated_peak_bytes": None,
        "process_used_peak_bytes": None,
        "rss_peak_bytes": 2**30,
    }
    report = {"monitor": {"phases": {"save": phase, "resume": phase}}, "predicted": planned}
    (watched,) = watched_sections(report)
    assert watched.table is not None
    assert [column.title for column in watched.table.columns] == [
        *("phase", "times", "predicted", "RSS")
    ]
    assert [row[0] for row in watched.table.cells()] == ["resume", "save"]
    assert watched_sections({"monitor": None, "predicted": None}) == []
    assert outside_sections({}) == []
