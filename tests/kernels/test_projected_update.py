"""The low-rank step of a weight: against fp64 and piece by piece, its rounding, bytes, kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels import projected_update as module
from memrt.kernels.projected_update import (
    ScaledAddend,
    projected_update_,
    projected_update_reference,
    workspace_bytes,
)
from memrt.kernels.stochastic_rounding import Rounding, stochastic_copy_
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted
from tests.kernels.live_bytes import LiveBytes

OPERATOR = torch.ops.memrt.projected_update.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(1, 3, 1), (67, 40, 5), (24, 130, 17), (130, 70, 40)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
KEY = (123456789, 987654321)


def rounding(step: int = 3) -> Rounding:
    return Rounding(KEY, torch.tensor(float(step)))


@dataclass
class Inputs:
    """What an update takes, apart from its rounding."""

    weight: Tensor
    left: Tensor
    right: Tensor
    addend: ScaledAddend | None = None
    alpha: float = -0.25
    decay: float = 0.875

    def updated(self, *, rounding: Rounding | None = None) -> Tensor:
        weight = self.weight.clone()
        settings: dict[str, Any] = {"alpha": self.alpha, "decay": self.decay}
        projected_update_(
            weight, self.left, self.right, addend=self.addend, rounding=rounding, **settings
        )
        return weight

    def exact(self) -> Tensor:
        """What it comes to before rounding, in fp64."""
        return projected_update_reference(
            self.weight,
            self.left.double(),
            self.right.double(),
            alpha=self.alpha,
            decay=self.decay,
            addend=self.addend,
        )

    def arguments(self, *, rounding: Rounding | None = None) -> dict[str, Any]:
        """Those of the operator."""
        addend = self.addend or ScaledAddend(self.weight, self.left, 0.0, False)
        return {
            "weight": self.weight.clone(),
            "left": self.left,
            "right": self.right,
            "alpha": self.alpha,
            "decay": self.decay,
            "gradient": None if self.addend is None else addend.gradient,
            "factors": None if self.addend is None else addend.factors,
            "gradient_alpha": addend.alpha,
            "by_column": addend.by_column,
            "step": None if rounding is None else rounding.step,
            "rounding_key": [] if rounding is None else list(rounding.key),
        }


def inputs_of(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    added: str | None = None,
    transposed: bool = False,
    whole: bool = False,
) -> Inputs:
    """Random numbers; `whole` gives few-bit ones, of which every sum in any order is exact."""
    rows, columns, rank = shape
    generator = torch.Generator().manual_seed(sum(shape))

    def made(*size: int) -> Tensor:
        if whole:
            return torch.randint(-8, 9, size, generator=generator).float() / 8
        return torch.randn(*size, generator=generator)

    addend = None
    if added is not None:
        factors = made(columns if added == "columns" else rows)
        addend = ScaledAddend(made(rows, columns).to(dtype), factors, -0.5, added == "columns")
    right = made(columns, rank).t() if transposed else made(rank, columns)
    return Inputs(made(rows, columns).to(dtype), made(rows, rank), right, addend)


def assert_near(found: Tensor, inputs: Inputs) -> None:
    """Rounded once to the weight's dtype; before that fp32, 2^-21 for each product."""
    exact, wide = inputs.exact(), inputs.left.double().abs() @ inputs.right.double().abs()
    terms = inputs.weight.double().abs() + wide
    if inputs.addend is not None:
        terms += inputs.addend.gradient.double().abs() * inputs.addend.factors.abs().max()
    slack = torch.finfo(inputs.weight.dtype).eps / 2 * exact.abs() + 2**-21 * terms
    assert bool(((found.double() - exact).abs() <= slack).all())


# ---------------------------------------------------------------- the formula


@each_shape
@each_dtype
@pytest.mark.parametrize("added", [None, "rows", "columns"])
def test_it_is_the_formula_rounded_once(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    added: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = inputs_of(shape, dtype, added=added, transposed=True)
    whole = inputs.updated()
    assert_near(whole, inputs)
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 100)  # some rows at a time
    assert_near(inputs.updated(), inputs)
    exact = inputs_of(shape, dtype, added=added, whole=True)
    assert torch.equal(exact.updated(), exact.exact().to(dtype))


def test_float64_stays_float64() -> None:
    inputs = inputs_of(SHAPES[1], torch.float32, added="rows")
    inputs.weight = inputs.weight.double() + 1e-12
    assert (inputs.updated() - inputs.exact()).abs().max() < 1e-14


