"""Trainers that take turns, a step each: what slows the machine for a while slows all of them.

Each runs in a process of its own, which waits between its steps until it is its turn again, so that
never two of them run at a time. What it does while it waits is not in its periods.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.trainer_steps import TrainerRun

__all__ = ["Wait", "train_in_turns"]

Wait = Callable[[], None]
"""Ends the caller's turn and returns when it has the next."""

Train = Callable[[str, Mapping[str, Any], Wait], TrainerRun]


def train_in_turns(
    labels: Sequence[str], train: Train, options: Mapping[str, Any]
) -> dict[str, TrainerRun]:
    """Every label's run; `train` (importable by name) calls what it is given between its steps.

    The order of a round is that of the round before, moved on by one.
    """
    with _workers(labels, train, options) as connections:
        runs: dict[str, TrainerRun] = {}
        turn = 0
        while len(runs) < len(labels):
            for label in [*labels[turn:], *labels[:turn]]:
                if label in runs:
                    continue
                found = _take_turn(label, connections[label])
                if found is not None:
                    runs[label] = found
            turn = (turn + 1) % len(labels)
    return runs


def _take_turn(label: str, connection: Connection) -> TrainerRun | None:
    """Let one trainer take a step; its whole run when that was all."""
    try:
        connection.send(None)
        found: TrainerRun | None = connection.recv()
    except (EOFError, BrokenPipeError) as error:
        raise RuntimeError(f"{label}: its process ended early; its error is above") from error
    return found


@contextmanager
def _workers(
    labels: Sequence[str], train: Train, options: Mapping[str, Any]
) -> Iterator[dict[str, Connection]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train.__module__])
    connections: dict[str, Connection] = {}
    processes = []
    try:
        for label in labels:
            connections[label], theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, label, train, options))
            process.start()
            theirs.close()
            processes.append(process)
        yield connections
    finally:
        for connection in connections.values():
            connection.close()
        for process in processes:
            process.terminate()
            process.join()


def _work(connection: Connection, label: str, train: Train, options: Mapping[str, Any]) -> None:
    def wait() -> None:
        connection.send(None)
        connection.recv()

    connection.recv()
    connection.send(train(label, options, wait))
