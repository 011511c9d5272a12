"""A step that is left out leaves no trace in a subspace: the refresh that fell on it comes next."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import memrt
from memrt.session import Session
from memrt.testing import tiny_batches, tiny_model

GALORE = "galore(rank=4, every=3, targets=['q_proj'])"
BATCHES = tiny_batches("llama", count=5, batch=2, length=8)


def _run(stack: Sequence[str], factors: Sequence[float], *, clip: float = 0.0) -> Session:
    """A step on each batch whose factor is 1; another factor makes its gradient what it is."""
    torch.manual_seed(0)
    model = tiny_model("llama", layers=1)
    run = memrt.prepare(model, stack, lr=1e-2, max_grad_norm=clip, accumulation_steps=1)
    batches = iter(BATCHES)
    for factor in factors:
        batch = next(batches) if factor == 1 else BATCHES[-1]
        with run.micro_batch():
            run.backward(model(**batch).loss * factor)
        run.step()
    return run


def _state(run: Session) -> dict[str, Tensor]:
    found = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    (galore, *_) = [each for each in run.attachments if each.name in ("galore", "q_galore")]
    for name, subspace in galore.subspaces.items():
        for kind, tensor in subspace.tensors().items():
            found[f"{name}.{kind}"] = tensor.clone()
    return found


@pytest.mark.parametrize("skipped", [0, 3], ids=lambda step: f"step {step}")
@pytest.mark.parametrize("factor", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize(
    ("stack", "clip"),
    [
        ([GALORE], 0.0),
        (["q_galore(rank=4, every=3, targets=['q_proj'])"], 1.0),
        ([GALORE, "in_backward(clip='two_pass')"], 1.0),
        (["galore(rank=4, every=3, targets=['q_proj'], form='plain')"], 1.0),
    ],
    ids=["galore", "q_galore", "two_pass", "plain"],
)
def test_the_run_goes_on_as_if_the_step_never_was(
    stack: list[str], clip: float, factor: float, skipped: int
) -> None:
    num_good = skipped + 2  # the refresh that was due, and a step in its subspace
    never = _run(stack, [1] * num_good, clip=clip)
    factors = [1.0] * num_good
    factors.insert(skipped, factor)
    with_it = _run(stack, factors, clip=clip)
    expected, found = _state(never), _state(with_it)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    # it was a refresh: without one the weight goes elsewhere
    assert not torch.equal(expected["model.layers.0.self_attn.q_proj.weight"], _start())


def _start() -> Tensor:
    torch.manual_seed(0)
    weight: Tensor = tiny_model("llama", layers=1).state_dict()[
        "model.layers.0.self_attn.q_proj.weight"
    ]
    return weight


def test_other_weights_refreshes_and_steps_that_refresh_nothing_are_left_alone() -> None:
    """The count of refreshes: one for step 0 and one for step 3, with a step 1 or 3 left out."""
    for skipped in (1, 3):
        factors = [1.0] * 4
        factors.insert(skipped, float("nan"))
        run = _run([GALORE], factors)
        (subspace,) = run.attachments[0].subspaces.values()
        assert subspace.refresh_count == 2, skipped
        assert run.optimizer.num_skipped_steps == 1


def test_a_step_that_an_error_ended_leaves_no_trace_either() -> None:
    whole = _run([GALORE], [1, 1, 1, 1])
    torch.manual_seed(0)
    model = tiny_model("llama", layers=1)
    run = memrt.prepare(model, [GALORE], lr=1e-2, accumulation_steps=1)
    with run.micro_batch():
        run.backward(model(**BATCHES[-1]).loss)
    run.abandon_step()
    for batch in BATCHES[:4]:
        with run.micro_batch():
            run.backward(model(**batch).loss)
        run.step()
    expected, found = _state(whole), _state(run)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
