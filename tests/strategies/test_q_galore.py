"""Q-GaLore through a session: GaLore where its parts are off, bytes, lazy refreshes, partners."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memrt
from memrt import registry
from memrt.errors import ConflictError
from tests.contract import advance, begin, session_state, tensors_equal
from tests.strategies.runs import assert_equal, batch_of, counted, states
from tests.strategies.test_apollo import projections
from tests.strategies.test_galore import backward, build, weights


def test_with_its_parts_off_it_is_galore_bit_for_bit() -> None:
    off = "basis='float32', lazy=None, state_format='float32'"
    trained = []
    for spec in ("galore(rank=4, every=2)", f"q_galore(rank=4, every=2, {off})"):
        run = memrt.prepare(build("llama"), [spec], lr=1e-2)
        for step in range(5):
            backward(run, "llama", seed=step)
            run.step()
        trained.append(weights(run.model))
    assert_equal(*trained)


@pytest.mark.parametrize("form", ["gradient_free", "plain"])
def test_every_parameter_moves(form: str) -> None:
    """Embeddings, head and norms too, which the authors' per-layer code leaves alone."""
    model = build("bert")
    before = weights(model)
    run = memrt.prepare(model, [f"q_galore(rank=4, form={form!r})"], lr=1e-2)
    for step in range(2):
        backward(run, "bert", seed=step)
        run.step()
    assert [
        name for name, weight in weights(model).items() if torch.equal(weight, before[name])
    ] in (
        [],
        ["bert.embeddings.token_type_embeddings.weight"],
    )


def test_state_bytes_are_the_formula() -> None:
    """A weight [256, 128] with rank 16: 128 · 16 elements of basis, 256 · 16 of each moment."""
    model = build("plain", hidden=128, layers=1)
    run = memrt.prepare(model, ["q_galore(rank=16)"])
    for step in range(2):
        backward(run, "plain", seed=step)
        run.step()
    assert run.optimizer is not None
    state = states(run.optimizer, model)["layers.0.1.weight"]
    assert sum(t.numel() * t.element_size() for t in state.values()) == 2 * 4096 + 2 * 16 * 4 + 4
    subspace = projections(run, "q_galore")["layers.0.1.weight"]
    held = {name: t.numel() * t.element_size() for name, t in subspace.tensors().items()}
    elements = 128 * 16
    groups = elements // 256
    assert held == {
        "basis_codes": elements // 2,
        "basis_scales": 2 * groups,
        "basis_minima": 2 * groups,
    }
    assert subspace.tensors()["basis_codes"].dtype == torch.uint8


def test_its_accounts_are_below_galores() -> None:
    found = []
    for spec in ("galore(rank=16)", "q_galore(rank=16)"):
        model = build("plain", hidden=128)
        timeline = counted(model, [spec], [batch_of("plain", length=32)])
        found.append(timeline.account_maxima())
    assert found[1]["gradients"] == found[0]["gradients"]
    assert found[1]["optimizer"] < 0.3 * found[0]["optimizer"]


def test_a_basis_in_four_bits_loses_a_tenth() -> None:
    """Of every direction; and gradient and step go through the same, restored basis."""
    trained: list[Any] = []
    for basis in ("float32", "int4"):
        run = memrt.prepare(build("plain"), [f"galore(rank=8, basis={basis!r})"], lr=0.1)
        backward(run, "plain")
        trained.append(run)
    for name, exact in projections(trained[0], "galore").items():
        rounded = projections(trained[1], "galore")[name]
        p, q = exact._basis.matrix(), rounded._basis.matrix()
        assert 0.02 < float((q - p).norm() / p.norm()) < 0.15
        before = trained[1].model.get_parameter(name).detach().clone()
        assert rounded.gradient() is not None
        moved = before.clone()
        rounded.apply(moved, torch.ones(rounded.shape), lr=1.0)
        ones = torch.ones(rounded.shape)
        lift = q @ ones if rounded.side == "left" else ones @ q.t()
        torch.testing.assert_close(moved, before - 0.25 * lift, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["gradient_free", "plain"])
