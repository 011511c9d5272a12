"""GaLore without the gradient: AdamW in a rank-r subspace, and dW is never formed.

For a linear layer y = x Wᵀ with W [out, in], m the smaller and n the larger side: the state lives
in the subspace of an orthonormal basis P [m, r]. With out < in the low-rank gradient is
R = Pᵀ dW = (dY P)ᵀ X [r, in]; otherwise R = dW P = dYᵀ (X P) [out, r]. Both are exact, cheaper than
dW itself for r < m n / (m + n), and linear, so that micro-batches accumulate in R. AdamW's
direction N of R is applied as W ← W (1 - lr·wd) - lr·scale·P N (or N Pᵀ). P comes from sketches of
dYᵀX, refreshed every `every` steps, warm-started and staggered over the layers; moments are kept.

Bytes per projected weight: basis 4 m r, moments 8 n r (2.03 n r with `int8_states`), gradient 4 n r
in place of 4 m n. Embeddings, head, norms, biases keep AdamW. Zhao et al. 2024, arXiv 2403.03507;
the projection without the gradient is memrt's. With an injected identity basis it is AdamW.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from memrt.kernels.projected_linear import projected_conv1d, projected_linear
from memrt.optimizer_slots import require_adamw
from memrt.optimizers.subspace import Subspace
from memrt.profiling.accounts import Account
from memrt.registry import register
from memrt.strategy import Attachment, Claim, Phase, Promise, Rule, Slot, Strategy
from memrt.surgery import subclass_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memrt.session import Session
    from memrt.structure import Facts

__all__ = ["Galore"]

TARGETS = ("all", "attention", "mlp")
NORMS = ("projected", "exact")

logger = logging.getLogger(__name__)


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Galore(Strategy):
    """Settings (defaults of the authors' README).

    rank: of the subspace. A weight whose smaller side is not above it keeps plain AdamW.
    every: optimizer steps between two refreshes of a weight's basis.
    scale: factor on the projected update (the paper's alpha).
    targets: linear weights of the repeated layers: "all", "attention" or "mlp".
    norm: what clipping and the log use for projected weights: "projected" (the norm of R, at most
        the true one) or "exact" (the true norm; one micro-batch a step, at most one dW product).
    seed: of the random sketches.
    """

    name: ClassVar[str] = "galore"
    phase: ClassVar[Phase] = Phase.UPDATE
    lowers: ClassVar[tuple[Account, ...]] = (Account.GRADIENTS, Account.OPTIMIZER)
    breaks: ClassVar[frozenset[Promise]] = frozenset({Promise.GRADIENT_IS_FORMED})

    rank: int = 128
    every: int = 200
    scale: float = 0.25
    targets: str = "all"
    norm: str = "projected"
    seed: int = 42

    def __post_init__(self) -> None:
        for option in ("rank", "every"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{option}={value!r}: must be a whole number, 1 or more")
        if not isinstance(self.scale, (int, float)) or not self.scale > 0:
            raise ValueError(f"scale={self.scale!r}: must be a number above 0")
        if self.targets not in TARGETS:
            raise ValueError(f"targets={self.targets!r}: use one of {', '.join(TARGETS)}")
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r}: use one of {', '.join(NORMS)}")

    def check(self, facts: Facts) -> None:
        """Needs AdamW and linear weights in repeated layers."""
        require_adamw(facts)
        if not _linear_weights(facts, self.targets):
            raise ValueError(
                f"targets={self.targets!r} matches no trainable linear weight in the layers of "
                f"{type(facts.model).__name__}; use targets='all' or another strategy"
            )
        if self.norm == "exact" and facts.settings.accumulation_steps > 1:
            raise ValueError(
                "norm='exact' cannot be had over several micro-batches "
                f"(gradient_accumulation_steps={facts.settings.accumulation_steps}) when the "
                "gradient is never formed; use norm='projected' or one micro-batch a step"
            )

    def projected(self, facts: Facts) -> list[str]:
        """Names of the weights that are projected; the others are below the rank."""
        return [
            name
            for name, weight in _linear_weights(facts, self.targets).items()
            if min(weight.shape) > self.rank
        ]

    def claims(self, facts: Facts) -> list[Claim]:
        """The projection of the projected weights."""
        return [Claim(slot=Slot.PROJECTION, scope=frozenset(self.projected(facts)))]

    def attach(self, run: Session) -> Attachment:
        """Recast the linear layers of the projected weights to ones without a weight gradient."""
        return _Galore(self, run)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' `Conv1D` (GPT-2): y = x W + b with W [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _linear_weights(facts: Facts, targets: str) -> dict[str, nn.Parameter]:
    found = {}
    for name, module in facts.model.named_modules():
        # with a forward of its own it computes something else than y = x Wᵀ + b
        linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if not (linear or _is_conv1d(module)) or "forward" in vars(module):
            continue
        weight_name, weight = f"{name}.weight", module.weight
        attention = facts.structure.is_attention(name)
        wanted = targets == "all" or attention == (targets == "attention")
        if (
            wanted
            and facts.structure.layer_of(name) is not None
            and isinstance(weight, nn.Parameter)
            and weight.requires_grad
            and weight_name not in facts.structure.tied
        ):
            found[weight_name] = weight
    return found


class _ProjectedLinear:
    weight: nn.Parameter
    bias: nn.Parameter | None
    _memrt_sink: Subspace


def _projected(kind: type[nn.Module]) -> type[nn.Module]:
    plain = kind.forward
    product = projected_linear if issubclass(kind, nn.Linear) else projected_conv1d

    class Projected(_ProjectedLinear):
        @wraps(plain)
        def forward(self, x: Tensor) -> Tensor:
            if not (torch.is_grad_enabled() and self.weight.requires_grad):
                result: Tensor = plain(self, x)
                return result
            return product(x, self.weight, self.bias, self._memrt_sink)

    return subclass_of(kind, Projected)


class _Galore(Attachment):
    settings: Galore

    def __init__(self, settings: Galore, run: Session) -> None:
        super().__init__(settings, run)
        names = settings.projected(run.facts)
        bypassed = len(_linear_weights(run.facts, settings.targets)) - len(names)
        if bypassed:
            logger.warning(
                "galore: rank=%d is not below the smaller side of %d weights; they keep AdamW",
                settings.rank,
                bypassed,
            )
        self.subspaces: dict[str, Subspace] = {}
        made: dict[type[nn.Module], type[nn.Module]] = {}
        for index, name in enumerate(names):
            module_name = name.removesuffix(".weight")
            module = run.model.get_submodule(module_name)
            weight = run.model.get_parameter(name)
            self.subspaces[name] = Subspace(
                (weight.shape[0], weight.shape[1]),
                rank=settings.rank,
                every=settings.every,
                offset=index * settings.every // len(names),
                scale=settings.scale,
                seed=settings.seed,
                index=index,
                device=weight.device,
                norm=settings.norm,  # type: ignore[arg-type]
            )
            kind = type(module)
            if kind not in made:
                made[kind] = _projected(kind)
            run.recast(module_name, made[kind])
            module.__dict__["_memrt_sink"] = self.subspaces[name]
        if names:
            self.norm_kind = settings.norm

    def rules(self) -> list[Rule]:
        """The projection of every projected weight."""
        return [
            Rule(
                slot=Slot.PROJECTION,
                match=lambda name, parameter: name in self.subspaces,
                build=lambda name, parameter: self.subspaces[name],
            )
        ]

    def before_step(self, step: int) -> None:
        """Tell every subspace which step it is: some refresh their basis."""
        for subspace in self.subspaces.values():
            subspace.begin_step(step)

    def after_step(self, step: int) -> None:
        """Free the low-rank gradients."""
        for subspace in self.subspaces.values():
            subspace.clear()

    @contextmanager
    def around_micro_batch(self) -> Iterator[None]:
        """Refuse weights that are also used outside their module: they get a dense gradient."""
        yield
        for name in self.subspaces:
            if self.run.model.get_parameter(name).grad is not None:
                raise RuntimeError(
                    f"galore: {name} is used outside its module's forward and got a full gradient; "
                    "exclude it with targets='attention' or targets='mlp'"
                )

    def squared_gradient_norm(self) -> Tensor | None:
        """Sum of the squared norms of the projected weights' gradients."""
        norms = [s.squared_norm() for s in self.subspaces.values() if s.gradient() is not None]
        return torch.stack(norms).sum() if norms else None

    def scale_gradients(self, factor: Tensor) -> None:
        """Clip R, which is linear in the gradient."""
        for subspace in self.subspaces.values():
            if subspace.gradient() is not None:
                subspace.scale_gradient_(factor)

    def tensors(self) -> list[tuple[Tensor, Account]]:
        """Bases are optimizer state, R is the gradient."""
        accounts = {
            "basis": Account.OPTIMIZER,
            "gradient": Account.GRADIENTS,
            "squared_norm": Account.WORKSPACE,
        }
        return [
            (tensor, accounts[kind])
            for subspace in self.subspaces.values()
            for kind, tensor in subspace.tensors().items()
        ]

    def state_dict(self) -> dict[str, Any]:
        """Bases and refresh counts by weight."""
        return {name: subspace.state_dict() for name, subspace in self.subspaces.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them; refuses the state of other weights."""
        if state.keys() != self.subspaces.keys():
            raise ValueError(
                f"the checkpoint holds galore state for {len(state)} weights, this run projects "
                f"{len(self.subspaces)}; resume with the same rank and targets"
            )
        for name, subspace in self.subspaces.items():
            subspace.load_state_dict(state[name])

    def detach(self) -> None:
        """Remove the sinks from the modules."""
        for name in self.subspaces:
            module = self.run.model.get_submodule(name.removesuffix(".weight"))
            module.__dict__.pop("_memrt_sink", None)
