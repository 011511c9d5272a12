"""AdamW on moments of few bits beside torchao's, an independent implementation of the same formats.

torchao's state is given to ours, code by code, before every step: the arithmetic of a step must
then agree, and what is kept of the new moments may differ by the rounding of the formats alone.
torchao computes eagerly here; it compiles the same formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memrt.kernels.dynamic_map import dynamic_map
from memrt.kernels.expanded_fp8 import dequantize_expanded_reference
from memrt.optimizers.state_format import AdamWSettings, Update
from memrt.optimizers.state_formats import STATE_FORMATS

theirs = pytest.importorskip("torchao.optim", reason="pip install 'memrt[peers]' (torchao)")

N, STEPS = 2**14, 12
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
SETTINGS = AdamWSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
PEERS = {
    "fp8": (theirs.AdamWFp8, 128),  # its default is 256; ours has groups of 128
    "int8": (theirs.AdamW8bit, 256),
    "int4": (theirs.AdamW4bit, 128),
}
KEYS = ("exp_avg", "exp_avg_sq")
ULP = torch.finfo(torch.float32).eps
DECODING = {"fp8": 4e-6, "int8": 0.0, "int4": 0.0}
"""Relative error of a decoded moment; expanded FP8 goes through logarithms."""


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def gradient_of(step: int, *, flat: bool = False) -> Tensor:
    """Normal times log-normal, [N]; `flat`: magnitudes equal in every block of 128."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(2, N, generator=generator)
    if flat:
        return noise[0].sign() * noise[1, ::128].exp().repeat_interleave(128)
    return (noise[0] + 0.3) * noise[1].exp()


def peer_of(name: str) -> tuple[nn.Parameter, Any]:
    cls, block_size = PEERS[name]
    parameter = nn.Parameter(torch.randn(N, generator=torch.Generator().manual_seed(99)))
    return parameter, cls([parameter], **OPTIONS, block_size=block_size)


def fresh(name: str) -> dict[str, Tensor]:
    return STATE_FORMATS[name]().create((N,), torch.device("cpu"))


