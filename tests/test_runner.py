"""The loop that plan, profile and compare share: which micro-batches are alike."""

from __future__ import annotations

import pytest
import torch

from memrt.runner import Batch, alike


def _batch(length: int = 4, *, padding: int = 0, **more: torch.Tensor) -> Batch:
    ids = torch.randint(0, 9, (2, length))
    mask = torch.ones_like(ids)
    mask[1, length - padding :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), **more}


def test_texts_of_one_shape_are_alike() -> None:
    assert alike([_batch()])
    assert alike([_batch(), _batch(), _batch()])
    assert alike([_batch(padding=1), _batch(padding=2)])
    pixels = [{"pixel_values": torch.randn(1, 3, 8, 8)} for _ in range(2)]
    assert alike(pixels)


@pytest.mark.parametrize(
    "other",
    [
        _batch(5),
        _batch(padding=1),  # the model keeps a mask of this one
        _batch(token_type_ids=torch.zeros(2, 4, dtype=torch.int64)),
        {**_batch(), "labels": torch.zeros(2)},
    ],
)
def test_what_may_take_other_bytes_is_not(other: Batch) -> None:
    assert not alike([_batch(), _batch(), other])
    assert not alike([other, _batch()])


def test_positions_say_whether_texts_are_packed() -> None:
    positions = torch.arange(4).repeat(2, 1)
    packed = torch.tensor([[0, 1, 0, 1]]).repeat(2, 1)
    assert alike([_batch(position_ids=positions), _batch(position_ids=positions.clone())])
    assert not alike([_batch(position_ids=positions), _batch(position_ids=packed)])
