"""The chain of saved-tensor stages: order, what it sees, and what it lets go."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from memrt import registry
from memrt.profiling.accounts import Account, Place
from memrt.profiling.ledger import Ledger
from memrt.session import Session
from memrt.strategy import Attachment, Phase, Strategy

LOG: list[tuple[str, str, torch.dtype]] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast(Strategy):
    """Keeps fp32 tensors in bf16."""

    name: ClassVar[str] = "cast"
    phase: ClassVar[Phase] = Phase.PRECISION

    def attach(self, run: Session) -> Attachment:
        return _Cast(self, run)


class _Cast(Attachment):
    def pack(self, tensor: Tensor) -> Any:
        LOG.append(("cast", "pack", tensor.dtype))
        return tensor.bfloat16() if tensor.dtype is torch.float32 else tensor

    def unpack(self, packed: Any) -> Tensor:
        LOG.append(("cast", "unpack", packed.dtype))
        result: Tensor = packed.float()
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Split(Strategy):
    """Keeps a tensor as sign and magnitude, in a nested tuple with its shape."""

    name: ClassVar[str] = "split"
    phase: ClassVar[Phase] = Phase.PRECISION

    def attach(self, run: Session) -> Attachment:
        return _Split(self, run)


class _Split(Attachment):
    def pack(self, tensor: Tensor) -> Any:
        if not tensor.is_floating_point():
            return tensor
        flat = tensor.detach().flatten()
        return ((flat.sign().to(torch.int8), (flat.abs(),)), tuple(tensor.shape))

    def unpack(self, packed: Any) -> Tensor:
        (sign, (magnitude,)), shape = packed
        result: Tensor = (sign * magnitude).view(shape)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch(Strategy):
    """Changes nothing and notes what it sees."""

    name: ClassVar[str] = "watch"
    phase: ClassVar[Phase] = Phase.ACTIVATIONS

    def attach(self, run: Session) -> Attachment:
        return _Watch(self, run)


class _Watch(Attachment):
    def pack(self, tensor: Tensor) -> Any:
        LOG.append(("watch", "pack", tensor.dtype))
        self.run.seen.append(tensor.detach())  # type: ignore[attr-defined]
        return tensor

    def unpack(self, packed: Any) -> Tensor:
        raise AssertionError("it packs nothing")


@pytest.fixture(autouse=True)
def _empty_log() -> None:
    LOG.clear()


class _Model(nn.Module):
    """Saves inputs, an output and a view of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("scale", torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.sigmoid(self.linear(x)) * self.scale).square().sum()


def session(strategies: list[Any], ledger: Ledger | None = None) -> Session:
    torch.manual_seed(0)
    run = Session(_Model(), registry.parse_all(strategies), ledger=ledger)
    run.seen = []  # type: ignore[attr-defined]
    return run


def inputs() -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def gradients(run: Session) -> dict[str, Tensor]:
    with run.micro_batch():
        run.backward(run.model(inputs()))
    return {n: p.grad.clone() for n, p in run.model.named_parameters() if p.grad is not None}


OFFLOAD = "offload_activations(min_bytes=0)"


# ---------------------------------------------------------------- order


