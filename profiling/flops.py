"""FLOPs of what runs: the matrix products, convolutions and attention of every operator.

A product of [m, k] and [k, n] counts 2 m k n, wherever it comes from: forward, backward, what
checkpointing computes again, an optimizer's projections. Formulas are those of
`torch.utils.flop_counter` (its `flop_registry`, to which third parties may add), and here those
that it lacks. Element-wise work (norms, activations, the update of AdamW, quantising) counts
nothing: it is bound by memory traffic, not by arithmetic. Attention counts the whole square, as
torch does, though a causal kernel may skip half.

torch's own `FlopCounterMode` is not used: it follows modules with tensor hooks, which keep tensors
alive and would change the memory that a plan counts. This mode keeps nothing.

An operator that multiplies and has no formula is not silently free: it is named in `uncounted`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FlopCounter", "flops_of"]

Formula = Callable[..., int]
Where = Callable[[], tuple[int, str]]


def _matmul(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """[..., m, k] @ [..., k, n], and a vector on either side."""
    return 2 * left.numel() * (right.shape[-1] if right.ndim > 1 else 1)


def _added_matmul(_: Tensor, left: Tensor, right: Tensor, *__: Any, **___: Any) -> int:
    return _matmul(left, right)


def _outer(_: Tensor, left: Tensor, right: Tensor, *__: Any, **___: Any) -> int:
    return 2 * left.numel() * right.numel()


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Q Kᵀ and P V, for Q [batch, heads, queries, d], K and V [batch, heads or fewer, keys, d]."""
    return 2 * math.prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_backward(
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any
) -> int:
    """The scores again, dP and dV over V's width, dQ and dK over Q's."""
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return 2 * pairs * (3 * query.shape[-1] + 2 * value.shape[-1])


def _grouped(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Every row by the matrix of its group: [tokens, k] by [groups, k, n], and its gradients."""
    num_flops = 2 * left.numel() * right.shape[-1]
    return num_flops // left.shape[0] if left.ndim > right.ndim else num_flops


def _qr(matrix: Tensor, mode: str = "reduced") -> int:
    """Householder's, Q formed: 4 n² (m - n/3) for m >= n (Golub and Van Loan, 5.2)."""
    large, small = max(matrix.shape[-2:]), min(matrix.shape[-2:])
    return math.prod(matrix.shape[:-2]) * (4 * small**2 * large - 4 * small**3 // 3)


def _eigh(matrix: Tensor, *_: Any, **__: Any) -> int:
    """About 9 n³ with eigenvectors (Golub and Van Loan, 8.3)."""
    return math.prod(matrix.shape[:-2]) * 9 * int(matrix.shape[-1]) ** 3


def _ladder_down(hidden: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """H [tokens, hidden] by a weight [side, hidden]."""
    return 2 * hidden.numel() * int(weight.shape[0])


def _lora(output: Tensor, x: Tensor, a: Tensor, *_: Any, **__: Any) -> int:
    """H [tokens, r] from X, and Z from H."""
    return 2 * int(a.shape[0]) * (x.numel() + output.numel())


def _lora_backward(
    gradient: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dtype: torch.dtype,
    needs_x: bool,
) -> int:
    """H again, dH, dA and dB, and dX where it is needed."""
    return 2 * int(a.shape[0]) * ((2 + needs_x) * x.numel() + 2 * gradient.numel())


def _gradient_times(_: Tensor, a: Tensor, b: Tensor, matrix: Tensor) -> int:
    """B M [tokens, k] for M [b, k], and Aᵀ by it."""
    return 2 * (a.numel() + b.numel()) * int(matrix.shape[1])


_FORMULAS: dict[str, Formula] = {
    "aten::_grouped_mm": _grouped,
    "aten::_linalg_eigh": _eigh,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::addbmm": _added_matmul,
    "aten::addmm_": _added_matmul,
    "aten::addmv": _added_matmul,
    "aten::addmv_": _added_matmul,
    "aten::addr": _outer,
    "aten::baddbmm_": _added_matmul,
    "aten::dot": _matmul,
    "aten::linalg_qr": _qr,
    "aten::mv": _matmul,
    "aten::vdot": _matmul,
    "memrt::add_gradient_times": _gradient_times,
    "memrt::ladder_down": _ladder_down,
    "memrt::lora": _lora,
    "memrt::lora_backward": _lora_backward,
    "memrt::projected_update": _added_matmul,
}
"""What torch's registry lacks."""

_ELEMENTWISE = frozenset(
    f"memrt::{name}"
    for name in (
        "adalomo",
        "add_channels",
        "adamw_fp8",
        "adamw_fp8_foreach",
        "adamw_int4",
        "adamw_int8",
        "all_finite",
        "channel_norms",
        "fill_gaussian",
        "int8_dequantize",
        "int8_quantize",
        "ladder_gradients",
        "ladder_mix",
        "nf4_dequantize",
        "nf4_quantize",
        "stochastic_copy",
        "uniform_int4_dequantize",
        "uniform_int4_quantize",
    )
)
"""Operators of ours without a product in them."""

_KNOWN_NAMESPACES = frozenset({"aten", "prim", "prims", "profiler"})

_PRODUCTS = re.compile(
    "attention|attn|bilinear|cdist|cholesky|conv.*|dot|eig|einsum|fft|geqrf|ger|gru|inner|linalg|"
    "linear|lobpcg|lstm|lstsq|lu|matmul|.*mm|.*mv|orgqr|ormqr|outer|qr|rnn|solve|svd|tensordot|"
    "trilinear|vdot"
)
"""Words in the names of torch's operators that multiply."""


def _multiplies(operator: str) -> bool:
    """Whether an operator without a formula does work that ought to be counted."""
    namespace, _, name = operator.partition("::")
    if operator in _ELEMENTWISE:
        return False
    if namespace not in _KNOWN_NAMESPACES:
        return True  # another library's: nobody knows
    words = name.split("_")
    return "norm" not in words and any(_PRODUCTS.fullmatch(word) for word in words)


def _formula(func: Any) -> Formula | None:
    own = _FORMULAS.get(func._schema.name)
    if own is not None:
        return own
    from torch.utils.flop_counter import flop_registry

    registered: Formula | None = flop_registry.get(func._overloadpacket)
    return registered


def flops_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int | None:
    """FLOPs of one call; None where the operator multiplies and there is no formula."""
    formula = _formula(func)
    if formula is None:
        return None if _multiplies(func._schema.name) else 0
    if func._schema.name in _FORMULAS:
        return int(formula(*args, **kwargs))
    return int(formula(*args, **kwargs, out_val=result))


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is entered; `where` names optimizer step and phase of what runs."""

    def __init__(self, where: Where = lambda: (0, "")) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[tuple[int, str], int] = {}
        """FLOPs by step and phase."""
        self.uncounted: set[str] = set()
        """Operators that multiply and have no formula."""
        self._where = where
        self._free: set[Any] = set()

    @property
    def total(self) -> int:
        """FLOPs of everything so far."""
        return sum(self.flops.values())

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(func, args, kwargs or {}, result)
        return result

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Count one call, for who sees calls already (`Ledger.on_operator`)."""
        if func not in self._free:
            self._count(func, args, kwargs, result)

    def _count(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not isinstance(func, torch._ops.OpOverload):
            self.uncounted.add(str(func))  # a higher-order operator runs code of its own
            return
        num_flops = flops_of(func, args, kwargs, result)
        if num_flops is None:
            self.uncounted.add(func._schema.name)
        elif _formula(func) is None:
            self._free.add(func)
        else:
            key = self._where()
            self.flops[key] = self.flops.get(key, 0) + num_flops
