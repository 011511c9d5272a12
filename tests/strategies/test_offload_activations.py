"""Activation offload: the same bits, each element moved once, and nothing left behind."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import memrt
from memrt.profiling.accounts import Account, Place
from memrt.profiling.ledger import Ledger
from memrt.runner import Batch, model_loss, train_step
from memrt.session import Session
from tests.strategies.runs import assert_equal, batch_of, counted, gradients, model_of, one_pass
from tests.tiny_models import CONFIGS

OFFLOAD = "offload_activations(min_bytes=0)"
DISK = "offload_activations(min_bytes=0, place='disk')"
CHECKPOINT = "activation_checkpoint"
DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.1},
    "gpt2": {},
    "bert": {},
    "plain": {},
}


# ---------------------------------------------------------------- exact


@pytest.mark.parametrize("family", DROPOUT)
@pytest.mark.parametrize("stack", [[OFFLOAD], [DISK], [CHECKPOINT, OFFLOAD]], ids=str)
def test_losses_gradients_and_random_numbers_are_those_of_the_plain_run(
    family: str, stack: list[str]
) -> None:
    model = model_of(family, **DROPOUT[family])
    batches = [batch_of(family, seed=seed) for seed in (0, 1)]
    plain = one_pass(model, [], batches)
    ours = one_pass(model, stack, batches)
    assert ours.loss == plain.loss
    assert_equal(ours.gradients, plain.gradients)
    assert torch.equal(ours.rng_state, plain.rng_state)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bits_under_autocast_and_eager_attention(attention: str, autocast: bool) -> None:
    model = model_of("llama", attn_implementation=attention)
    batches = [batch_of("llama")]
    plain = one_pass(model, [], batches, autocast=autocast)
    assert_equal(one_pass(model, [OFFLOAD], batches, autocast=autocast).gradients, plain.gradients)


def test_slices_come_back_in_their_strides() -> None:
    """ModernBERT's attention saves slices of one projection: dense copies give other bits."""
    torch.manual_seed(0)
    model = transformers.ModernBertForMaskedLM(CONFIGS["modernbert"]()).train()
    ids = torch.randint(3, 90, (2, 12))
    batches = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}]
    assert_equal(
        one_pass(model, [OFFLOAD], batches).gradients, one_pass(model, [], batches).gradients
    )


def test_a_graph_that_is_kept_can_be_walked_twice() -> None:
    model = model_of("llama")
    run = memrt.prepare(model, [OFFLOAD])
    with run.micro_batch():
        loss = model_loss(model, batch_of("llama"))
        loss.backward(retain_graph=True)
        once = gradients(model)
        loss.backward()
    assert_equal(gradients(model), {name: 2 * g for name, g in once.items()})


# ---------------------------------------------------------------- what moves