def test_stages_pack_in_phase_order_and_unpack_in_reverse() -> None:
    """A cast, then a copy to the host: what lies there is bf16, what comes back fp32."""
    run = session([OFFLOAD, Cast()])
    places: list[tuple[str, torch.dtype]] = []
    plain = run.move

    def move(tensor: Tensor, place: Place | str) -> Tensor:
        places.append((str(place), tensor.dtype))
        LOG.append(("move", str(place), tensor.dtype))
        return plain(tensor, place)

    run.move = move  # type: ignore[method-assign]
    with run.micro_batch():
        loss = run.model(inputs())
        packed = list(LOG)
        LOG.clear()
        run.backward(loss)
    bf16, fp32 = torch.bfloat16, torch.float32
    assert packed == [("cast", "pack", fp32), ("move", "host", bf16)] * (len(packed) // 2)
    assert [entry for entry in LOG if entry[1] != "pack"] == [
        ("move", "device", bf16),
        ("cast", "unpack", bf16),
    ] * (len(LOG) // 2)
    assert len(packed) == len(LOG) > 4


def test_gradients_are_those_of_what_the_stages_give_back() -> None:
    run = session([OFFLOAD, Cast()])
    observed = gradients(run)
    torch.manual_seed(0)
    model = _Model()
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t if isinstance(t, nn.Parameter) or t.data_ptr() in own else t.bfloat16(),
        lambda t: t.float(),
    )
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    with hooks:
        model(inputs()).backward()
    plain = gradients(session([]))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(observed[name], parameter.grad)
        assert not torch.equal(observed[name], plain[name])


def test_every_tensor_of_a_nested_tuple_goes_through_the_later_stages() -> None:
    run = session([Split(), OFFLOAD, Watch()])
    observed = gradients(run)
    plain = gradients(session([]))
    for name, gradient in plain.items():
        assert torch.equal(observed[name], gradient)  # sign times magnitude is exact
    seen = run.seen  # type: ignore[attr-defined]
    signs = [tensor for tensor in seen if tensor.dtype is torch.int8]
    assert len(seen) == 2 * len(signs) >= 6  # offload's copies of each sign and magnitude


def test_a_stage_that_returns_its_tensor_passes_it_on() -> None:
    run = session([Cast(), Watch()])
    gradients(run)
    assert {dtype for who, _, dtype in LOG if who == "watch"} == {torch.bfloat16}


# ---------------------------------------------------------------- what it sees


def test_weights_buffers_and_their_views_pass_by() -> None:
    run = session([Watch()])
    gradients(run)
    own = {t.untyped_storage().data_ptr() for t in (*run.model.parameters(), *run.model.buffers())}
    seen = run.seen  # type: ignore[attr-defined]
    assert len(seen) >= 3
    assert not [t for t in seen if t.untyped_storage().data_ptr() in own]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        saved: list[Tensor] = []
        run.model(inputs())
    assert [t for t in saved if t.untyped_storage().data_ptr() in own]  # they are saved indeed


def test_weights_that_were_moved_between_micro_batches_pass_by() -> None:
    run = session([Watch()])
    gradients(run)
    run.model.linear.weight.data = run.model.linear.weight.data.clone()
    run.model.scale = run.model.scale.clone()
    before = len(run.seen)  # type: ignore[attr-defined]
    gradients(run)
    assert len(run.seen) == 2 * before  # type: ignore[attr-defined]


def test_autocasts_copy_of_a_weight_is_no_weight() -> None:
    run = session([Watch()])
    with run.micro_batch(), torch.autocast("cpu", dtype=torch.bfloat16):
        x = inputs().requires_grad_()
        run.backward(functional.linear(x, run.model.linear.weight).float().sum())
    seen = [t for t in run.seen if t.dtype is torch.bfloat16]  # type: ignore[attr-defined]
    assert any(t.shape == (6, 6) for t in seen)


def test_without_stages_and_ledger_there_are_no_hooks() -> None:
    run = session([])
    assert isinstance(run._saved.hooks(), nullcontext)
    assert not isinstance(session([Watch()])._saved.hooks(), nullcontext)
    assert not isinstance(session([], Ledger())._saved.hooks(), nullcontext)


def test_hooks_end_with_the_micro_batch() -> None:
    run = session([Watch()])
    gradients(run)
    LOG.clear()
    run.model(inputs()).backward()
    assert not LOG

    def fail() -> None:
        with run.micro_batch():
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    run.model(inputs()).backward()
    assert not LOG


# ---------------------------------------------------------------- the ledger


def _held(ledger: Ledger) -> dict[tuple[str, str], int]:
    """Activations by place and operator at this instant."""
    now = ledger.timeline.now - 1
    found: dict[tuple[str, str], int] = {}
    for record in ledger.timeline.alive_at(now):
        if record.account is Account.ACTIVATIONS:
            key = (record.place.value, record.operator)
            found[key] = found.get(key, 0) + record.num_bytes
    return found


def test_the_ledger_counts_what_the_last_stage_leaves() -> None:
    ledger = Ledger()
    with ledger:
        run = session([Cast()], ledger)
        with run.micro_batch():
            loss = run.model(inputs())
            held = _held(ledger)
            run.backward(loss)
        assert not _held(ledger)  # given back when backward is over
    assert set(held) == {("device", "aten._to_copy.default")}
    # the linear's input, sigmoid's output and the square's input, [4, 6] in bf16
    assert sum(held.values()) == 3 * 4 * 6 * 2


def test_the_ledger_counts_the_place_of_the_last_stage() -> None:
    ledger = Ledger()
    with ledger:
        run = session([Cast(), OFFLOAD], ledger)
        with run.micro_batch():
            loss = run.model(inputs())
            held = _held(ledger)
            run.backward(loss)
    assert {place for place, _ in held} == {"host"}
    assert sum(held.values()) == 3 * 4 * 6 * 2


def test_the_ledger_changes_no_gradient() -> None:
    plain = gradients(session([]))
    with Ledger() as ledger:
        counted = gradients(session([], ledger))
    for name, gradient in plain.items():
        assert torch.equal(counted[name], gradient)


def test_dropping_the_ledger_between_forward_and_backward_is_harmless() -> None:
    plain = gradients(session([Cast()]))
    ledger = Ledger()
    with ledger:
        run = session([Cast()], ledger)
        with run.micro_batch():
            loss = run.model(inputs())
            run.drop_ledger()
            run.backward(loss)
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, plain[name])


