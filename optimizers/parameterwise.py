"""Optimizers that step one parameter after another: what those with a rule of their own share.

A rule says what state a parameter has (`_layout`) and what one step does (`_step_one`). State is
fp32 whatever the parameter's dtype, is created at the first gradient, and is loaded in its own
dtypes (torch's `load_state_dict` would cast it to the parameter's). `step_parameters` steps some of
the parameters with the bits of a whole step, which is what updates in backward need.

bf16 weights are rounded once a step, stochastically (`memrt.kernels.stochastic_rounding`): to the
nearest, updates below 2^-9 of a weight are lost. The bits are those of how often a parameter was
updated, a number on the host that is saved and outlives its state. `stochastic_rounding=False`
turns that off.

A `step` with a gradient that is not finite is left out whole and counted (`num_skipped_steps`);
`step_parameters` cannot, and does not look.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from memrt.kernels.finite import all_finite
from memrt.kernels.stochastic_rounding import Rounding, rounding_key
from memrt.optimizers.parameter_counts import ParameterCounts
from memrt.optimizers.parameter_groups import check_storages

__all__ = ["ParameterwiseOptimizer", "check_not_negative"]


class ParameterwiseOptimizer(torch.optim.Optimizer, ABC):
    """The loop, the state and its loading; a subclass brings the rule.

    params: as for any torch optimizer; a group may set every option of the rule.
    stochastic_rounding: of bf16 weights; False rounds to the nearest. Others are not affected.
    rounding_seed: what it rounds with, beside parameter, update and element; saved with the groups.
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        stochastic_rounding: bool,
        rounding_seed: int,
    ) -> None:
        self._group_index: dict[nn.Parameter, int] = {}
        self._updates = ParameterCounts()
        self.num_skipped_steps = 0
        self._own_options = frozenset(defaults)
        rounding = {"stochastic_rounding": stochastic_rounding, "rounding_seed": rounding_seed}
        super().__init__(params, defaults | rounding)

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Refuse settings that cannot be, with `ValueError`."""

    @abstractmethod
    def _layout(self, parameter: Tensor) -> dict[str, tuple[int, ...]]:
        """The shapes of the fp32 tensors of a parameter's state, by key."""

    @abstractmethod
    def _step_one(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
        rounding: Rounding | None,
    ) -> None:
        """Update one parameter and its state in place; without `rounding`, to the nearest."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; refuses settings that cannot be and weights that share their storage."""
        super().add_param_group(param_group)
        try:
            for name in ("lr", "weight_decay"):
                check_not_negative(name, self.param_groups[-1][name])
            for name, kind in (("stochastic_rounding", bool), ("rounding_seed", int)):
                value = self.param_groups[-1][name]
                if type(value) is not kind:
                    raise ValueError(f"{name}={value!r} is not of type {kind.__name__}; give one")
            self._check_group(self.param_groups[-1])
            _check_parameters(self.param_groups[-1]["params"])
            check_storages(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise
        index = len(self.param_groups) - 1
        self._group_index |= dict.fromkeys(self.param_groups[index]["params"], index)
        self._updates.add(self.param_groups[index]["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient, if all gradients are finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not all_finite(list(self._gradients())):
            self.num_skipped_steps += 1
            return loss
        for group in self.param_groups:
            self.step_parameters(group["params"])
        return loss

    def _gradients(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield self._dense(parameter.grad)

    def _dense(self, gradient: Tensor) -> Tensor:
        if gradient.layout is not torch.strided:
            raise ValueError(
                f"{type(self).__name__} got a gradient with layout {gradient.layout}; use dense "
                "gradients (nn.Embedding(sparse=False))"
            )
        return gradient

    @torch.no_grad()
    def step_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        """One update of these alone, of those that have a gradient."""
        for parameter in parameters:
            if parameter.grad is None:
                continue
            gradient = self._dense(parameter.grad)
            group = self.param_groups[self._group_index[parameter]]
            state, rounding = self._state_of(parameter), self._next_rounding(parameter, group)
            self._step_one(parameter, gradient, state, group, rounding)

    def _next_rounding(self, parameter: nn.Parameter, group: dict[str, Any]) -> Rounding | None:
        self._updates.advance(parameter)
        if not group["stochastic_rounding"] or parameter.dtype is not torch.bfloat16:
            return None
        key = rounding_key(group["rounding_seed"], self._updates.number(parameter))
        number = float(self._updates.count(parameter))
        return Rounding(key, torch.full((), number, device=parameter.device))

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = cast("dict[str, Tensor]", self.state[parameter])
        if not state:
            for key, shape in self._layout(parameter).items():
                state[key] = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
            if not state:
                del self.state[parameter]  # the rule keeps none
        return state

    def state_dict(self) -> dict[str, Any]:
        """torch's, how often each parameter was updated, and how many steps were skipped."""
        own = {"num_updates": self._updates.saved(), "num_skipped_steps": self.num_skipped_steps}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, in fp32; refuses other states before anything is changed."""
        loaded: dict[nn.Parameter, dict[str, Tensor]] = {}

        def take(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._accepted(state))
            return {**state, "state": {}}

        def give(_: torch.optim.Optimizer) -> None:
            for parameter, state in loaded.items():
                self.state[parameter] = state
            for group in self.param_groups:  # saved before there was stochastic rounding
                for name in ("stochastic_rounding", "rounding_seed"):
                    group.setdefault(name, self.defaults[name])
            from_zero = [0] * len(self._group_index)
            self._updates.load(state_dict.get("num_updates", from_zero))
            self.num_skipped_steps = int(state_dict.get("num_skipped_steps", 0))

        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(give, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _accepted(self, state_dict: dict[str, Any]) -> dict[nn.Parameter, dict[str, Tensor]]:
        accepted: dict[nn.Parameter, dict[str, Tensor]] = {}
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for index, parameter in zip(saved_group["params"], group["params"], strict=False):
                saved = state_dict["state"].get(index)
                if not saved:
                    continue
                layout = self._layout(parameter)
                shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
                if shapes != layout:
                    raise ValueError(
                        f"the state of parameter {index} holds {shapes}, {type(self).__name__} "
                        f"expects {layout}; resume with the optimizer that wrote the state"
                    )
                accepted[parameter] = {
                    key: tensor.to(parameter.device, torch.float32) for key, tensor in saved.items()
                }
            self._check_options(saved_group)
        return accepted

    def _check_options(self, saved_group: dict[str, Any]) -> None:
        """Refuse a group of another rule, whose state may be as empty as this one's."""
        missing = sorted(self._own_options - saved_group.keys())
        if missing:
            raise ValueError(
                f"the state's groups have no {missing[0]!r}, which every group of "
                f"{type(self).__name__} has; resume with the optimizer that wrote the state"
            )

    def __getstate__(self) -> dict[str, Any]:
        """What copies of the optimizer need; `state_dict` is what checkpoints need."""
        own = {
            "_group_index": self._group_index,
            "_updates": self._updates,
            "num_skipped_steps": self.num_skipped_steps,
            "_own_options": self._own_options,
        }
        return {**super().__getstate__(), **own}


def check_not_negative(name: str, value: object) -> None:
    """Refuse what is not a number of at least 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
        raise ValueError(f"{name}={value!r} is not a number of at least 0; give a float")


def _check_parameters(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is {parameter.dtype}; fp32, bf16 "
                "and fp16 are updated (in fp32)"
            )
