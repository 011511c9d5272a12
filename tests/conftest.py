"""What holds for all tests."""

from __future__ import annotations

import atexit
import gc

import pytest

from memrt.testing import FAMILIES, tiny_model


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Take what the imports and the collected tests are made of out of the garbage collector's
    sight.

    Every `train()` collects garbage, which takes half a second over transformers' modules, five
    times as long as six steps of a tiny model: a fifth of the time of all tests.
    """
    for family in FAMILIES:  # transformers imports its models when they are made
        tiny_model(family, layers=1)
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # libraries count what is left at the end