# ---------------------------------------------------------------- what it lets go


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("stack", [[], [Watch()], [Cast()], [OFFLOAD]], ids=str)
def test_a_graph_without_a_backward_is_freed_at_once(stack: list[Any]) -> None:
    """A saved output that held its own graph would live until the garbage collector runs."""
    ledger = Ledger()
    with ledger:
        run = session(stack, ledger)
        start = sum(r.num_bytes for r in ledger.timeline.alive_at(ledger.timeline.now - 1))
        with run.micro_batch():
            loss = torch.sigmoid(run.model.linear(inputs()))
            del loss
        run.seen.clear()  # type: ignore[attr-defined]
        now = ledger.timeline.now - 1
        assert sum(r.num_bytes for r in ledger.timeline.alive_at(now)) == start


# ---------------------------------------------------------------- changes in place


def _product(x: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    y = x * 1.0
    z = (y * y).sum()  # saves y
    change(y)
    return z


STACKS: list[Any] = [[], [Watch()]]


@pytest.mark.parametrize("stack", STACKS, ids=str)
@pytest.mark.parametrize("with_ledger", [False, True])
def test_a_change_in_place_is_autograds_error(stack: list[Any], with_ledger: bool) -> None:
    """Neither the hooks nor the ledger may turn it into a wrong gradient."""
    ledger = Ledger() if with_ledger else None
    with ledger or nullcontext():
        run = session(stack, ledger)
        with run.micro_batch():
            loss = _product(inputs().requires_grad_(), lambda y: y.add_(1.0))
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                run.backward(loss)


def test_what_was_cast_is_as_it_was_saved() -> None:
    run = session([Cast()])
    x = inputs().requires_grad_()
    with run.micro_batch():
        run.backward(_product(x, lambda y: y.zero_()))
    assert torch.equal(x.grad, 2.0 * x.detach().bfloat16().float())  # type: ignore[arg-type]


def test_a_weight_changed_in_backward_is_autograds_error() -> None:
    run = session([Watch()])
    with run.micro_batch():
        x = inputs().requires_grad_()
        loss = run.model(x)
        with torch.no_grad():
            run.model.linear.weight.add_(1.0)
        with pytest.raises(RuntimeError, match=r"shape \[6, 6\].*expected version"):
            run.backward(loss)
