"""The LoRA branch and the gated product: against PEFT's formula under autograd, fp64, and bytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import memrt.kernels.lora as module
from memrt.kernels.gated_product import Source, gated_product
from memrt.kernels.lora import lora, lora_reference
from memrt.profiling.kernel_scratch import scratch_of

WIDTHS = {"in": 40, "out": 24, "rank": 4}
LEADING = [(1,), (7,), (2, 3), (0,)]


def inputs(leading: tuple[int, ...], dtype: torch.dtype, *, wide: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, to: torch.dtype) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype).to(to).requires_grad_()

    base = torch.float64 if wide else dtype
    adapter = torch.float64 if wide else torch.float32
    return [
        draw(*leading, WIDTHS["out"], to=base),
        draw(*leading, WIDTHS["in"], to=base),
        draw(WIDTHS["rank"], WIDTHS["in"], to=adapter),
        draw(WIDTHS["out"], WIDTHS["rank"], to=adapter),
    ]


def gradients(call: Any, tensors: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(3)
    result = call(*tensors, scaling=2.0, dropout=0.3)
    gradient = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view(result.shape)
    return [result, *torch.autograd.grad(result, tensors, gradient.to(result.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_output_and_gradients_of_pefts_formula(
    leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    """The same mask from the same generator; the same sums, so bits but for their order."""
    found = gradients(lora, inputs(leading, dtype))
    wanted = gradients(lora_reference, inputs(leading, dtype))
    assert torch.equal(found[0], wanted[0])
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        tolerance = 8 * torch.finfo(one.dtype).eps
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_against_fp64_is_that_of_pefts_formula(dtype: torch.dtype) -> None:
    def run(call: Any, *, wide: bool = False) -> list[Tensor]:
        tensors = inputs((33,), dtype, wide=wide)
        result = call(*tensors, scaling=2.0, dropout=0.0)
        gradient = torch.linspace(-1, 1, result.numel()).view(result.shape).to(dtype)
        return [result, *torch.autograd.grad(result, tensors, gradient.to(result.dtype))]

    truth = run(lora_reference, wide=True)
    for found, plain, true in zip(run(lora), run(lora_reference), truth, strict=True):
        error = (found.double() - true).norm()
        assert error <= 2 * (plain.double() - true).norm() + 1e-12


def test_under_autocast_it_multiplies_as_peft_does() -> None:
    results = []
    for call in (lora, lora_reference):
        tensors = inputs((5,), torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = call(*tensors, scaling=2.0, dropout=0.0)
        results.append([result, *torch.autograd.grad(result.sum(), tensors)])
    for found, wanted in zip(*results, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.allclose(found, wanted, rtol=2**-6, atol=2**-6)


def saved_bytes(call: Any) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = call()  # noqa: F841 - its graph
    return sum(storages.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_keeps_the_input_once_in_its_own_dtype(dropout: float) -> None:
    output, x, a, b = inputs((64,), torch.bfloat16)
    weights = a.nbytes + b.nbytes
    kept = saved_bytes(
        lambda: [lora(output, x, a, b, scaling=2.0, dropout=dropout) for _ in range(3)]
    )
    assert kept == weights + x.nbytes
    plain = saved_bytes(
        lambda: [lora_reference(output, x, a, b, scaling=2.0, dropout=dropout) for _ in range(3)]
    )
    assert plain >= weights + 3 * 2 * x.nbytes


def test_the_generator_goes_on_as_if_nothing_was_drawn_again() -> None:
    output, x, a, b = inputs((5,), torch.float32)
    torch.manual_seed(0)
    result = lora(output, x, a, b, scaling=1.0, dropout=0.5)
    state = torch.get_rng_state()
    result.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("activation", [functional.silu, functional.gelu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_product_and_a_branch_that_makes_its_input_again(
    dtype: torch.dtype, activation: Any
) -> None:
    """Bits of autograd's own, with gate and up as all that is kept."""
    torch.manual_seed(0)
    gate, up = (torch.randn(6, 40, dtype=dtype, requires_grad=True) for _ in range(2))
    output, _, a, b = inputs((6,), dtype)
    results = []
    for fused in (True, False):
        torch.manual_seed(1)
        if fused:
            x = gated_product(gate, up, activation)
            source = Source(activation, gate, up)
            result = lora(output, x, a, b, scaling=2.0, dropout=0.3, source=source)
        else:
            x = activation(gate) * up
            result = lora_reference(output, x, a, b, scaling=2.0, dropout=0.3)
        results.append([result, *torch.autograd.grad(result.sum(), (gate, up, a, b))])
    for found, wanted in zip(*results, strict=True):
        tolerance = 8 * torch.finfo(found.dtype).eps
        assert torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)

    def fused_graph() -> Tensor:
        x = gated_product(gate, up, activation)
        return lora(output, x, a, b, scaling=2.0, source=Source(activation, gate, up))

    assert saved_bytes(fused_graph) == gate.nbytes + up.nbytes + a.nbytes + b.nbytes