@pytest.mark.parametrize("added", [None, "columns"])
def test_in_one_pass_it_is_what_it_was_in_several(added: str | None) -> None:
    """fp32: decay, product and gradient one after the other, as before they were fused."""
    inputs = inputs_of(SHAPES[3], torch.float32, added=added)
    weight = inputs.weight.clone().mul_(inputs.decay)
    weight.addmm_(inputs.left, inputs.right, alpha=inputs.alpha)
    if inputs.addend is not None:
        gradient, factors, alpha, _ = inputs.addend
        weight.addcmul_(gradient, factors, value=alpha)
    assert torch.equal(inputs.updated(), weight)


@each_shape
@pytest.mark.parametrize("added", [None, "rows"])
def test_rounded_stochastically_it_has_the_bits_of_a_whole_fp32_copy(
    shape: tuple[int, int, int], added: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(shape, torch.bfloat16, added=added, whole=True)
    inputs.alpha = 2.0**-12  # below bf16's last bit, so that there is something to round
    wide = Inputs(**{**vars(inputs), "weight": inputs.weight.float()}).updated()
    expected = torch.empty_like(inputs.weight)
    stochastic_copy_(expected, wide, rounding=rounding())
    monkeypatch.setattr(module, "PIECE_ELEMENTS", 100)
    found = inputs.updated(rounding=rounding())
    assert torch.equal(found, expected)
    if found.numel() > 100:
        assert not torch.equal(found, wide.bfloat16())
        assert not torch.equal(found, inputs.updated(rounding=rounding(step=4)))


def test_a_weight_with_strides_is_updated_where_it_lies() -> None:
    inputs = inputs_of(SHAPES[1], torch.bfloat16)
    plain = inputs.updated(rounding=rounding())
    inputs.weight = inputs.weight.t().contiguous().t()
    turned = inputs.updated(rounding=rounding())
    assert not turned.is_contiguous()
    assert torch.equal(turned, plain)


# ---------------------------------------------------------------- the operator


@each_dtype
@pytest.mark.parametrize("added", [None, "rows"])
@pytest.mark.parametrize("block", [200, 2**20])
def test_workspace_is_what_the_body_allocates(
    dtype: torch.dtype, added: str | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_ELEMENTS", block)
    arguments = inputs_of((67, 40, 5), dtype, added=added).arguments()
    with LiveBytes([v for v in arguments.values() if isinstance(v, Tensor)]) as seen:
        module._projected_update._init_fn(**arguments)
    assert seen.peak_bytes == workspace_bytes(**arguments)
    narrow = 0 if dtype == torch.float32 else 1 + (added is not None)
    assert seen.peak_bytes == 4 * narrow * 40 * (67 if block > 200 else 5)


def test_workspace_holds_what_stochastic_rounding_takes() -> None:
    inputs = inputs_of((67, 40, 5), torch.bfloat16)
    plain = workspace_bytes(**inputs.arguments())
    assert workspace_bytes(**inputs.arguments(rounding=rounding())) == plain + 29 * 67 * 40


def test_a_gpu_needs_nothing_beside_the_weight() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cuda"):
        weight = torch.empty(67, 40, dtype=torch.bfloat16)
        left, right, step = torch.empty(67, 5), torch.empty(5, 40), torch.empty(())
        projected_update_(weight, left, right, alpha=1.0, rounding=Rounding(KEY, step))
        rest = (1.0, 1.0, None, None, 0.0, False, step, list(KEY))
        assert workspace_bytes(weight, left, right, *rest) == 0


@pytest.mark.parametrize("added", [None, "columns"])
def test_opcheck(added: str | None) -> None:
    inputs = inputs_of(SHAPES[1], torch.bfloat16, added=added)
    torch.library.opcheck(OPERATOR, (), inputs.arguments(rounding=rounding()))


def test_wrong_arguments_are_refused() -> None:
    inputs = inputs_of(SHAPES[1], torch.float32, added="rows")
    assert inputs.addend is not None
    with pytest.raises(ValueError, match="stochastic rounding is for bf16 weights"):
        inputs.updated(rounding=rounding())
    with pytest.raises(ValueError, match=r"factors \(67,\): give \(67, 40\) and \(40,\)"):
        Inputs(
            inputs.weight, inputs.left, inputs.right, inputs.addend._replace(by_column=True)
        ).updated()
    with pytest.raises(ValueError, match=r"weight is \(67, 40\), left \(67, 4\)"):
        Inputs(inputs.weight, inputs.left[:, 1:], inputs.right).updated()
    with pytest.raises(ValueError, match=r"left is torch\.bfloat16"):
        Inputs(inputs.weight, inputs.left.bfloat16(), inputs.right).updated()


# ---------------------------------------------------------------- Triton


def test_the_interpreted_kernel_is_right_and_rounds_with_the_same_bits() -> None:
    """Sums that are exact give equal bits, rounded either way; others the error of fp32."""
    pytest.importorskip("triton", reason="Triton is not installed")
    cases = []
    for dtype in DTYPES:
        for shape, added, transposed in (
            (SHAPES[0], None, False),
            (SHAPES[1], "rows", True),
            (SHAPES[2], "columns", False),
            (SHAPES[3], None, True),
        ):
            for whole in (False, True):
                inputs = inputs_of(shape, dtype, added=added, transposed=transposed, whole=whole)
                if whole and dtype is torch.bfloat16:
                    inputs.alpha = 2.0**-12
                    cases.append((inputs, True, rounding()))
                cases.append((inputs, whole, None))
    turned = inputs_of(SHAPES[1], torch.bfloat16, whole=True)
    turned.weight = turned.weight.t().contiguous().t()
    cases.append((turned, True, rounding()))
    calls = [inputs.arguments(rounding=each) for inputs, _, each in cases]
    found = call_interpreted("memrt.kernels.projected_update:_projected_update", calls)
    for (inputs, exact, each), left in zip(cases, found, strict=True):
        if exact:
            assert torch.equal(left["weight"], inputs.updated(rounding=each))
        else:
            assert_near(left["weight"], inputs)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_compiles_for_every_architecture_without_spills(
    dtype: str, record_property: Callable[[str, object], None]
) -> None:
    """With all that an epilogue can have, the right factor a transposed basis."""
    pytest.importorskip("triton", reason="Triton is not installed")
    pointers = {"weight_ptr": f"*{dtype}", "gradient_ptr": f"*{dtype}"}
    strides = ("weight_row", "left_row", "right_column", "gradient_row")
    ones = ("weight_column", "left_rank", "right_rank", "gradient_column")
    names = ("num_rows", "num_columns", "rank", *(f"{name}_stride" for name in strides))
    found = compile_ahead(
        "memrt.kernels._triton.projected_update:projected_update_kernel",
        {
            **pointers,
            **dict.fromkeys(("left_ptr", "right_ptr", "factors_ptr", "step_ptr"), "*fp32"),
            **dict.fromkeys((*names, "key0", "key1"), "i32"),
            **dict.fromkeys(("alpha", "decay", "gradient_alpha"), "fp32"),
        },
        {
            **dict.fromkeys((f"{name}_stride" for name in ones), 1),
            "HAS_GRADIENT": True,
            "FACTORS_BY_COLUMN": True,
            "STOCHASTIC": dtype == "bf16",
            "BLOCK_ROWS": 64,
            "BLOCK_COLUMNS": 64,
            "BLOCK_RANK": 16,
        },
        num_warps=4,
        enable_fp_fusion=False,
    )
    assert set(found) == set(ARCHITECTURES)
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        # 4 warps: two programs have room for their registers on a multiprocessor whatever they take
        assert resources.spill_bytes == 0, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture] // 2, resources


@pytest.mark.gpu
@each_dtype
def test_a_gpu_has_the_numbers_and_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for added in (None, "rows", "columns"):
        for whole in (False, True):
            inputs = inputs_of((1000, 520, 72), dtype, added=added, transposed=True, whole=whole)
            way = rounding() if whole and dtype is torch.bfloat16 else None
            expected = inputs.updated(rounding=way)
            tensors = {
                name: value.cuda() for name, value in vars(inputs).items() if hasattr(value, "cuda")
            }
            if inputs.addend is not None:
                gradient, factors, *rest = inputs.addend
                tensors["addend"] = ScaledAddend(gradient.cuda(), factors.cuda(), *rest)
            found = Inputs(**{**vars(inputs), **tensors}).updated(rounding=way).cpu()
            if whole:
                assert torch.equal(found, expected)
            else:
                assert_near(found, inputs)
