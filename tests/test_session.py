"""The session itself: which door is called when, what is refused, and what is left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import memrt
from memrt import registry
from memrt.errors import ConflictError
from memrt.head import install_head
from memrt.profiling.accounts import Account
from memrt.profiling.ledger import Ledger
from memrt.runner import model_loss
from memrt.session import Session
from memrt.strategy import Attachment, Claim, Phase, Rule, Slot, Strategy
from memrt.structure import Facts, RunSettings
from memrt.surgery import subclass_of
from memrt.testing import PlainModel, tiny_batches, tiny_model

LOG: list[tuple[str, ...]] = []


@pytest.fixture(autouse=True)
def _empty_log() -> None:
    LOG.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording(Strategy):
    """Writes down which door was called."""

    name: ClassVar[str] = "recording"

    def attach(self, run: Session) -> Attachment:
        LOG.append(("attach", self.name))
        return Recorder(self, run)


class Recorder(Attachment):
    def before_step(self, step: int) -> None:
        LOG.append(("before", self.name, str(step)))

    def after_step(self, step: int) -> None:
        LOG.append(("after", self.name, str(step)))

    @contextmanager
    def _around(self) -> Iterator[None]:
        LOG.append(("enter", self.name))
        try:
            yield
        finally:
            LOG.append(("leave", self.name))

    def around_micro_batch(self) -> AbstractContextManager[object]:
        return self._around()

    def detach(self) -> None:
        LOG.append(("detach", self.name))

    def export(self, model: nn.Module) -> None:
        LOG.append(("export", self.name))


def _recording(label: str, label_phase: Phase) -> Strategy:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Named(Recording):
        name: ClassVar[str] = label
        phase: ClassVar[Phase] = label_phase

    return Named()


HEAD = _recording("head", Phase.HEAD)
STRUCTURE = _recording("structure", Phase.STRUCTURE)
TRAINABLE = _recording("trainable", Phase.TRAINABLE)


def batch(seed: int = 0) -> dict[str, Tensor]:
    return tiny_batches("plain", seed=seed)[0]


def micro_batch(run: Session, *, seed: int = 0, last: bool = True) -> None:
    with run.micro_batch(last=last):
        run.backward(model_loss(run.model, batch(seed)))


# ---------------------------------------------------------------- doors


def test_doors_are_called_in_phase_order_and_closed_in_reverse() -> None:
    run = memrt.prepare(PlainModel(), [HEAD, TRAINABLE, STRUCTURE])
    assert [("attach", name) for name in ("structure", "trainable", "head")] == LOG
    LOG.clear()
    micro_batch(run, last=False)
    names = ("structure", "trainable", "head")
    before = [("before", name, "0") for name in names]
    around = [("enter", name) for name in names] + [("leave", name) for name in names[::-1]]
    assert before + around == LOG
    LOG.clear()
    micro_batch(run)
    assert around == LOG  # a step opens once, whatever its micro-batches
    LOG.clear()
    run.step()
    assert [("after", name, "0") for name in names[::-1]] == LOG
    LOG.clear()
    micro_batch(run)
    assert LOG[0] == ("before", "structure", "1")
    LOG.clear()
    run.detach()
    assert [("detach", name) for name in names[::-1]] == LOG


def test_a_step_is_opened_once() -> None:
    run = memrt.prepare(PlainModel(), [TRAINABLE])
    LOG.clear()
    run.begin_step()
    run.begin_step()
    micro_batch(run)
    assert [entry for entry in LOG if entry[0] == "before"] == [("before", "trainable", "0")]


def test_counters() -> None:
    run = memrt.prepare(PlainModel(), [])
    seen = []
    for step in range(2):
        for index in range(3):
            with run.micro_batch(last=index == 2):
                seen.append((run.step_index, run.micro_batch_index, run.last_micro_batch))
                run.backward(model_loss(run.model, batch()))
        run.step()
        assert run.step_index == step + 1
    assert seen == [(s, m, m == 2) for s in range(2) for m in range(3)]


def test_contexts_are_left_when_a_micro_batch_fails() -> None:
    run = memrt.prepare(PlainModel(), [STRUCTURE, HEAD])
    LOG.clear()

    def fail() -> None:
        with run.micro_batch():
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert LOG[2:] == [
        ("enter", "structure"),
        ("enter", "head"),
        ("leave", "head"),
        ("leave", "structure"),
    ]


def test_export_leaves_in_reverse_and_detaches() -> None:
    model = PlainModel()
    run = memrt.prepare(model, [STRUCTURE, HEAD])
    LOG.clear()
    assert run.export() is model
    assert LOG == [
        ("export", "head"),
        ("export", "structure"),
        ("detach", "head"),
        ("detach", "structure"),
    ]


def test_what_a_door_allocates_is_its_strategys() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Hoarder(Strategy):
        name: ClassVar[str] = "hoarder"

        def attach(self, run: Session) -> Attachment:
            return _Hoarder(self, run)

    class _Hoarder(Attachment):
        def __init__(self, settings: Strategy, run: Session) -> None:
            super().__init__(settings, run)
            self.held = [torch.zeros(1000)]

        def before_step(self, step: int) -> None:
            self.held.append(torch.zeros(500))

        def tensors(self) -> list[tuple[Tensor, Account]]:
            return [(tensor, Account.OPTIMIZER) for tensor in self.held]

    ledger = Ledger()
    with ledger:
        model = PlainModel()
        run = memrt.prepare(model, [Hoarder()], ledger=ledger)
        micro_batch(run)
        found = ledger.timeline.breakdown(ledger.timeline.now - 1)
    assert found.owners["hoarder"] == 6000
    assert found.accounts["optimizer"] == 6000


# ---------------------------------------------------------------- all or nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoiler(Strategy):
    """Changes the model in every way, and then fails."""

    name: ClassVar[str] = "spoiler"
    phase: ClassVar[Phase] = Phase.UPDATE
    where: str = "attach"

    def claims(self, facts: Facts) -> list[Claim]:
        if self.where == "claims" and isinstance(facts.model.head, nn.Identity):
            raise KeyError("spoiled")
        return [Claim(slot=Slot.HEAD)] if self.where == "head" else []

    def attach(self, run: Session) -> Attachment:
        run.replace("head", nn.Identity())
        run.recast("layers.0", subclass_of(type(run.model.layers[0]), _Mixin))
        run.model.embedding.weight.requires_grad_(False)
        if self.where == "attach":
            raise KeyError("spoiled")
        return Recorder(self, run)


class _Mixin:
    pass


def _everything(model: nn.Module) -> list[Any]:
    return [
        [
            (name, id(module), type(module), set(vars(module)))
            for name, module in model.named_modules()
        ],
        [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        {name: tensor.clone() for name, tensor in model.state_dict().items()}.keys(),
    ]


@pytest.mark.parametrize("where", ["attach", "claims", "head"])
def test_a_failure_while_attaching_leaves_the_model_as_it_was(where: str) -> None:
    model = PlainModel()
    model.head.bias.requires_grad_(False)
    before = _everything(model)
    expected: tuple[type[Exception], ...] = (KeyError, AssertionError)
    with pytest.raises(expected):
        memrt.prepare(model, ["activation_checkpoint", STRUCTURE, Spoiler(where=where)])
    assert _everything(model) == before
    assert ("detach", "structure") in LOG
    memrt.prepare(model, ["activation_checkpoint"])  # and can be prepared


def test_an_optimizer_that_cannot_be_built_leaves_the_model_as_it_was() -> None:
    model = PlainModel().double()
    before = _everything(model)
    with pytest.raises(ValueError, match="float64"):
        memrt.prepare(model, ["galore(rank=4)", "activation_checkpoint"])
    assert _everything(model) == before


def test_detaching_twice_is_harmless() -> None:
    model = PlainModel()
    before = _everything(model)
    run = memrt.prepare(model, ["galore(rank=4)", "lisa(layers=1)", "activation_checkpoint"])
    micro_batch(run)
    run.detach()
    model.zero_grad()
    assert _everything(model) == before
    again = memrt.prepare(model, ["activation_checkpoint"])
    during = _everything(model)
    run.detach()
    assert _everything(model) == during
    with pytest.raises(ValueError, match="already carries activation_checkpoint"):
        memrt.prepare(model, ["lisa(layers=1)"])
    again.detach()
    assert _everything(model) == before


def test_a_second_session_hears_of_the_first_and_not_of_what_that_did_to_the_model() -> None:
    model = PlainModel()
    run = memrt.prepare(model, ["galore(rank=4)"])
    with pytest.raises(ValueError, match="already carries galore of another session"):
        memrt.prepare(model, ["galore(rank=4)"])
    run.detach()
    memrt.prepare(model, ["galore(rank=4)"])


# ---------------------------------------------------------------- the plain loop


def test_without_strategies_it_is_torchs_loop() -> None:
    one, other = PlainModel(), PlainModel()
    other.load_state_dict(one.state_dict())
    run = memrt.prepare(one, [], lr=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    assert type(run.optimizer) is torch.optim.AdamW
    for step in range(4):
        for index in range(2):
            with run.micro_batch(last=index == 1):
                run.backward(model_loss(one, batch(2 * step + index)) / 2)
            (model_loss(other, batch(2 * step + index)) / 2).backward()
        expected = nn.utils.clip_grad_norm_(other.parameters(), 0.5, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(run.step(), expected)  # type: ignore[arg-type]
        assert all(p.grad is None for p in one.parameters())
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_train_micro_batch_is_forward_and_backward() -> None:
    run, other = memrt.prepare(PlainModel(), []), PlainModel()
    other.load_state_dict(run.model.state_dict())
    loss = run.train_micro_batch(lambda: model_loss(run.model, batch()))
    assert not loss.requires_grad
    expected = model_loss(other, batch())
    expected.backward()
    assert torch.equal(loss, expected.detach())
    for ours, theirs in zip(run.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_a_step_without_a_micro_batch_is_refused() -> None:
    run = memrt.prepare(PlainModel(), [])
    with pytest.raises(RuntimeError, match=r"step\(\) without a micro_batch before it"):
        run.step()
    micro_batch(run)
    run.step()
    with pytest.raises(RuntimeError, match=r"step\(\) without a micro_batch before it"):
        run.step()


def test_a_step_without_an_optimizer_is_refused() -> None:
    run = Session(PlainModel(), [])
    micro_batch(run)
    with pytest.raises(RuntimeError, match="the session has no optimizer"):
        run.step()


def test_an_abandoned_step_is_forgotten() -> None:
    """Its gradients too, or they would count in the next step."""
    ends = []
    for fails in (False, True):
        torch.manual_seed(0)
        run = memrt.prepare(PlainModel(), [STRUCTURE, HEAD])
        LOG.clear()
        if fails:
            micro_batch(run, seed=9, last=False)
            run.abandon_step()
            assert LOG[-2:] == [("after", "head", "0"), ("after", "structure", "0")]
            assert run.step_index == 0
            with pytest.raises(RuntimeError, match="without a micro_batch"):
                run.step()
            LOG.clear()
            run.abandon_step()
            assert not LOG
        micro_batch(run)
        run.step()
        ends.append([p.detach().clone() for p in run.model.parameters()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------- optimizers


@dataclass(frozen=True, slots=True, kw_only=True)
class BringsAPart(Strategy):
    """Has a rule, and does not look at the optimizer's name."""

    name: ClassVar[str] = "brings_a_part"

    def attach(self, run: Session) -> Attachment:
        run.replace("layers.0", nn.Identity())
        return _BringsAPart(self, run)