def test_refreshes_double_where_the_subspace_rests(form: str) -> None:
    """Every step the same batch, and weights that hardly move: six refreshes, then every other."""
    run = memrt.prepare(build("plain"), [f"q_galore(rank=4, every=1, form={form!r})"], lr=1e-9)
    counts = []
    for _ in range(12):
        backward(run, "plain", seed=0)
        run.step()
        counts.append([s.refresh_count for s in projections(run, "q_galore").values()])
    assert counts[5] == [6] * 8
    assert counts[6] == [6] * 8
    assert counts[11] == [9] * 8
    # without a threshold every step is a refresh
    run = memrt.prepare(build("plain"), ["q_galore(rank=4, every=1, lazy=None)"], lr=1e-9)
    for _ in range(8):
        backward(run, "plain", seed=0)
        run.step()
    assert {s.refresh_count for s in projections(run, "q_galore").values()} == {8}


@pytest.mark.parametrize("form", ["gradient_free", "plain"])
def test_resume_after_intervals_grew_changes_no_bit(form: str) -> None:
    stack = [f"q_galore(rank=4, every=1, lazy=0.05, form={form!r})"]
    whole = advance(begin("llama", stack), "llama", steps=14)
    for stop in (4, 9):
        state = session_state(advance(begin("llama", stack), "llama", steps=stop))
        resumed = begin("llama", stack)
        resumed.model.load_state_dict(state["model"])
        resumed.session.load_state_dict(state["run"])
        advance(resumed, "llama", steps=14 - stop, first=stop)
        assert tensors_equal(resumed.weights(), whole.weights())
    counts = {s.refresh_count for s in projections(whole.session, "q_galore").values()}
    assert min(counts) < 14


def test_a_basis_of_another_format_or_rank_is_refused() -> None:
    run = memrt.prepare(build("plain"), ["q_galore(rank=4)"])
    backward(run, "plain")
    run.step()
    state = run.strategy_state()
    run.detach()
    for spec in ("q_galore(rank=4, basis='float32')", "q_galore(rank=5)"):
        other = memrt.prepare(build("plain"), [spec])
        with pytest.raises(ValueError, match=r"was written with q_galore\(rank=4\)"):
            other.load_strategy_state(state)
        with pytest.raises(ValueError, match=r"the saved basis is .*uint8.*resume with its"):
            other.attachments[0].load_state_dict(state["strategies"]["q_galore"])
        other.detach()


def test_the_state_format_is_its_own_unless_it_is_left_to_others() -> None:
    with pytest.raises(ConflictError, match="int8_states and q_galore both own the state format"):
        memrt.prepare(build("plain"), ["q_galore(rank=4)", "int8_states"])
    run = memrt.prepare(build("plain"), ["q_galore(rank=4, state_format='float32')", "int8_states"])
    backward(run, "plain")
    run.step()
    with pytest.raises(ConflictError, match="galore and q_galore both own the projection of"):
        memrt.prepare(build("llama"), ["q_galore(rank=4)", "galore(rank=4)"])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("q_galore(state_format='fp8')", "state_format='fp8': use one of int8, float32"),
        ("q_galore(basis='int3')", "basis='int3': use one of float32, bfloat16, int4"),
        ("q_galore(lazy=0)", "lazy=0: must be a number above 0"),
        ("galore(lazy=1.5)", r"lazy=1\.5: must be a number above 0 and at most 1"),
        ("q_galore(lazy='x')", "lazy='x': must be a number above 0 and at most 1, or None"),
        ("galore(lazy=True)", "lazy=True: must be a number above 0 and at most 1, or None"),
        ("q_galore(seed=None)", "seed=None: must be a whole number"),
        ("galore(seed=1.5)", r"seed=1\.5: must be a whole number"),
        ("q_galore(rank=0)", "rank=0: must be a whole number"),
        ("q_galore(every=0)", "every=0: must be a whole number"),
    ],
)
def test_wrong_settings_are_named(spec: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        registry.parse(spec)
