"""AdamW, composed: the update rule here, how moments are kept, and the space they live in.

For a parameter W with gradient g at its own step t = 1, 2, ...:

    W <- W * (1 - lr * weight_decay)
    m <- beta1 * m + (1 - beta1) * g,   v <- beta2 * v + (1 - beta2) * g * g
    W <- W - lr * N,   N = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

as torch.optim.AdamW does, and with the same bits as its fused form for fp32 parameters in the
default state format. A projected weight takes N from its projected gradient R instead: N and the
moments have R's shape, decay stays on W, and the projection lifts N (see `projection.py`, and
`formed_projection.py` for weights that have a `.grad` as well).

Bytes of state: `float32` 8 an element, `fp8` 2.08, `int8` 2.03 (`memrt.optimizers.state_formats`),
of the projected shape where there is a projection; never bf16. Temporaries: none for fp32
parameters; fp32 copies of a bounded piece for others; for a projected weight 4 bytes an element of
R, and what the projection needs.

bf16 weights are rounded once a step, stochastically (`memrt.kernels.stochastic_rounding`): to the
nearest, updates and decay below 2^-9 of a weight are lost. `stochastic_rounding=False` turns that
off. The bits are those of a parameter's step and of how often its state was freed and made anew, so
that no interval of LISA or BAdam repeats those of another; the latter is saved.

A step with a gradient that is not finite, or whose square is not in fp32 (from 2^64 on), is left
out whole and counted (`num_skipped_steps`): weights, moments and step counters stay. An infinite v
would hold its weight fast for ever, and in a format that cuts v and not m the next steps would be
huge. On CUDA the check waits for the gradients, once a step.

Source: Loshchilov and Hutter, arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from memrt.kernels.finite import all_finite
from memrt.kernels.stochastic_rounding import Rounding, rounding_key
from memrt.optimizers.formed_projection import FormedProjection
from memrt.optimizers.moment_rotation import rotate_moments_
from memrt.optimizers.parameter_counts import ParameterCounts
from memrt.optimizers.parameter_groups import check_group, check_storages
from memrt.optimizers.projection import Projection
from memrt.optimizers.state_formats import (
    STATE_FORMATS,
    AdamWSettings,
    StateFormat,
    Update,
)

__all__ = ["AdamW", "Projection"]

_SQUARE_OVERFLOWS = 2.0**64
"""The least magnitude whose square is infinite in fp32."""


class AdamW(torch.optim.Optimizer):
    """AdamW with a state format for each parameter group and a projection for some weights.

    params: as for any torch optimizer; a group may set `lr`, `betas`, `eps`, `weight_decay`,
        `state_format`, `stochastic_rounding` and `rounding_seed`.
    state_format: a name in `memrt.optimizers.state_formats.STATE_FORMATS`.
    stochastic_rounding: of bf16 weights; False rounds to the nearest. Others are not affected.
    rounding_seed: what it rounds with, beside parameter, lifetime of its state, step and element;
        saved with the groups.
    projections: the weights whose gradient arrives projected and never as `.grad`, or is projected
        here (`FormedProjection`).

    State is created at the first step that brings a gradient. A parameter without one is skipped.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_format: str = "float32",
        stochastic_rounding: bool = True,
        rounding_seed: int = 0,
        projections: Mapping[nn.Parameter, Projection] | None = None,
    ) -> None:
        self._projections: dict[nn.Parameter, Projection] = dict(projections or {})
        self._formats: dict[str, StateFormat] = {
            name: kind() for name, kind in STATE_FORMATS.items()
        }
        self._group_index: dict[nn.Parameter, int] = {}
        self._lifetimes = ParameterCounts()  # of states: how many each parameter has had
        self.num_skipped_steps = 0
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_format": state_format,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
        }
        super().__init__(params, defaults)
        known = {id(p) for group in self.param_groups for p in group["params"]}
        strangers = sum(id(parameter) not in known for parameter in self._projections)
        if strangers:
            raise ValueError(
                f"projections has {strangers} weights that are in no parameter group; "
                "give the optimizer every weight that it projects"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; refuses settings that cannot be and weights that share their storage."""
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            check_storages(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise
        index = len(self.param_groups) - 1
        self._group_index |= dict.fromkeys(self.param_groups[index]["params"], index)
        self._lifetimes.add(self.param_groups[index]["params"])

    # ---------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient, if all have finite squares in fp32."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not all_finite(list(self._gradients()), below=_SQUARE_OVERFLOWS):
            self.num_skipped_steps += 1
            return loss
        for group in self.param_groups:
            self._step_some(group, group["params"])
        return loss

    def _gradients(self) -> Iterator[Tensor]:
        """Every gradient of this step, projected ones among them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None and parameter in self._projections:
                    gradient = self._projections[parameter].gradient()
                if gradient is not None:
                    yield _dense(gradient)

    @torch.no_grad()
    def step_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        """One update of these alone, of those that have a gradient; the same bits as `step`.

        Calls no step hooks: it is a part of a step, as when parameters are updated in backward. So
        it cannot leave out a whole step, and does not look whether gradients are finite.
        """
        for parameter in parameters:
            group = self.param_groups[self._group_index[parameter]]
            self._step_some(group, [parameter])

    def _step_some(self, group: dict[str, Any], parameters: Iterable[nn.Parameter]) -> None:
        settings = _settings_of(group)
        dense: dict[str, list[Update]] = {}
        for parameter in parameters:
            projection = self._projections.get(parameter)
            if projection is not None:
                self._step_projected(parameter, projection, group, settings)
            elif parameter.grad is not None:
                form = self._format_of(group, parameter.shape)
                state = self._state_of(parameter, form, parameter.shape)
                key = self._rounding_key(parameter, group)
                update = Update(parameter, _dense(parameter.grad), state, key)
                dense.setdefault(form.name, []).append(update)
        for name, updates in dense.items():
            self._formats[name].adamw(updates, settings)

    def _step_projected(
        self,
        weight: nn.Parameter,
        projection: Projection,
        group: dict[str, Any],
        settings: AdamWSettings,
    ) -> None:
        if isinstance(projection, FormedProjection):
            if weight.grad is None:  # none came, or it was stepped in backward
                return
            projection.receive(_dense(weight.grad))
        elif weight.grad is not None:
            raise ValueError(
                f"a projected weight of shape {tuple(weight.shape)} has a dense .grad: it is used "
                "outside the layer that projects (tied, or read by other code); do not project it"
            )
        gradient = projection.gradient()
        if gradient is None:
            return
        assert gradient.shape == projection.shape
        form = self._format_of(group, projection.shape)
        rotation = projection.take_rotation()
        if rotation is not None and self.state[weight]:
            self._rotate_moments(weight, rotation, form, settings)
        state = self._state_of(weight, form, projection.shape)
        # from zero, with lr = 1 and no decay, the rule arrives at -N
        direction = torch.zeros(projection.shape, dtype=torch.float32, device=gradient.device)
        form.adamw(
            [Update(direction, gradient, state)], replace(settings, lr=1.0, weight_decay=0.0)
        )
        key = self._rounding_key(weight, group)
        rounding = None if key is None else Rounding(key, state["step"])
        decay = 1 - settings.lr * settings.weight_decay
        options: dict[str, Any] = {"lr": settings.lr, "decay": decay, "rounding": rounding}
        if isinstance(projection, FormedProjection):
            options["correction"] = _bias_correction(state["step"], settings)
        projection.apply(weight, direction.neg_(), **options)

    def _rotate_moments(
        self, weight: nn.Parameter, rotation: Tensor, form: StateFormat, settings: AdamWSettings
    ) -> None:
        if form.name != "float32":
            raise ValueError(
                f"moments in {form.name} cannot follow a basis: every refresh would round them "
                "once more; keep state_format='float32', or let moments stay as they are"
            )
        shape = self._projections[weight].shape
        state = self._state_of(weight, form, shape)
        rotate_moments_(
            state["exp_avg"],
            state["exp_avg_sq"],
            rotation,
            is_left=shape[0] == rotation.shape[0],
            betas=(settings.beta1, settings.beta2),
            step=state["step"],
        )

    def _rounding_key(
        self, parameter: nn.Parameter, group: dict[str, Any]
    ) -> tuple[int, int] | None:
        if not group["stochastic_rounding"] or parameter.dtype is not torch.bfloat16:
            return None
        before = max(0, self._lifetimes.count(parameter) - 1)
        return rounding_key(group["rounding_seed"], self._lifetimes.number(parameter), before)

    def _format_of(self, group: dict[str, Any], shape: tuple[int, ...]) -> StateFormat:
        form = self._formats[group["state_format"]]
        small = torch.Size(shape).numel() < form.min_elements
        return self._formats["float32"] if small else form

    def _state_shape(self, parameter: nn.Parameter) -> tuple[int, ...]:
        projection = self._projections.get(parameter)
        return tuple(parameter.shape) if projection is None else projection.shape

    def _state_of(
        self, parameter: nn.Parameter, form: StateFormat, shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        state = cast("dict[str, Tensor]", self.state[parameter])
        if not state:
            state.update(form.create(shape, parameter.device))
            self._lifetimes.advance(parameter)
        else:
            form.check(state, shape, owner=f"a parameter of shape {tuple(parameter.shape)}")
        return state

    # ---------------------------------------------------------------- state

    def state_on_host(self, parameter: nn.Parameter) -> frozenset[str]:
        """The parts of a parameter's state that lie on the host wherever the parameter does."""
        shape = self._state_shape(parameter)
        form = self._format_of(self.param_groups[self._group_index[parameter]], shape)
        return frozenset(key for key, part in form.layout(shape).items() if part.on_host)

    def shared_tensors(self) -> Iterator[Tensor]:
        """Tensors that the formats hold beside `state`: the code maps of int8, 2 KiB a device."""
        for form in self._formats.values():
            yield from form.shared_tensors()

    def state_dict(self) -> dict[str, Any]:
        """torch's, how many steps were skipped, and how many states each parameter has had."""
        return {
            **super().state_dict(),
            "num_skipped_steps": self.num_skipped_steps,
            "state_lifetimes": self._lifetimes.saved(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, in its own dtypes, onto the parameters' devices.

        torch's own would cast every tensor to the parameter's dtype. Refuses the state of other
        shapes, of another format or with anything else in it, before anything is changed.
        """
        loaded: dict[nn.Parameter, dict[str, Tensor]] = {}

        def take(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._accepted(state))
            return {**state, "state": {}}

        def give(_: torch.optim.Optimizer) -> None:
            for parameter, state in loaded.items():
                self.state[parameter] = state
            self.num_skipped_steps = int(state_dict.get("num_skipped_steps", 0))
            parameters = [p for group in self.param_groups for p in group["params"]]
            first = [int(parameter in loaded) for parameter in parameters]  # before they were saved
            self._lifetimes.load(state_dict.get("state_lifetimes", first))

        # after the user's own hooks, and before them: both see what they would see with torch
        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(give, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _accepted(self, state_dict: dict[str, Any]) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The states in a state dict by parameter, checked and on their devices."""
        accepted: dict[nn.Parameter, dict[str, Tensor]] = {}
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=False):
            saved_format = saved_group.get("state_format")
            for index, parameter in zip(saved_group["params"], group["params"], strict=False):
                if saved_format != group["state_format"]:
                    raise ValueError(
                        f"parameter {index} was saved with state_format={saved_format!r}, expected "
                        f"{group['state_format']!r}; resume with the format that wrote the state"
                    )
                saved = state_dict["state"].get(index)
                if saved:
                    shape = self._state_shape(parameter)
                    form = self._format_of(group, shape)
                    accepted[parameter] = form.load(
                        saved, shape, parameter.device, owner=f"parameter {index}"
                    )
        return accepted

    def __getstate__(self) -> dict[str, Any]:
        """What copies of the optimizer need; `state_dict` is what checkpoints need."""
        return {
            **super().__getstate__(),
            "_projections": self._projections,
            "_formats": self._formats,
            "_group_index": self._group_index,
            "_lifetimes": self._lifetimes,
            "num_skipped_steps": self.num_skipped_steps,
        }


def _dense(gradient: Tensor) -> Tensor:
    if gradient.layout is not torch.strided:
        raise ValueError(
            f"AdamW got a gradient with layout {gradient.layout}; use dense gradients "
            "(nn.Embedding(sparse=False))"
        )
    return gradient


def _bias_correction(step: Tensor, settings: AdamWSettings) -> Tensor:
    """The factor in N that makes up for moments that began at zero; no step is read to the host."""
    return (1 - settings.beta2**step).sqrt_() / (1 - settings.beta1**step)


def _settings_of(group: dict[str, Any]) -> AdamWSettings:
    beta1, beta2 = group["betas"]
    return AdamWSettings(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
    )