class _Saved:
    """The elements that a plain forward keeps alive for backward, and their bytes."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {t.untyped_storage().data_ptr() for t in model.parameters()}
        self._weights |= {t.untyped_storage().data_ptr() for t in model.buffers()}
        self._alive: list[Tensor] = []
        self._elements: dict[int, set[int]] = {}
        self._itemsize: dict[int, int] = {}
        self.num_views = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._weights and tensor.numel():
            count = storage.nbytes() // tensor.element_size()
            own = torch.arange(count).as_strided(
                tensor.shape, tensor.stride(), tensor.storage_offset()
            )
            addresses = own.flatten().tolist()
            if max(addresses) - min(addresses) >= tensor.numel():  # a slice takes the whole along
                addresses = range(count)
            self._elements.setdefault(key, set()).update(addresses)
            self._itemsize[key] = tensor.element_size()
            self._alive.append(tensor.detach())  # so that no address is used twice
            self.num_views += 1
        return tensor

    @property
    def num_bytes(self) -> int:
        return sum(len(own) * self._itemsize[key] for key, own in self._elements.items())

    @property
    def num_storages(self) -> int:
        return len(self._elements)


def _saved_by(model: nn.Module, batch: Batch) -> _Saved:
    saved = _Saved(model)
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        model_loss(model, batch)
    return saved


@contextmanager
def _moves(run: Session) -> Iterator[list[tuple[str, int]]]:
    """Place and bytes of everything that strategies move."""
    moves: list[tuple[str, int]] = []
    plain = run.move

    def move(tensor: Tensor, place: Place | str) -> Tensor:
        moves.append((Place(place).value, tensor.numel() * tensor.element_size()))
        return plain(tensor, place)

    run.move = move  # type: ignore[method-assign]
    yield moves


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_saved_element_moves_once(family: str, attention: str) -> None:
    """Many operators save the same tensors, under other shapes; GPT-2 saves slices of one.

    Back they come for every operator, unless another has them on the device at that instant.
    """
    model = model_of(family, attn_implementation=attention)
    batch = batch_of(family)
    saved = _saved_by(model, batch)
    run = memrt.prepare(model, [OFFLOAD])
    torch.manual_seed(3)
    with run.micro_batch(), _moves(run) as moves:
        loss = model_loss(model, batch)
        out = [num_bytes for place, num_bytes in moves if place == "host"]
        run.backward(loss)
    assert sum(out) == saved.num_bytes
    assert len(out) == saved.num_storages < saved.num_views
    back = [num_bytes for place, num_bytes in moves if place == "device"]
    assert len(out) <= len(back) <= saved.num_views
    assert len(moves) == len(out) + len(back)  # backward saves nothing


def test_the_device_gives_what_the_host_gets() -> None:
    """At the end of the forward; ids and labels are copied but stay, for the batch holds them."""
    model, batch = model_of("llama"), batch_of("llama")
    saved = _saved_by(model, batch)

    def places(strategies: list[str]) -> dict[str, int]:
        ledger = Ledger()
        with ledger:
            run = memrt.prepare(model, strategies, ledger=ledger)
            with run.micro_batch():
                loss = model_loss(model, batch)
                found = ledger.timeline.breakdown(ledger.timeline.now - 1).places
                run.backward(loss)
        run.detach()
        model.zero_grad()
        return found

    plain, ours = places([]), places([OFFLOAD])
    ids = 2 * batch["input_ids"].numel() * 8  # the embedding's and the shifted labels
    assert plain["host"] == 0
    assert ours["host"] == saved.num_bytes
    assert 0 <= saved.num_bytes - (plain["device"] - ours["device"]) <= ids


def test_the_peak_of_activations_falls_to_a_few_tensors() -> None:
    batch = batch_of("llama", length=32)
    plain = counted(model_of("llama"), [], [batch])
    ours = counted(model_of("llama"), [OFFLOAD], [batch])
    assert ours.account_maxima()["activations"] < plain.account_maxima()["activations"] / 10


def test_small_tensors_stay() -> None:
    model, batch = model_of("llama"), batch_of("llama")
    sizes: dict[int, list[int]] = {}
    for min_bytes in (0, 1024, 4096, 10**9):
        run = memrt.prepare(model, [f"offload_activations(min_bytes={min_bytes})"])
        with run.micro_batch(), _moves(run) as moves:
            run.backward(model_loss(model, batch))
        run.detach()
        sizes[min_bytes] = sorted(num_bytes for place, num_bytes in moves if place == "host")
    assert sizes[0][0] < 1024 < 4096 < sizes[0][-1]
    for min_bytes, moved in sizes.items():
        assert moved == [num_bytes for num_bytes in sizes[0] if num_bytes >= min_bytes]


def test_with_checkpointing_only_layer_inputs_move() -> None:
    """A layer more moves one tensor more: its input; and backward moves nothing out."""
    found = {}
    for layers in (3, 4):
        model = model_of("llama", layers=layers)
        run = memrt.prepare(model, [CHECKPOINT, OFFLOAD])
        with run.micro_batch(), _moves(run) as moves:
            loss = model_loss(model, batch_of("llama"))
            forward = len(moves)
            run.backward(loss)
        out = [num_bytes for place, num_bytes in moves if place == "host"]
        assert len(out) == forward
        found[layers] = out
    layer_input = 2 * 16 * 32 * 4
    assert len(found[4]) == len(found[3]) + 1
    assert sum(found[4]) - sum(found[3]) == layer_input


# ---------------------------------------------------------------- nothing stays


def _host_bytes(ledger: Ledger) -> int:
    now = ledger.timeline.now - 1
    return sum(r.num_bytes for r in ledger.timeline.alive_at(now) if r.place is not Place.DEVICE)


@pytest.fixture
def _no_collector() -> Iterator[None]:
    """What only the garbage collector would free counts as a leak."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("stack", [[OFFLOAD], [DISK]], ids=str)
def test_fifty_steps_leave_nothing_on_the_host(stack: list[str]) -> None:
    from memrt import registry
    from memrt.runner import start
    from memrt.structure import RunSettings

    ledger = Ledger()
    with ledger:
        model = model_of("plain", layers=2)
        run = start(model, registry.parse_all(stack), settings=RunSettings(), ledger=ledger)
        device = set()
        for step in range(50):
            train_step(run, [batch_of("plain", seed=step)])
            assert _host_bytes(ledger) == 0
            device.add(ledger.timeline.breakdown(ledger.timeline.now - 1).places["device"])
    assert ledger.timeline.peak(place=Place("disk" if stack == [DISK] else "host")).peak_bytes > 0
    assert len(device) == 1


