"""`galore(form="plain")` through a session: formed gradients, the authors' schedule, true norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memrt
from memrt.errors import ConflictError
from memrt.optimizers.formed_subspace import FormedSubspace
from memrt.session import Session
from tests.contract import advance, begin, session_state, tensors_equal
from tests.strategies.runs import gradients, model_of
from tests.strategies.test_galore import backward, build, plain_gradients, subspaces, weights

PLAIN = "galore(rank=4, every=3, form='plain')"


def test_gradients_are_the_models_own_and_their_norm_is_exact() -> None:
    model = build("llama")
    plain = plain_gradients(model, "llama")
    run = memrt.prepare(model, [PLAIN])
    backward(run, "llama")
    found = gradients(model)
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert run.norm_kind == "exact"
    expected = torch.stack([g.double().square().sum() for g in plain.values()]).sum().sqrt()
    assert float(run.gradient_norm()) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "plain"])
def test_it_is_the_authors_galore_on_a_model(family: str) -> None:
    """The same gradients to both; embeddings and norms take plain AdamW in either."""
    galore = pytest.importorskip("galore_torch")
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-20, "weight_decay": 0.0}
    model, other = build(family), build(family)
    run = memrt.prepare(model, [PLAIN], **settings)
    names = set(subspaces(run))
    inside = [p for name, p in other.named_parameters() if name in names]
    outside = [p for name, p in other.named_parameters() if name not in names]
    group = {"params": inside, "rank": 4, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    theirs = galore.GaLoreAdamW(
        [{"params": outside}, group], no_deprecation_warning=True, **settings
    )
    for step in range(5):
        backward(run, family, seed=step)
        for name, parameter in other.named_parameters():
            own = model.get_parameter(name).grad
            parameter.grad = None if own is None else own.clone()
        run.step()
        theirs.step()
        for name, parameter in other.named_parameters():
            ours = model.get_parameter(name)
            # singular vectors of a tiny gradient are less sure than a weight's own rounding
            torch.testing.assert_close(ours, parameter, rtol=1e-5, atol=1e-2 * 1e-3)
            with torch.no_grad():
                parameter.copy_(ours)


def test_every_basis_is_found_at_the_same_steps() -> None:
    run = memrt.prepare(build("plain"), [PLAIN])
    counts = []
    for step in range(7):
        backward(run, "plain", seed=step)
        run.step()
        counts.append({s.refresh_count for s in subspaces(run).values()})
    assert counts == [{1}, {1}, {1}, {2}, {2}, {2}, {3}]


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "plain"])
def test_resume_in_the_middle_of_an_interval_changes_no_bit(family: str) -> None:
    stack = [PLAIN, "lisa(layers=2, every=2)"]
    whole = advance(begin(family, stack), family, steps=7)
    state = session_state(advance(begin(family, stack), family, steps=4))
    resumed = begin(family, stack)
    resumed.model.load_state_dict(state["model"])
    resumed.session.load_state_dict(state["run"])
    advance(resumed, family, steps=3, first=4)
    assert tensors_equal(resumed.weights(), whole.weights())


def test_clipping_is_that_of_the_formed_gradient() -> None:
    runs = [memrt.prepare(build("llama"), [PLAIN], lr=1e-2, max_grad_norm=m) for m in (1e-2, 0.0)]
    for step in range(4):
        for run in runs:
            backward(run, "llama", seed=step)
        torch.nn.utils.clip_grad_norm_(runs[1].model.parameters(), 1e-2)
        for run in runs:
            run.step()
    for name, weight in weights(runs[0].model).items():
        torch.testing.assert_close(weight, weights(runs[1].model)[name], rtol=1e-5, atol=1e-5)


def test_a_layer_with_a_forward_of_its_own_is_projected_too() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2.0

    model = model_of("plain")
    model.layers[0][1] = Doubled(32, 64)
    run = memrt.prepare(model, [PLAIN])
    found = subspaces(run)
    assert "layers.0.1.weight" in found
    assert all(isinstance(subspace, FormedSubspace) for subspace in found.values())
    assert type(model.layers[0][1]) is Doubled
    backward(run, "plain")
    run.step()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"form='fancy': use one of gradient_free, plain"):
        memrt.prepare(build("plain"), ["galore(form='fancy')"])
    with pytest.raises(ValueError, match=r"norm='exact' has no effect with form='plain'"):
        memrt.prepare(build("plain"), ["galore(form='plain', norm='exact')"])
    with pytest.raises(ValueError, match=r"seed=7 has no effect with form='plain'"):
        memrt.prepare(build("plain"), ["galore(form='plain', seed=7)"])
    with pytest.raises(ConflictError, match=r"targets='attention' matches no trainable linear"):
        memrt.prepare(build("plain"), ["galore(form='plain', targets='attention')"])
    # what shards the gradient may go with a formed one, and not with none
    from memrt import registry
    from memrt.structure import RunSettings

    settings = RunSettings(fp16=True)
    Session(build("plain"), registry.parse_all([PLAIN]), settings=settings).detach()
    with pytest.raises(ConflictError, match="fp16=True needs that a weight's full gradient exists"):
        Session(build("plain"), registry.parse_all(["galore(rank=4)"]), settings=settings)
