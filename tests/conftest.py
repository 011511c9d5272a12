"""What holds for all tests."""

from __future__ import annotations

import atexit
import gc

import pytest

from memrt.testing import FAMILIES, tiny_model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Names that hold an address differ from process to process: several cannot share the tests."""
    addressed = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if addressed:
        raise pytest.UsageError(f"tests named by an address, which changes: {addressed[:3]}")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Imports and collected tests stay: a fifth of the time of all tests went by looking at them.

    Every `train()` collects garbage, which takes half a second over transformers' modules, five
    times as long as six steps of a tiny model.
    """
    for family in FAMILIES:  # transformers imports its models when they are made
        tiny_model(family, layers=1)
    _settle()
    atexit.register(gc.unfreeze)  # libraries count what is left at the end


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a file's tests leave stays too: later imports, compiled code, results by test."""
    if nextitem is not None and nextitem.path != item.path:
        _settle()


def _settle() -> None:
    """Take what is alive out of the garbage collector's sight."""
    gc.collect()
    gc.freeze()