@pytest.mark.usefixtures("_no_collector")
def test_a_micro_batch_that_fails_leaves_nothing_on_the_host() -> None:
    ledger = Ledger()
    with ledger:
        model = model_of("llama")
        run = memrt.prepare(model, [OFFLOAD], ledger=ledger)

        def fail() -> None:
            with run.micro_batch():
                loss = model_loss(model, batch_of("llama"))
                assert _host_bytes(ledger) > 0
                del loss
                raise MemoryError

        with pytest.raises(MemoryError):
            fail()
        assert _host_bytes(ledger) == 0


def test_no_file_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mapped: list[Path] = []
    from_file = torch.from_file

    def spy(name: str, **options: Any) -> Tensor:
        mapped.append(Path(name))
        assert mapped[-1].exists()
        return from_file(name, **options)

    monkeypatch.setattr(torch, "from_file", spy)
    run = memrt.prepare(model_of("plain"), [DISK])
    for step in range(2):
        with run.micro_batch():
            loss = model_loss(run.model, batch_of("plain", seed=step))
            assert not list(tmp_path.iterdir())
            run.backward(loss)
        run.step()
    assert len(mapped) > 10
    assert {path.parent for path in mapped} == {tmp_path}
    assert not list(tmp_path.iterdir())


def test_disk_bytes_are_booked_as_disk() -> None:
    model, batch = model_of("plain"), batch_of("plain")
    timeline = counted(model, [DISK], [batch])
    assert timeline.peak(place=Place.DISK).accounts[Account.ACTIVATIONS.value] > 0
    assert timeline.peak(place=Place.HOST).peak_bytes == 0


# ---------------------------------------------------------------- tensors of every kind


def _offload(model: nn.Module | None = None) -> Any:
    run = memrt.prepare(model or nn.Linear(2, 2), [OFFLOAD])
    return run, run.attachments[0]


BASE = torch.arange(240, dtype=torch.float32).view(8, 6, 5)
VIEWS: dict[str, Tensor] = {
    "whole": BASE,
    "transposed": BASE.transpose(0, 2),
    "permuted rows": BASE.permute(1, 0, 2)[:],
    "a part at an offset": BASE[2:5],
    "columns": BASE[:, :, 1:4],
    "every second": BASE.view(-1)[::2],
    "expanded": BASE[:, :1, :1].expand(8, 6, 5),
    "expanded at the front": BASE[0].expand(3, 6, 5),
    "an expanded slice": BASE[:, ::2, :1].expand(8, 3, 4),
    "a scalar": BASE[1, 2, 3],
    "an expanded scalar": BASE[1, 2, 3].expand(4, 4),
    "a bool": BASE > 100,
    "int64": torch.arange(7).t(),
    "bf16": BASE.bfloat16().t().clone() if BASE.dim() == 2 else BASE.bfloat16().mT,
    "sizes of one": BASE[:1, :, :1].squeeze(0).unsqueeze(-1),
    "one element in sixteen": BASE.view(-1)[:240].view(15, 16)[:, 3],
    "one in twenty": BASE.view(12, 20)[:, 7],
}
STAYS = {"sizes of one", "one in twenty"}
"""Slices of something more than 16 times as large, such as a window on a resident data set."""


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.filterwarnings("ignore:Tensor.T is deprecated")
def test_a_view_comes_back_as_it_was(kind: str, place: str) -> None:
    tensor = VIEWS[kind]
    run = memrt.prepare(nn.Linear(2, 2), [f"offload_activations(min_bytes=0, place={place!r})"])
    attachment = run.attachments[0]
    with _moves(run) as moves:
        packed = attachment.pack(tensor)
        again = attachment.pack(tensor)
    own = sorted(set(_addresses(tensor)))
    out = [num_bytes for where, num_bytes in moves if where == place]
    if kind in STAYS:
        assert packed is again is tensor
        assert not moves
        return
    restored = attachment.unpack(packed)
    assert restored.shape == tensor.shape
    assert restored.dtype == tensor.dtype
    assert restored.stride() == tensor.stride()
    assert torch.equal(restored, tensor)
    assert restored.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    covered = own[-1] - own[0] + 1
    whole = tensor.untyped_storage().nbytes() // tensor.element_size()
    length = covered if covered <= tensor.numel() else whole
    assert out == [length * tensor.element_size()]  # once
    assert again[0] is packed[0]


