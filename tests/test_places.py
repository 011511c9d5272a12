"""Moving tensors between places."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import memrt
from memrt.observer import Observer
from memrt.places import Mover
from memrt.profiling.accounts import Place
from memrt.profiling.ledger import Ledger

PLACES = ["device", "host", "disk"]
BASE = torch.arange(60, dtype=torch.float32).view(3, 4, 5)
TENSORS: dict[str, Tensor] = {
    "fp32": BASE,
    "bf16": BASE.bfloat16(),
    "fp16": BASE.half(),
    "fp64": BASE.double(),
    "fp8": BASE.to(torch.float8_e4m3fn),
    "uint8": BASE.to(torch.uint8),
    "int64": BASE.long(),
    "bool": BASE > 7,
    "a scalar": BASE[1, 2, 3],
    "empty": BASE[:0],
    "transposed": BASE.transpose(0, 2),
    "a slice": BASE[:, 1:3, ::2],
    "expanded": BASE[:, :1, :1].expand(3, 4, 5),
    "a parameter": nn.Parameter(BASE.clone()),
}


MODEL = nn.Linear(2, 2)


def mover(ledger: Ledger | None = None) -> Mover:
    return Mover(MODEL, Observer(ledger))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", TENSORS)
def test_a_copy_has_shape_dtype_and_values(kind: str, place: str) -> None:
    tensor = TENSORS[kind]
    copy = mover().move(tensor, place)
    assert copy.shape == tensor.shape
    assert copy.dtype == tensor.dtype
    assert not copy.requires_grad
    assert torch.equal(copy.double(), tensor.detach().double())
    if tensor.numel():
        assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    back = mover().move(copy, Place.DEVICE)
    assert torch.equal(back.double(), tensor.detach().double())


@pytest.mark.parametrize("place", PLACES)
def test_a_copy_does_not_change_with_its_source(place: str) -> None:
    source = BASE.clone()
    copy = mover().move(source, place)
    source.zero_()
    assert torch.equal(copy, BASE)
    copy.mul_(2.0)
    assert not source.any()


@pytest.mark.parametrize("place", ["cpu", "Host", "", None, 3])
def test_an_unknown_place_is_named(place: Any) -> None:
    with pytest.raises(ValueError, match=r"unknown; use one of: device, host, disk"):
        mover().move(BASE, place)
    run = memrt.prepare(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match=r"place=.* is unknown"):
        run.move(BASE, place)


def test_the_ledger_sees_the_place_and_the_bytes() -> None:
    ledger = Ledger()
    with ledger:
        move = mover(ledger).move
        copies = [move(BASE, place) for place in PLACES]
        places = ledger.timeline.breakdown(ledger.timeline.now - 1).places
    assert places == {"device": 240, "host": 240, "disk": 240}
    del copies


def test_bytes_go_with_the_tensor() -> None:
    ledger = Ledger()
    with ledger:
        move = mover(ledger).move
        for place in PLACES:
            copy = move(BASE, place)
            del copy
        assert not ledger.timeline.alive_at(ledger.timeline.now - 1)


def test_a_disk_copy_is_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = []
    from_file = torch.from_file

    def spy(name: str, **options: Any) -> Tensor:
        names.append(Path(name))
        assert names[-1].stat().st_size >= 240  # reserved, so that a write cannot fail later
        return from_file(name, **options)

    monkeypatch.setattr(torch, "from_file", spy)
    one, other = mover().move(BASE, "disk"), mover().move(BASE + 1, "disk")
    assert len(set(names)) == 2
    assert {name.parent for name in names} == {tmp_path}
    assert not list(tmp_path.iterdir())
    assert torch.equal(one + 1, other)


def test_a_full_disk_is_an_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a process that dies at its first write to the mapping."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        mover().move(BASE, "disk")
    assert not list(tmp_path.iterdir())


def test_fake_tensors_touch_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    with FakeTensorMode():
        tensor = torch.empty(3, 4)
        for place in PLACES:
            copy = mover().move(tensor, place)
            assert copy.shape == (3, 4)


def test_moving_leaves_grad_mode_and_graph_alone() -> None:
    x = torch.randn(3, requires_grad=True)
    y = x * 2.0
    assert not mover().move(y, "host").requires_grad
    assert torch.is_grad_enabled()
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]
