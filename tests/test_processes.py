"""Several processes in a plain loop: refused by name, or every process ends with equal weights."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import memrt
from memrt.compose import ConflictError
from memrt.testing import PlainModel

REFUSED = ("in_backward", "lomo", "adalomo", "lisa", "badam", "galore(rank=4)", "q_galore(rank=4)")
KEPT = (
    "fp8_states",
    "int8_states",
    "apollo(rank=4)",
    "fira(rank=4)",
    "galore(form='plain',rank=4)",
)

SCRIPT = """
import sys, torch, torch.distributed as dist, memrt
from torch.nn.parallel import DistributedDataParallel
from memrt.testing import PlainModel

rank, store, specs = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)

def begin():
    torch.manual_seed(0)
    return PlainModel(hidden=64, layers=2)  # large enough for states in blocks

def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def train(model, spec, rows):
    run = memrt.prepare(model, [spec], lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        ids = torch.randint(0, 90, (8, 16), generator=generator)[rows]
        with run.micro_batch():
            run.backward(model(input_ids=ids, labels=ids)["loss"])
        run.step()
    return weights(model)

for spec in specs:
    found = train(DistributedDataParallel(begin()), spec, slice(4 * rank, 4 * rank + 4))
    both = [torch.empty_like(found) for _ in range(2)]
    dist.all_gather(both, found)
    assert torch.equal(*both), f"{spec}: the processes differ"
    whole = train(begin(), spec, slice(None))
    apart = (found - whole).norm() / (whole - weights(begin())).norm()
    assert apart < 0.02, f"{spec}: {apart:.3f} from the whole batch's"
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), *KEPT],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("spec", REFUSED)
def test_what_sees_one_process_s_gradients_is_refused(spec: str) -> None:
    model = nn.parallel.DistributedDataParallel(PlainModel())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ConflictError, match="distributed data parallel"):
        memrt.prepare(model, [spec])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_several_processes_are_several_without_ddp_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ConflictError, match="distributed data parallel"):
        memrt.prepare(PlainModel(), ["in_backward"])


def test_data_parallel_is_refused() -> None:
    with pytest.raises(ConflictError, match="torch's DataParallel copies the model"):
        memrt.prepare(nn.DataParallel(PlainModel()), ["fp8_states"])