def test_a_frozen_input_gets_no_gradient() -> None:
    output, x, a, b = inputs((5,), torch.float32)
    result = lora(output.detach(), x.detach(), a, b, scaling=1.0)
    result.sum().backward()
    assert a.grad is not None
    assert x.grad is None


def test_a_second_derivative_is_refused() -> None:
    tensors = inputs((5,), torch.float32)
    loss = lora(*tensors, scaling=1.0).square().sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, tensors[1], create_graph=True)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_change_sums_alone(adapter: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three pieces of tokens, the last of them short, against one."""
    results = []
    for elements in (module.PIECE_ELEMENTS, 3 * WIDTHS["in"]):
        monkeypatch.setattr(module, "PIECE_ELEMENTS", elements)
        output, x, a, b = inputs((7,), torch.bfloat16)
        a, b = (each.detach().to(adapter).requires_grad_() for each in (a, b))
        result = lora(output, x, a, b, scaling=2.0)
        gradient = torch.linspace(-1, 1, result.numel()).view(result.shape).bfloat16()
        results.append([result, *torch.autograd.grad(result, (output, x, a, b), gradient)])
    for one, other in zip(*results, strict=True):
        tolerance = 4 * torch.finfo(one.dtype).eps
        # sums of terms that are as large as the largest of them: processors add in other orders
        largest = float(one.abs().max()) if one.dtype == torch.float32 else 1.0
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needs_x", [True, False])
def test_workspace_is_what_the_operators_take(
    dtype: torch.dtype, needs_x: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The declared bytes are an upper bound, not far; and no cast of a whole X among them."""
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 1 << 15)
    generator = torch.Generator().manual_seed(0)
    output, x, a, b = (
        torch.randn(*shape, generator=generator)
        for shape in ((512, 384), (512, 256), (8, 256), (384, 8))
    )
    output, x = output.to(dtype), x.to(dtype)
    forward = (output, x, a, b, 2.0, torch.float32)
    backward = (torch.ones_like(output), x, a, b, 2.0, torch.float32, needs_x)
    for operator, arguments, declared in (
        ("memrt::lora", forward, module.forward_workspace_bytes(*forward)),
        ("memrt::lora_backward", backward, module.backward_workspace_bytes(*backward)),
    ):
        call = getattr(torch.ops.memrt, operator.removeprefix("memrt::"))
        taken = scratch(lambda call=call, arguments=arguments: call(*arguments), operator)
        assert taken <= declared + 1024
        assert declared <= 1.05 * taken
        assert declared < 4 * x.numel()


def scratch(call: Any, operator: str) -> int:
    """What torch's profiler saw an operator allocate and free inside itself."""
    call()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return scratch_of(events, {operator})[operator]


@pytest.mark.parametrize("needs_x", [True, False])
def test_opcheck(needs_x: bool) -> None:
    output, x, a, b = (each.detach() for each in inputs((2, 3), torch.bfloat16))
    kinds = (2.0, torch.float32)
    torch.library.opcheck(torch.ops.memrt.lora.default, (output, x, a, b, *kinds))
    arguments = (torch.ones_like(output), x, a, b, *kinds, needs_x)
    torch.library.opcheck(torch.ops.memrt.lora_backward.default, arguments)
