"""LoRA that keeps its inputs once, in the base's dtype.

The branch is PEFT's, y + (alpha / r) (M ∘ x) Aᵀ Bᵀ with the dropout's mask M. On a bf16 base PEFT
keeps for every adapted layer an fp32 copy of its input, and with dropout two more tensors of that
size: LoRA on five linear layers of a decoder layer keeps 29.8 units (42.5 with dropout; one unit is
a layer's input in bf16) where full fine-tuning keeps 23.2. Here the input is kept as it came, once
for the layers that share it; the branch and the dropout's mask are computed again in backward. In a
gated MLP whose last layer is adapted, activation and product are computed again too: about 16
units. The adapters, their checkpoints and their gradients are PEFT's, to the rounding of a sum.
Costs 2 · in · r operations a token and layer, and the mask. On CUDA, Triton kernels read the wide
tensors as they came and add the branch while they write, without an fp32 copy or a temporary of a
layer's output; with dropout, the mask and the dropped input are made before them, in the adapters'
dtype. LoRA: Hu et al. 2021, arXiv 2106.09685; keeping its input once is memrt's, see
`memrt.kernels.lora`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from memrt.adapters import adapter_layers
from memrt.kernels.gated_product import Source, gated_product
from memrt.kernels.lora import lora
from memrt.profiling.accounts import Account
from memrt.registry import register
from memrt.strategy import Attachment, Phase, Promise, Strategy
from memrt.surgery import subclass_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["FusedLora"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class FusedLora(Strategy):
    """No settings: rank, dropout and targets are the adapters'."""

    name: ClassVar[str] = "fused_lora"
    phase: ClassVar[Phase] = Phase.ACTIVATIONS
    lowers: ClassVar[tuple[Account, ...]] = (Account.ACTIVATIONS,)
    needs: ClassVar[frozenset[Promise]] = frozenset(
        {Promise.GRADIENT_IS_FORMED, Promise.PARAMETERS_REST_IN_BACKWARD}
    )

    def check_stack(self, others: Sequence[Strategy], facts: Facts) -> None:
        """Needs LoRA on linear layers: from the strategy `peft`, or in the model already."""
        for other in others:
            build = getattr(other, "build", None) if other.name == "peft" else None
            if build is not None and build().peft_type.value != "LORA":
                raise ValueError(
                    f"{other} is not LoRA, whose branch is what can be fused; leave fused_lora out"
                )
            if build is not None:
                return
        if not _fusible(facts.model):
            raise ValueError(
                "the model has no LoRA layers of PEFT; add \"peft(method='lora')\" to the stack"
            )

    def attach(self, run: Session) -> Attachment:
        """Recast the LoRA layers, and the gated MLPs before one."""
        names = _fusible(run.model)
        if not names:
            raise ValueError(
                "none of the adapted layers can be fused (LoRA on linear layers can, without DoRA "
                "and other variants); leave fused_lora out"
            )
        for name in names:
            run.recast(name, _fused_layer(type(run.model.get_submodule(name))))
        for name, module in list(run.model.named_modules()):
            if _is_gated_mlp(module):
                run.recast(name, _fused_mlp(type(module)))
        return Attachment(self, run)


def _fusible(model: nn.Module) -> list[str]:
    """Names of the layers with plain LoRA on a linear layer."""
    from peft.tuners.lora.layer import Linear

    return [
        name
        for name, layer in adapter_layers(model)
        if type(layer) is Linear and not layer.lora_variant and "forward" not in vars(layer)
    ]


def _is_gated_mlp(module: nn.Module) -> bool:
    """Llama's MLP to the letter, under whatever name, with LoRA on its last layer."""
    if not isinstance(getattr(module, "down_proj", None), _FusedLayer):
        return False
    from transformers.models.llama.modeling_llama import LlamaMLP

    code = getattr(type(module).forward, "__code__", None)
    known = LlamaMLP.forward.__code__
    same = code is not None and (code.co_code, code.co_names) == (known.co_code, known.co_names)
    activation = getattr(module, "act_fn", None)
    stateless = isinstance(activation, nn.Module) and not any(True for _ in activation.parameters())
    return same and stateless and "forward" not in vars(module)


class _FusedLayer:
    """The forward of a LoRA layer, where it is the plain one."""

    training: bool
    base_layer: nn.Module
    lora_A: nn.ModuleDict  # noqa: N815 - PEFT's names
    lora_B: nn.ModuleDict  # noqa: N815
    lora_dropout: nn.ModuleDict
    lora_bias: dict[str, bool]
    scaling: dict[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def is_plain(self) -> bool:
        """Whether one adapter is active, is trained, and has nothing that PEFT treats apart."""
        if self.disable_adapters or self.merged or not torch.is_grad_enabled():
            return False
        active = [name for name in self.active_adapters if name in self.lora_A]
        return len(active) == 1 and not self.lora_bias[active[0]]

    def fused(self, output: Tensor, x: Tensor, source: Source | None) -> Tensor:
        """The adapter's branch added to the base layer's output."""
        (name,) = (name for name in self.active_adapters if name in self.lora_A)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        dropout = getattr(self.lora_dropout[name], "p", 0.0) if self.training else 0.0
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        scaling = self.scaling[name]
        return lora(output, x, a, b, scaling=scaling, dropout=dropout, source=source)


def _fused_layer(kind: type[nn.Module]) -> type[nn.Module]:
    plain = kind.forward

    class Fused(_FusedLayer):
        @wraps(plain)
        def forward(
            self, x: Tensor, *args: Any, memrt_source: Source | None = None, **kwargs: Any
        ) -> Tensor:
            if args or kwargs or not self.is_plain():
                result: Tensor = plain(self, x, *args, **kwargs)
                return result
            return self.fused(self.base_layer(x), x, memrt_source)

    return subclass_of(kind, Fused)


def _fused_mlp(kind: type[nn.Module]) -> type[nn.Module]:
    plain = kind.forward

    class Fused:
        gate_proj: nn.Module
        up_proj: nn.Module
        down_proj: Any
        act_fn: nn.Module

        @wraps(plain)
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor
            if not self.down_proj.is_plain():
                result = plain(self, x)
                return result
            gate, up = self.gate_proj(x), self.up_proj(x)
            activation = self.act_fn.forward  # no hooks when backward calls it again
            product = gated_product(gate, up, activation)
            result = self.down_proj(product, memrt_source=Source(activation, gate, up))
            return result

    return subclass_of(kind, Fused)
