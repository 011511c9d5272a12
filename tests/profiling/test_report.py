"""The conditions of a run: what a report says that it was made on."""

from __future__ import annotations

import pytest
import torch

from memrt.profiling.report import conditions


@pytest.mark.parametrize(
    ("device", "name"), [("cuda:1", "large"), ("cuda", "small"), ("cpu", "cpu")]
)
def test_the_card_is_that_of_the_run(
    device: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards = ["small", "large"]

    def get_device_name(device: torch.device | str | None = None) -> str:
        return cards[0 if device is None else torch.device(device).index or 0]  # 0 is current

    monkeypatch.setattr(torch.cuda, "get_device_name", get_device_name)
    assert conditions(settings={}, strategies=[], device=device)["device"] == name
