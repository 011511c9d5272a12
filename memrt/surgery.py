"""Changes to a model that are remembered and undone: modules, classes, `requires_grad`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["Surgery", "subclass_of"]


def subclass_of(
    base: type[nn.Module], mixin: type, *, attributes: dict[str, object] | None = None
) -> type[nn.Module]:
    """A subclass of `base` with `mixin` in front that keeps the name of `base`.

    The name is kept because transformers writes class names into saved configs.
    """
    made: type[nn.Module] = type(
        base.__name__,
        (mixin, base),
        {"__module__": base.__module__, "__qualname__": base.__qualname__, **(attributes or {})},
    )
    return made


class Surgery:
    """Everything done to one model, in order, and its undoing in reverse order."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._undo: list[Callable[[], None]] = []
        for parameter in model.parameters():
            self._remember_requires_grad(parameter)

    def _remember_requires_grad(self, parameter: nn.Parameter) -> None:
        before = parameter.requires_grad
        self._undo.append(lambda: setattr(parameter, "requires_grad", before))

    def replace(self, fqn: str, module: nn.Module) -> None:
        """Put `module` where `fqn` is."""
        if not fqn:
            raise ValueError("replace('') would replace the model; recast it or replace its parts")
        parent_name, _, attribute = fqn.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        before = getattr(parent, attribute)
        setattr(parent, attribute, module)
        training = module.training

        def undo() -> None:
            setattr(parent, attribute, before)
            if module.training is not training:  # train() or eval() was called meanwhile
                before.train(module.training)

        self._undo.append(undo)

    def add(self, fqn: str, module: nn.Module) -> None:
        """Give a module a new child `module` under the free name `fqn`."""
        parent_name, _, attribute = fqn.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        if hasattr(parent, attribute):
            raise ValueError(f"add({fqn!r}): the name is taken; replace it, or take another")
        parent.add_module(attribute, module)
        self._undo.append(lambda: delattr(parent, attribute))

    def recast(self, fqn: str, cls: type[nn.Module]) -> None:
        """Change the class of the module at `fqn` in place."""
        module = self._model.get_submodule(fqn)
        before = type(module)
        if not issubclass(cls, before):
            raise TypeError(f"recast({fqn!r}): {cls.__name__} is not a subclass of {before}")
        module.__class__ = cls
        self._undo.append(lambda: setattr(module, "__class__", before))

    def undo(self) -> None:
        """Undo everything, latest first."""
        while self._undo:
            self._undo.pop()()