def _addresses(tensor: Tensor) -> list[int]:
    whole = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    own = whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return [int(address) for address in own.flatten()]


def test_an_empty_tensor_stays() -> None:
    _, attachment = _offload()
    empty = torch.empty(0, 3)
    assert attachment.pack(empty) is empty


def test_a_tensor_of_another_device_stays() -> None:
    _, attachment = _offload()
    elsewhere = torch.empty(4, 4, device="meta")
    assert attachment.pack(elsewhere) is elsewhere


def test_views_and_parts_of_one_storage_share_a_copy() -> None:
    run, attachment = _offload()
    with _moves(run) as moves:
        views = (BASE, BASE.transpose(0, 1), BASE.view(-1), BASE[2], BASE[:, :, 2:])
        packed = [attachment.pack(view) for view in views]
    assert len({id(p[0]) for p in packed}) == 1
    assert [num_bytes for _, num_bytes in moves] == [240 * 4]
    for view, each in zip(views, packed, strict=True):
        assert torch.equal(attachment.unpack(each), view)


def test_parts_that_do_not_touch_move_alone() -> None:
    run, attachment = _offload()
    with _moves(run) as moves:
        packed = [attachment.pack(BASE[2]), attachment.pack(BASE[4:6])]
    assert len({id(p[0]) for p in packed}) == 2
    assert [num_bytes for _, num_bytes in moves] == [30 * 4, 60 * 4]


def test_slices_of_one_storage_come_back_together() -> None:
    """As query, key and value of a fused projection, which one operator unpacks: once."""
    run, attachment = _offload()
    slices = BASE.view(40, 6).split(2, dim=1)
    packed = [attachment.pack(each) for each in slices]
    with _moves(run) as moves:
        restored = [attachment.unpack(each) for each in packed]
        assert [place for place, _ in moves] == ["device"]
        for one, other in zip(restored, slices, strict=True):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
        assert len({each.untyped_storage().data_ptr() for each in restored}) == 1
        del restored, one
        attachment.unpack(packed[0])
        assert len(moves) == 2  # what nobody has any more is brought again


def test_a_storage_that_took_the_place_of_another_is_not_mistaken_for_it() -> None:
    _, attachment = _offload()
    kept = []
    for value in range(20):
        tensor = torch.full((64,), float(value))  # the address is used again and again
        kept.append(attachment.pack(tensor))
        del tensor
    for value, packed in enumerate(kept):
        assert attachment.unpack(packed)[0] == value


# ---------------------------------------------------------------- changes in place


class _InPlace(nn.Module):
    """Saves a tensor, changes it in place, and uses it again."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self._change = change

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.sigmoid(self.linear(x))  # saves its output
        z = y * y  # saves its inputs
        self._change(y)
        return {"loss": (z + y * y).sum()}


@pytest.mark.parametrize("min_bytes", [0, 10**6])
def test_a_saved_tensor_that_is_changed_in_place_never_gives_a_wrong_gradient(
    min_bytes: int,
) -> None:
    """Kept by reference it is autograd's error; moved away, the copy has what was saved."""
    torch.manual_seed(0)
    x = torch.randn(3, 6)
    model = _InPlace(lambda y: y.mul_(2.0)).train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(x)["loss"].backward()
    model.zero_grad()
    linear = model.linear
    y = torch.sigmoid(linear(x))
    (y * y + (2.0 * y) * (2.0 * y)).sum().backward()
    expected = gradients(model)
    model.zero_grad()

    run = memrt.prepare(model, [f"offload_activations(min_bytes={min_bytes})"])
    with run.micro_batch():
        loss = model(x)["loss"]
        if min_bytes:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                run.backward(loss)
        else:
            run.backward(loss)
            for name, gradient in gradients(model).items():
                torch.testing.assert_close(gradient, expected[name])


def test_a_weight_that_is_changed_in_place_gives_autograds_error() -> None:
    model = model_of("plain")
    run = memrt.prepare(model, [OFFLOAD])
    with run.micro_batch():
        loss = model_loss(model, batch_of("plain"))
        with torch.no_grad():
            model.head.weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            run.backward(loss)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("offload_activations(place='device')", r"place='device': use one of host, disk"),
        ("offload_activations(min_bytes=-1)", r"min_bytes=-1"),
        ("offload_activations(min_bytes=1.5)", r"min_bytes=1.5"),
        ("offload_activations(min_bytes=True)", r"min_bytes=True"),
    ],
)
def test_values_are_checked(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memrt.prepare(model_of("plain"), [spec])
