"""Changes to a model, and that nothing of them is left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memrt.surgery import Surgery, subclass_of
from memrt.testing import PlainModel


class _Loud:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1.0  # type: ignore[misc]


class _Louder(_Loud):
    pass


def _modules(model: nn.Module) -> list[tuple[str, int, type]]:
    return [(name, id(module), type(module)) for name, module in model.named_modules()]


def test_a_replaced_module_comes_back_as_the_same_object() -> None:
    model = PlainModel()
    before = _modules(model)
    surgery = Surgery(model)
    surgery.replace("head", nn.Linear(32, 99))
    surgery.replace("layers.1", nn.Sequential(nn.Linear(32, 32)))
    surgery.replace("layers.2.3", nn.Identity())
    assert isinstance(model.layers[2][3], nn.Identity)
    assert _modules(model) != before
    surgery.undo()
    assert _modules(model) == before


def test_changes_on_top_of_changes_are_undone_in_reverse() -> None:
    model = PlainModel()
    before = _modules(model)
    surgery = Surgery(model)
    surgery.replace("layers.0", nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    surgery.replace("layers.0.1", nn.Identity())
    surgery.recast("layers.0.0", subclass_of(nn.Linear, _Loud))
    surgery.replace("layers.0", nn.Identity())
    surgery.recast("layers.1.1", subclass_of(nn.Linear, _Loud))
    surgery.recast("layers.1.1", subclass_of(type(model.layers[1][1]), _Louder))
    surgery.undo()
    assert _modules(model) == before


def test_a_recast_module_keeps_identity_state_and_name() -> None:
    model = PlainModel()
    head, state = model.head, dict(vars(model.head))
    x = torch.randn(2, 32)
    plain = head(x)
    surgery = Surgery(model)
    surgery.recast("head", subclass_of(nn.Linear, _Loud))
    assert model.head is head
    assert vars(head) == state
    assert type(head) is not nn.Linear
    assert (type(head).__name__, type(head).__module__) == ("Linear", nn.Linear.__module__)
    assert type(head).__qualname__ == nn.Linear.__qualname__
    assert torch.equal(head(x), plain + 1.0)
    surgery.undo()
    assert type(head) is nn.Linear
    assert torch.equal(head(x), plain)


def test_the_model_itself_can_be_recast_but_not_replaced() -> None:
    model = PlainModel()
    surgery = Surgery(model)
    surgery.recast("", subclass_of(PlainModel, _Loud))
    assert type(model) is not PlainModel
    with pytest.raises(ValueError, match=r"replace\(''\) would replace the model"):
        surgery.replace("", nn.Identity())
    surgery.undo()
    assert type(model) is PlainModel


def test_a_class_that_is_no_subclass_is_refused() -> None:
    model = PlainModel()
    with pytest.raises(TypeError, match=r"recast\('head'\): Embedding is not a subclass"):
        Surgery(model).recast("head", nn.Embedding)
    assert type(model.head) is nn.Linear


def test_a_name_that_is_not_there_changes_nothing() -> None:
    model = PlainModel()
    before = _modules(model)
    surgery = Surgery(model)
    for name in ("tail", "layers.9", "layers.0.9"):
        with pytest.raises(AttributeError):
            surgery.replace(name, nn.Identity())
        with pytest.raises(AttributeError):
            surgery.recast(name, nn.Identity)
    assert _modules(model) == before


def test_requires_grad_comes_back_as_it_was() -> None:
    model = PlainModel()
    model.head.bias.requires_grad_(False)
    model.layers[1].requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    surgery = Surgery(model)
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    surgery.undo()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_undoing_twice_undoes_once() -> None:
    model = PlainModel()
    surgery = Surgery(model)
    surgery.replace("head", nn.Identity())
    surgery.undo()
    mine = model.head = nn.Linear(32, 7)
    surgery.undo()
    assert model.head is mine


@pytest.mark.parametrize("mode", [True, False])
def test_a_module_that_was_away_follows_a_change_of_mode(mode: bool) -> None:
    """Or its dropout would be on in an evaluation after `detach`."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train(not mode)
    away = model[0]
    surgery = Surgery(model)
    surgery.replace("0", nn.Identity().train(not mode))
    model.train(mode)
    surgery.undo()
    assert model[0] is away
    assert away.training is mode


def test_a_mode_of_its_own_stays() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train()
    model[0].eval()  # a part that its owner holds in evaluation mode
    surgery = Surgery(model)
    surgery.replace("0", nn.Identity())
    surgery.undo()
    assert model[0].training is False


def test_attributes_of_a_made_class() -> None:
    made = subclass_of(nn.Linear, _Loud, attributes={"answer": 42})
    assert made.answer == 42  # type: ignore[attr-defined]
    assert issubclass(made, nn.Linear)
    assert made.__mro__[1] is _Loud