def given(name: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Our state of theirs; its moments have the same values."""
    ours = fresh(name)
    ours["step"].fill_(float(state["step"]))
    for key in KEYS:
        codes, scale = state[key].codes, state[key].scale
        if name == "fp8":
            ours[f"{key}_codes"].copy_(codes.view(torch.uint8))
            ours[f"{key}_largest"].copy_(scale * 448)
            ours[f"{key}_power"].fill_(16)  # in sixteenths: nothing is expanded
        else:
            swapped = (codes >> 4) | (codes << 4)  # torchao's first element is the higher half
            ours[f"{key}_codes"].copy_(swapped if name == "int4" else codes)
            ours[f"{key}_scales"].copy_(scale)
    return ours


def moments(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return state["exp_avg"].dequantize().clone(), state["exp_avg_sq"].dequantize().clone()


class Step:
    """One step of both from torchao's state."""

    def __init__(self, name: str, index: int, parameter: nn.Parameter, peer: Any) -> None:
        gradient, before = parameter.grad, parameter.detach().clone()
        assert gradient is not None
        zeros = torch.zeros(N)
        old = moments(peer.state[parameter]) if index > 1 else (zeros, zeros)
        self.ours = given(name, peer.state[parameter]) if index > 1 else fresh(name)
        weight = before.clone()
        STATE_FORMATS[name]().adamw([Update(weight, gradient, self.ours)], SETTINGS)
        peer.step()
        self.theirs = peer.state[parameter]
        self.moments = (
            0.9 * old[0] + 0.1 * gradient,
            0.99 * old[1] + 0.01 * gradient.square(),
        )
        divisor = (self.moments[1] / (1 - 0.99**index)).sqrt() * (1 - 0.9**index)
        largest = 1e-2 * (0.9 * old[0].abs() + 0.1 * gradient.abs()) / divisor
        # a moment decodes within DECODING, its root within half of that; a dozen roundings; and
        # torchao takes 1 - 0.99^t, of which a root divides, in fp32
        roundings = 12 + 0.5 / (1 - 0.99**index)
        limit = (1.5 * DECODING[name] + roundings * ULP) * largest + 4 * ULP * before.abs()
        assert ((weight - parameter.detach()).abs() <= limit).all(), f"step {index}"


def steps_of(name: str, *, flat: bool = False) -> Iterator[Step]:
    parameter, peer = peer_of(name)
    for index in range(1, STEPS + 1):
        parameter.grad = gradient_of(index, flat=flat)
        yield Step(name, index, parameter, peer)


def test_eight_bits_make_the_same_step_and_codes_that_are_as_near() -> None:
    """One map; bitsandbytes' table, which ours goes through on the CPU, has 2^16 bins."""
    for step in steps_of("int8"):
        for key, signed, exact in zip(KEYS, (True, False), step.moments, strict=True):
            code_map = torch.tensor(dynamic_map(signed=signed))
            assert torch.equal(code_map, step.theirs[key].qmap)
            scale = step.ours[f"{key}_scales"].repeat_interleave(256)
            mine = code_map[step.ours[f"{key}_codes"].int()] * scale
            yours = step.theirs[key].dequantize()
            assert ((mine - exact).abs() <= (yours - exact).abs() + 2**-15 * scale).all()


def test_expanded_fp8_makes_the_same_step_and_keeps_more_of_the_moments() -> None:
    for index, step in enumerate(steps_of("fp8"), start=1):
        for key, positive, exact in zip(KEYS, (False, True), step.moments, strict=True):
            parts = (step.ours[f"{key}_{part}"] for part in ("codes", "largest", "power"))
            codes, largest, power = parts
            mine = dequantize_expanded_reference(
                codes.view(-1, 128), largest, power, positive=positive
            ).view(-1)
            yours = step.theirs[key].dequantize()
            scale = step.theirs[key].scale.repeat_interleave(128)
            rounding = (2**-4 * exact.abs()).maximum(2**-10 * scale) * (1 + 8 * ULP)
            assert ((yours - exact).abs() <= rounding).all()  # plain E4M3, half a step
            lost = [(each - exact)[exact != 0] / exact[exact != 0] for each in (mine, yours)]
            assert lost[0].square().mean() < 0.8 * lost[1].square().mean(), f"step {index}"
            assert not ((mine == 0) & (exact != 0)).any()


def test_four_bits_make_the_same_step_and_the_same_codes_where_the_rules_agree() -> None:
    """Second moments are equal in every block here: the one case that both keep exactly.

    The first moments' map is the same; ours keeps the sign of a block's largest in the scale, so
    codes are compared where that is positive.
    """
    compared = 0
    for step in steps_of("int4", flat=True):
        blocks = step.ours["exp_avg_scales"] > 0
        packed = step.ours["exp_avg_codes"]
        mine = torch.stack([packed & 15, packed >> 4], dim=-1).view(-1, 128)[blocks]
        packed = step.theirs["exp_avg"].codes
        yours = torch.stack([packed >> 4, packed & 15], dim=-1).view(-1, 128)[blocks]
        assert (mine != yours).float().mean() < 1e-3  # on the edge between two codes
        assert (step.ours["exp_avg_sq_codes"] == 255).all()
        assert (step.theirs["exp_avg_sq"].codes == 255).all()
        compared += mine.numel()
    assert compared > STEPS * N / 4


@pytest.mark.parametrize(("name", "factor"), [("int8", 1.1), ("fp8", 0.8), ("int4", 0.75)])
def test_left_alone_it_stays_as_near_to_fp32_as_torchao_does_or_nearer(
    name: str, factor: float
) -> None:
    """Twenty steps of log-normal gradients, each on its own state; expansion and roots pay."""
    parameter, peer = peer_of(name)
    exact = nn.Parameter(parameter.detach().clone())
    start, weight, state = exact.detach().clone(), exact.detach().clone(), fresh(name)
    optimizer = torch.optim.AdamW([exact], **OPTIONS)
    for index in range(1, 21):
        parameter.grad = exact.grad = gradient_of(index)
        peer.step()
        optimizer.step()
        STATE_FORMATS[name]().adamw([Update(weight, exact.grad, state)], SETTINGS)
    moved = (exact.detach() - start).norm()
    ours, other = ((each.detach() - exact.detach()).norm() / moved for each in (weight, parameter))
    assert ours < factor * other