class _BringsAPart(Attachment):
    def rules(self) -> list[Rule]:
        return [Rule(slot=Slot.STATE_FORMAT, match=lambda n, p: True, build=lambda n, p: "float32")]


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model='tiny': must be an nn.Module; memrt.load makes"):
        memrt.prepare("tiny", ["lisa"])  # type: ignore[arg-type]


def test_settings_of_adamw_beside_an_optimizer_are_refused() -> None:
    model = PlainModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"lr=0.5, eps=1e-06 would have no effect on optim"):
        memrt.prepare(model, optimizer=optimizer, lr=0.5, eps=1e-6)
    run = memrt.prepare(model, lr=0.5, betas=(0.5, 0.6), weight_decay=0.25)
    (group,) = run.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.5, 0.6), 0.25)
    assert group["eps"] == 1e-8


def test_an_optimizer_beside_strategies_that_bring_parts_is_refused_and_undone() -> None:
    model = PlainModel()
    before = _everything(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer=SGD cannot be combined with brings_a_part,"):
        memrt.prepare(model, [BringsAPart(), STRUCTURE], optimizer=optimizer)
    assert _everything(model) == before


def test_an_optimizer_of_the_user_is_driven() -> None:
    model = PlainModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = memrt.prepare(model, ["activation_checkpoint"], optimizer=optimizer)
    assert run.optimizer is optimizer
    before = model.head.weight.detach().clone()
    micro_batch(run)
    gradient = model.head.weight.grad
    assert gradient is not None
    run.step()
    assert torch.equal(model.head.weight, before.add(gradient, alpha=-0.1))


def test_the_first_rule_that_matches_wins_and_groups_keep_their_settings() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Later(BringsAPart):
        name: ClassVar[str] = "later"
        phase: ClassVar[Phase] = Phase.UPDATE

        def attach(self, run: Session) -> Attachment:
            return _Int8(self, run)

    class _Int8(Attachment):
        def rules(self) -> list[Rule]:
            return [
                Rule(
                    slot=Slot.STATE_FORMAT,
                    match=lambda n, p: n.startswith(("head", "layers.1")),
                    build=lambda n, p: "int8",
                )
            ]

    class _OnlyHead(Attachment):
        def rules(self) -> list[Rule]:
            return [
                Rule(
                    slot=Slot.STATE_FORMAT,
                    match=lambda n, p: n == "head.weight",
                    build=lambda n, p: "float32",
                )
            ]

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Earlier(BringsAPart):
        name: ClassVar[str] = "earlier"

        def attach(self, run: Session) -> Attachment:
            return _OnlyHead(self, run)

    run = Session(PlainModel(), registry.parse_all([Later(), Earlier()]))
    named = list(run.model.named_parameters())
    groups = [
        {"params": named[:5], "weight_decay": 0.25},
        {"params": named[5:], "weight_decay": 0.0},
    ]
    optimizer = run.build_optimizer(groups)
    names = {p: name for name, p in named}
    formats = {
        names[p]: (group["state_format"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert len(formats) == len(named)
    for index, (name, _) in enumerate(named):
        int8 = name.startswith(("head", "layers.1")) and name != "head.weight"
        assert formats[name] == ("int8" if int8 else "float32", 0.25 if index < 5 else 0.0)


# ---------------------------------------------------------------- hidden gradients


@dataclass(frozen=True, slots=True, kw_only=True)
class Hides(Strategy):
    """Has a gradient of norm 3 that is not in `.grad`."""

    name: ClassVar[str] = "hides"

    def attach(self, run: Session) -> Attachment:
        return _Hides(self, run)


class _Hides(Attachment):
    norm_kind = "guessed"

    def squared_gradient_norm(self) -> Tensor | None:
        return torch.tensor(9.0)

    def scale_gradients(self, factor: Tensor) -> None:
        LOG.append(("scale", f"{float(factor):.6f}"))


def test_hidden_gradients_count_in_the_norm_and_are_clipped() -> None:
    run = memrt.prepare(PlainModel(), [Hides(), STRUCTURE], max_grad_norm=0.5)
    assert run.has_hidden_gradients
    assert run.norm_kind == "guessed"
    LOG.clear()
    with run.micro_batch():
        (run.model.head.weight * 4.0 / run.model.head.weight.numel() ** 0.5).sum().backward()
    assert float(run.gradient_norm()) == pytest.approx(5.0, rel=1e-6)
    norm = run.step()
    assert float(norm) == pytest.approx(5.0, rel=1e-6)  # type: ignore[arg-type]
    assert ("scale", "0.100000") in LOG
    plain = memrt.prepare(PlainModel(), [STRUCTURE])
    assert not plain.has_hidden_gradients
    assert plain.norm_kind == "exact"


# ---------------------------------------------------------------- backward of a strategy's own


@dataclass(frozen=True, slots=True, kw_only=True)
class FiniteDifference(Strategy):
    """Estimates the gradient from two forwards, along one random direction."""

    name: ClassVar[str] = "finite_difference"
    phase: ClassVar[Phase] = Phase.UPDATE

    def claims(self, facts: Facts) -> list[Claim]:
        return [Claim(slot=Slot.BACKWARD)]

    def attach(self, run: Session) -> Attachment:
        return _FiniteDifference(self, run)


class _FiniteDifference(Attachment):
    @torch.no_grad()
    def micro_batch(self, forward: Callable[[], Tensor]) -> Tensor:
        parameters = list(self.run.model.parameters())
        directions = [torch.randn_like(p) for p in parameters]
        losses = []
        for sign in (1.0, -2.0, 1.0):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=sign * 1e-3)
            losses.append(forward())
        slope = (losses[0] - losses[1]) / 2e-3
        for parameter, direction in zip(parameters, directions, strict=True):
            gradient = slope * direction
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return losses[2]


def test_a_strategy_may_replace_backward() -> None:
    torch.manual_seed(0)
    run = memrt.prepare(PlainModel(), [FiniteDifference(), STRUCTURE], lr=1e-3)
    assert run.replaces_backward
    assert run.replaces_forward
    before = [p.detach().clone() for p in run.model.parameters()]
    calls = []

    def forward() -> Tensor:
        calls.append(torch.is_grad_enabled())
        return model_loss(run.model, batch())

    LOG.clear()
    loss = run.train_micro_batch(forward)
    assert calls == [False, False, False]
    assert [entry[0] for entry in LOG] == ["before", "enter", "leave"]  # the other doors as ever
    assert float(loss) == pytest.approx(float(model_loss(run.model, batch()).detach()), rel=1e-4)
    assert all(p.grad is not None for p in run.model.parameters())
    run.step()
    assert not any(
        torch.equal(p, old) for p, old in zip(run.model.parameters(), before, strict=True)
    )


def test_backward_is_refused_where_a_strategy_owns_it() -> None:
    run = memrt.prepare(PlainModel(), [FiniteDifference()])
    message = r"'finite_difference' replaces forward and backward; call run.train_micro_batch"
    with run.micro_batch(), pytest.raises(ValueError, match=message):
        run.backward(model_loss(run.model, batch()))
    assert not memrt.prepare(PlainModel(), []).replaces_backward


# ---------------------------------------------------------------- what strategies call


def test_activating_an_unknown_or_frozen_parameter_is_refused() -> None:
    model = PlainModel()
    model.head.bias.requires_grad_(False)
    run = memrt.prepare(model, [])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for name in ("head.wait", "head.bias"):
        with pytest.raises(ValueError, match=f"activate: '{name}' is not a trainable parameter"):
            run.activate(["head.weight", name])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_activating_frees_gradients_and_state_and_brings_back_what_was_parked() -> None:
    model = PlainModel()
    run = memrt.prepare(model, [])
    micro_batch(run)
    run.step()
    assert run.optimizer is not None
    state = {k: v.clone() for k, v in run.optimizer.state[model.head.weight].items()}
    with run.micro_batch():
        run.backward(model_loss(model, batch()))
        run.activate(["embedding.weight"], park="host")
        assert [n for n, p in model.named_parameters() if p.grad is not None] == [
            "embedding.weight"
        ]
    assert list(run.optimizer.state) == [model.embedding.weight]
    run.activate(["embedding.weight", "head.weight"])
    assert set(run.optimizer.state) == {model.embedding.weight, model.head.weight}
    for key, value in run.optimizer.state[model.head.weight].items():
        assert torch.equal(value, state[key])
    run.activate(["embedding.weight"])  # without a place: dropped
    run.activate(["embedding.weight", "head.weight"])
    assert model.head.weight not in run.optimizer.state


def test_a_place_that_is_unknown_is_refused_before_anything_moves() -> None:
    model = PlainModel()
    run = memrt.prepare(model, [])
    micro_batch(run)
    run.step()
    assert run.optimizer is not None
    held = len(run.optimizer.state)
    with pytest.raises(ValueError, match="place='attic' is unknown"):
        run.activate(["head.weight"], park="attic")
    assert len(run.optimizer.state) == held
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_probing_without_data_is_refused() -> None:
    run = memrt.prepare(PlainModel(), [])
    with pytest.raises(ValueError, match=r"held-out data, and none was named.*probe_batches"):
        run.probe(1)


def test_probing_gives_as_many_batches_as_asked_or_refuses() -> None:
    asked = []

    def source(count: int) -> Iterator[dict[str, Tensor]]:
        asked.append(count)
        return iter(tiny_batches("plain", count=3)[:count])

    run = memrt.prepare(PlainModel(), [], probe_batches=source)
    assert len(run.probe(3)) == 3
    with pytest.raises(ValueError, match="the probe set has 3 batches, 4 are needed"):
        run.probe(4)
    assert asked == [3, 4]


@pytest.mark.parametrize("stack", [[], ["fused_loss"]], ids=str)
def test_a_probe_loss_leaves_the_random_numbers_as_they_were(stack: list[str]) -> None:
    """With dropout on; and the probe is a phase of its own in the ledger."""
    torch.manual_seed(0)
    model = tiny_model("gpt2").train()
    ledger = Ledger()
    with ledger:
        run = memrt.prepare(model, stack, ledger=ledger)
        inputs = tiny_batches("gpt2")[0]
        torch.manual_seed(5)
        before = torch.get_rng_state()
        one = run.loss(inputs)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(one, run.loss(inputs))
        assert one.requires_grad
        torch.manual_seed(6)
        assert not torch.equal(one, run.loss(inputs))
    assert "probe" in ledger.timeline.phase_peaks()


def test_booking_a_tensor_by_hand() -> None:
    ledger = Ledger()
    with ledger:
        run = memrt.prepare(PlainModel(), [], ledger=ledger)
        mine = torch.zeros(100)
        run.account(mine, Account.ACTIVATIONS, owner="me")
        found = ledger.timeline.breakdown(ledger.timeline.now - 1)
    assert found.owners["me"] == found.accounts["activations"] == 400
    memrt.prepare(PlainModel(), []).account(mine, Account.WEIGHTS, owner="me")  # without a ledger


def test_a_run_goes_on_without_its_ledger() -> None:
    ledger = Ledger()
    with ledger:
        model = PlainModel()
        run = memrt.prepare(model, ["galore(rank=4)"], ledger=ledger)
        micro_batch(run)
        run.step()
        run.drop_ledger()
        assert run.ledger is None
        assert not any(len(m._forward_hooks) for m in model.modules())
        steps = {r.region.step for r in ledger.timeline.peaks_by(lambda region: region).values()}
    micro_batch(run)
    run.step()
    assert run.step_index == 2
    assert max(steps) == 0
    assert ledger.timeline.peak().peak_bytes > 0


def test_a_ledger_that_is_dropped_leaves_nothing_that_keeps_the_run() -> None:
    gc.collect()
    gc.disable()  # a cycle stays until somebody looks for it
    try:
        with Ledger() as ledger:
            run = memrt.prepare(PlainModel(), [], ledger=ledger)
            micro_batch(run)
            run.step()
            run.drop_ledger()
        kept = [weakref.ref(run.model), weakref.ref(run.optimizer)]
        del run
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


# ---------------------------------------------------------------- state


def test_the_state_of_another_stack_is_refused_and_nothing_is_loaded() -> None:
    saved = memrt.prepare(PlainModel(), ["lisa(layers=1)"])
    micro_batch(saved)
    saved.step()
    other = memrt.prepare(PlainModel(), ["int8_states"])
    message = r"written with strategies \['lisa'\], this run has \['int8_states'\]"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved.state_dict())
    assert other.step_index == 0
    assert other.optimizer is not None
    assert not other.optimizer.state


def test_the_state_of_another_version_is_refused() -> None:
    run = memrt.prepare(PlainModel(), [])
    with pytest.raises(ValueError, match=r"version 99, this memrt reads 1; resume with the memrt"):
        run.load_state_dict({**run.state_dict(), "version": 99})


def test_state_that_a_strategy_does_not_know_is_refused() -> None:
    run = memrt.prepare(PlainModel(), [STRUCTURE])
    state = run.state_dict()
    state["strategies"]["structure"] = {"mystery": 1}
    with pytest.raises(ValueError, match=r"holds state \['mystery'\] for strategy 'structure'"):
        run.load_state_dict(state)


def test_state_is_plain_and_counts_steps() -> None:
    run = memrt.prepare(PlainModel(), ["lisa(layers=1)", "galore(rank=4)"])
    for seed in range(3):
        micro_batch(run, seed=seed)
        run.step()
    state = run.state_dict()
    assert state["step"] == 3
    assert set(state["strategies"]) == {"lisa", "galore"}
    assert state["settings"] == [strategy.to_json() for strategy in run.strategies]

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(plain(k) and plain(v) for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return all(map(plain, value))
        return value is None or type(value) in (Tensor, bool, int, float, str)

    assert plain(state)


# ---------------------------------------------------------------- the head's owner


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnHead(Strategy):
    """Sums the head's input."""

    name: ClassVar[str] = "own_head"
    phase: ClassVar[Phase] = Phase.HEAD

    def claims(self, facts: Facts) -> list[Claim]:
        return [Claim(slot=Slot.HEAD)]

    def attach(self, run: Session) -> Attachment:
        return _OwnHead(self, run)


class _OwnHead(Attachment):
    def loss(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        LOG.append(("loss", str(tuple(hidden.shape)), str(tuple(labels.shape)), str(num_items)))
        return hidden.sum() * 2.0


def test_a_strategy_may_own_head_and_loss() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama").train()
    inputs = tiny_batches("llama")[0]
    hidden = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    run = memrt.prepare(model, [OwnHead()])
    with run.micro_batch():
        output = model(**inputs, num_items_in_batch=7)
        run.backward(output.loss)
    assert LOG == [("loss", "(2, 16, 32)", "(2, 16)", "7")]
    assert torch.equal(output.loss, hidden.sum() * 2.0)
    assert model.lm_head.weight.grad is None
    assert model.eval()(**inputs).logits.shape == (2, 16, 99)


def test_two_owners_of_the_head_are_refused() -> None:
    with pytest.raises(ConflictError, match="both own the head"):
        Session(tiny_model("llama"), registry.parse_all([OwnHead(), "fused_loss"]))


def test_settings_take_part() -> None:
    with pytest.raises(ConflictError, match="gradient_checkpointing=True"):
        Session(
            PlainModel(),
            registry.parse_all(["activation_checkpoint"]),
            settings=RunSettings(gradient_checkpointing=True),
        )


def test_the_head_door_is_what_the_session_installs() -> None:
    """`install_head` asserts a head: a plain module's owner would be a programmer's error."""
    run = Session(PlainModel(), [])
    with pytest.raises(AssertionError):
        install_head(run, Attachment(OwnHead(), run))
