"""The run over time: accounts sum to the live bytes at every point, whatever is tagged late."""

from __future__ import annotations

import random

from memrt.profiling.accounts import Account, Place
from memrt.profiling.timeline import Record, Timeline


def _record(num_bytes: int, place: Place = Place.DEVICE) -> Record:
    return Record(num_bytes=num_bytes, place=place, operator="x", module="", owner="")


def test_accounts_over_time_follow_the_breakdown() -> None:
    generator = random.Random(0)
    timeline = Timeline()
    alive: list[Record] = []
    for index in range(3000):
        region = timeline.region(step=index // 1000, phase="forward", module="")
        if alive and generator.random() < 0.45:
            timeline.death(alive.pop(generator.randrange(len(alive))))
            continue
        place = Place.HOST if generator.random() < 0.1 else Place.DEVICE
        record = _record(generator.randrange(1, 1000), place)
        timeline.birth(record, region)
        alive.append(record)
        if generator.random() < 0.7:  # some are booked late, some change their account
            chosen = generator.choice(alive)
            timeline.tag(chosen, generator.choice(list(Account)), reach_back=True)
    samples = timeline.samples(count=200)
    assert len(samples) <= 200
    assert max(sample["bytes"] for sample in samples) == timeline.peak().peak_bytes
    for sample in samples:
        expected = timeline.breakdown(sample["instant"])
        assert sample["accounts"] == expected.accounts
        assert sum(sample["accounts"].values()) == sample["bytes"]
