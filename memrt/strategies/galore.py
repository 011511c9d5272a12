"""GaLore without the gradient: AdamW in a rank-r subspace, and dW is never formed.

For a linear layer y = x Wᵀ with W [out, in], m the smaller and n the larger side: the state lives
in the subspace of an orthonormal basis P [m, r]. With out < in the low-rank gradient is
R = Pᵀ dW = (dY P)ᵀ X [r, in]; otherwise R = dW P = dYᵀ (X P) [out, r]. Both are exact, cheaper than
dW itself for r < m n / (m + n), and linear, so that micro-batches accumulate in R. AdamW's
direction N of R is applied as W ← W (1 - lr·wd) - lr·scale·P N (or N Pᵀ). P comes from sketches of
dYᵀX, refreshed every `every` steps, warm-started and staggered over the layers; moments are kept
as they are, as GaLore keeps them, or follow the new basis (`moments="rotated"`: LDAdam's rule,
`memrt.optimizers.moment_rotation`).

Bytes per projected weight: basis 4 m r (`basis` has less; in a step that refreshes it the old one
too, for a step that is skipped takes its refresh back), moments 8 n r (2.03 n r with
`int8_states`), gradient 4 n r in place of 4 m n. Costs, in operations, 2 r (m + n) a token in place
of dW's 2 m n, 2 m n r a step for P N, and the sketches of a refresh. Embeddings, head, norms,
biases keep AdamW. Zhao et al. 2024, arXiv 2403.03507; the projection without the gradient is
memrt's. With an injected identity basis it is AdamW.

`form="plain"` is GaLore as published, for comparison with it: dW is formed, accumulated and clipped
as ever, P is its exact SVD at steps 0, `every`, 2·`every`, ... of all weights at once. It saves
optimizer state only. Against the authors' galore-torch it differs where that is not AdamW: eps
is added to the bias-corrected root (theirs is 32 times larger at step 1), decay comes before the
update, and moments of bf16 weights are fp32.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from memrt.kernels.projected_linear import projected_conv1d, projected_linear
from memrt.optimizers.formed_subspace import FormedSubspace
from memrt.optimizers.subspace import Subspace
from memrt.profiling.accounts import Account
from memrt.projected_weights import ProjectedAttachment, ProjectedStrategy, is_conv1d
from memrt.registry import register
from memrt.strategy import Attachment, Promise, Slot
from memrt.structure import is_plain_linear
from memrt.surgery import subclass_of
from memrt.values import check_seed, is_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from memrt.session import Session
    from memrt.strategy import Strategy
    from memrt.structure import Facts

__all__ = ["Galore"]

FORMS = ("gradient_free", "plain")
NORMS = ("projected", "exact")
BASES = ("float32", "bfloat16", "int4")
MOMENTS = ("kept", "rotated")


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Galore(ProjectedStrategy):
    """Settings (defaults of the authors' README).

    rank: of the subspace. A weight whose smaller side is not above it keeps plain AdamW.
    every: optimizer steps between two refreshes of a weight's basis.
    scale: factor on the projected update (the paper's alpha).
    targets: linear weights of the repeated layers: "all", "attention" or "mlp"; "all-linear": those
        of the head too; or a list of parts of names and of regular expressions for whole names.
    form: "gradient_free" (dW is never formed) or "plain" (it is, and P is its exact SVD).
    norm: of the gradient-free form: what clipping and the log use for projected weights:
        "projected" (the norm of R, at most the true one) or "exact" (the true norm; one micro-batch
        a step, at most one dW product). The plain form has the true norm by itself.
    basis: how P is kept: "float32" (4 bytes an element), "bfloat16" (2) or "int4" (.52).
    moments: what a refresh does to them: "kept" (nothing) or "rotated" into the new basis (fp32
        moments only; 16 n r of workspace).
    lazy: refresh a weight half as often whenever the last 5 refreshes found this much of the old
        subspace again (1 all of it, 0 no more than chance; Q-GaLore: .4); None for never.
    seed: of the random sketches of the gradient-free form.
    """

    name: ClassVar[str] = "galore"
    lowers: ClassVar[tuple[Account, ...]] = (Account.GRADIENTS, Account.OPTIMIZER)

    form: str = "gradient_free"
    norm: str = "projected"
    basis: str = "float32"
    moments: str = "kept"
    lazy: float | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        ProjectedStrategy.__post_init__(self)
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}: use one of {', '.join(FORMS)}")
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r}: use one of {', '.join(NORMS)}")
        if self.basis not in BASES:
            raise ValueError(f"basis={self.basis!r}: use one of {', '.join(BASES)}")
        if self.moments not in MOMENTS:
            raise ValueError(f"moments={self.moments!r}: use one of {', '.join(MOMENTS)}")
        if self.lazy is not None and not (is_number(self.lazy) and 0 < self.lazy <= 1):
            raise ValueError(
                f"lazy={self.lazy!r}: must be a number above 0 and at most 1, or None for never"
            )
        check_seed(self.seed)
        for option, default in (("norm", "projected"), ("seed", 42)):
            value = getattr(self, option)
            if self.form == "plain" and value != default:
                raise ValueError(
                    f"{option}={value!r} has no effect with form='plain', whose norm is exact and "
                    "whose bases are not sketched; leave it out"
                )

    @property
    def is_gradient_free(self) -> bool:
        """Whether projected weights never get a gradient."""
        return self.form == "gradient_free"

    @property
    def breaks(self) -> frozenset[Promise]:  # type: ignore[override]  # depends on the form
        """The gradient-free form leaves no gradient."""
        formed = {Promise.GRADIENT_IS_FORMED}
        return frozenset(formed if self.is_gradient_free else ())

    @property
    def needs(self) -> frozenset[Promise]:  # type: ignore[override]  # depends on the form
        """The plain form reads the gradient."""
        whole, formed = Promise.PARAMETERS_STAY_WHOLE, Promise.GRADIENT_IS_FORMED
        return frozenset({whole} if self.is_gradient_free else {whole, formed})

    def check(self, facts: Facts) -> None:
        """Needs AdamW and linear weights in repeated layers."""
        ProjectedStrategy.check(self, facts)
        if self.norm == "exact" and facts.settings.accumulation_steps > 1:
            raise ValueError(
                "norm='exact' cannot be had over several micro-batches "
                f"(gradient_accumulation_steps={facts.settings.accumulation_steps}) when the "
                "gradient is never formed; use norm='projected' or one micro-batch a step"
            )

    def check_stack(self, others: Sequence[Strategy], facts: Facts) -> None:
        """Rotated moments are fp32; the head itself runs where its weight gets no gradient."""
        for other in others if self.moments == "rotated" else ():
            if any(claim.slot is Slot.STATE_FORMAT for claim in other.claims(facts)):
                raise ValueError(
                    f"moments='rotated' would round the moments that {other.name} keeps once more "
                    "at every refresh; leave one of them out"
                )
        head = facts.structure.head
        if not self.is_gradient_free or f"{head}.weight" not in self.projected(facts):
            return
        for other in others:
            if any(claim.slot is Slot.HEAD for claim in other.claims(facts)):
                raise ValueError(
                    f"targets={self.targets!r} takes the head {head} without its gradient, and "
                    f"{other.name} computes it in another way; name other targets, or form='plain'"
                )

    def serves(self, module: nn.Module) -> bool:
        """A gradient-free layer is computed here, so it must be no more than y = x Wᵀ + b."""
        if not self.is_gradient_free:
            return True
        return is_plain_linear(module) or (is_conv1d(module) and "forward" not in vars(module))

    def offset(self, index: int, count: int) -> int:
        """Staggered; the plain form refreshes every weight at the same step, as the authors do."""
        return ProjectedStrategy.offset(self, index, count) if self.is_gradient_free else 0

    def projection(
        self, shape: tuple[int, int], *, index: int, offset: int, device: torch.device
    ) -> Subspace | FormedSubspace:
        """The subspace of one weight."""
        common: dict[str, Any] = {
            "rank": self.rank,
            "every": self.every,
            "offset": offset,
            "scale": self.scale,
            "basis": self.basis,
            "lazy": self.lazy,
            "rotates": self.moments == "rotated",
            "device": device,
        }
        if not self.is_gradient_free:
            return FormedSubspace(shape, solver="svd", **common)
        norm: Any = self.norm
        return Subspace(shape, norm=norm, seed=self.seed, index=index, **common)

    def attach(self, run: Session) -> Attachment:
        """Recast the linear layers of the projected weights to ones without a weight gradient."""
        return _GradientFree(self, run) if self.is_gradient_free else ProjectedAttachment(self, run)


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


class _GradientFree(ProjectedAttachment):
    settings: Galore
    subspaces: dict[str, Subspace]

    def __init__(self, settings: Galore, run: Session) -> None:
        super().__init__(settings, run)
        made: dict[type[nn.Module], type[nn.Module]] = {}
        for name, subspace in self.subspaces.items():
            module_name = name.removesuffix(".weight")
            module = run.model.get_submodule(module_name)
            kind = type(module)
            if kind not in made:
                made[kind] = _projected(kind)
            run.recast(module_name, made[kind])
            module.__dict__["_memrt_sink"] = subspace
        self._before: dict[str, dict[str, Any]] = {}
        """What the subspaces that this step refreshes were before it."""
        self._num_skipped = 0
        if self.subspaces:
            self.norm_kind = settings.norm

    def before_step(self, step: int) -> None:
        """Also keep what a refresh replaces until it is known that the step counts."""
        super().before_step(step)
        states = {name: subspace.state_dict() for name, subspace in self.subspaces.items()}
        self._before = {name: each for name, each in states.items() if each["refresh_pending"]}
        self._num_skipped = self._skipped_steps()

    def after_step(self, step: int) -> None:
        """Take back what a step that was left out has refreshed: the next one does it anew."""
        skipped = self._skipped_steps() > self._num_skipped
        for name, state in self._before.items():
            subspace = self.subspaces[name]
            dropped = skipped or subspace.gradient() is None
            if dropped and subspace.refresh_count > state["refresh_count"]:
                subspace.load_state_dict(state)
        self._before = {}
        super().after_step(step)

    def _skipped_steps(self) -> int:
        return int(getattr(self.run.optimizer, "num_skipped_steps", 0))

    @contextmanager
    def around_micro_batch(self) -> Iterator[None]:
        """Refuse weights that are also used outside their module: they get a dense gradient."""
        yield
        for name in self.subspaces:
            if self.run.model.get_parameter(name).grad is not None:
                raise RuntimeError(
                    f"{self.name}: {name} is used outside its module's forward and got a full "
                    "gradient; exclude it with other targets"
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
        accounts = {"gradient": Account.GRADIENTS, "squared_norm": Account.WORKSPACE}
        return [
            (tensor, accounts.get(kind, Account.OPTIMIZER))
            for subspace in self.subspaces.values()
            for kind, tensor in subspace.tensors().items()
        ]

    def detach(self) -> None:
        """Remove the sinks from the modules."""
        for name in self.subspaces:
            module = self.run.model.get_submodule(name.removesuffix(".weight"))
            module.__dict__.pop("_memrt_sink", None)
