"""The directions in which a backbone's hidden states lie, found on data.

For the hidden states H_0 (what the first block is given) and H_i (what block i makes) of the tokens
of some probe batches,

    M = Σ_tokens Σ_i x xᵀ,  x = H_i / ‖H_i‖,        U [hidden, side] the leading eigenvectors of M

Every token and every layer counts alike: without the norm, the few tokens on which language models
put their massive activations would be all that is seen. One basis serves all layers, as the
residual stream does. `energy` is the share of the sum of squares that lies in the basis: the mean
squared length of Uᵀx.

A side network whose state means Uᵀ H starts with the products of the backbone, restricted to U: a
weight that reads the hidden state becomes W U, one that writes it Uᵀ W. all-MiniLM-L6-v2 (384
channels, SST-2) has .56 to .82 of a layer's energy in 96 directions, where the 96 channels of the
largest weights have .12 to .32 and random directions .25.

Beside taps that sum neighbouring channels the directions are theirs, and M says what a hidden state
most likely was that has such sums (`memrt.ladder.narrowing`).

Bytes: M, a copy of it in fp64 and its eigenvectors, 20 hidden² in all, and what the solver takes
inside; beside pooled taps a few products of 8 hidden · side for the eigenvectors. Freed before the
side network is built. U takes hidden · side · 4. Time: a forward a batch,
2 · hidden² operations a token and layer, and one eigendecomposition of hidden x hidden.

Source: principal components; as a basis for all layers of a transformer, SliceGPT (Ashkboos et al.
2024, arXiv 2401.15024), which keeps U and drops the ladder.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from memrt.kernels.finite import all_finite
from memrt.kernels.mixed_precision import block_rows
from memrt.ladder.narrowing import Projection
from memrt.ladder.probing import probe_batches, resting_model

if TYPE_CHECKING:
    from memrt.session import Session

__all__ = ["pooled_directions", "principal_directions"]


def principal_directions(
    run: Session, stacks: Sequence[Sequence[nn.Module]], *, side: int, count: int
) -> Projection:
    """The `side` leading directions of what flows through `stacks` on `count` probe batches."""
    matrix = _moments(run, stacks, count)
    values, vectors = torch.linalg.eigh(matrix.double())  # by rising eigenvalue
    energy = values[-side:].sum() / values.sum()
    basis = vectors[:, -side:].flip(1)
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    basis = (basis * largest.sign()).float()  # an eigenvector's sign is anybody's
    return Projection(basis=basis, energy=energy.float(), reading=basis)


def pooled_directions(
    run: Session, stacks: Sequence[Sequence[nn.Module]], *, side: int, count: int
) -> Projection:
    """Sums of neighbouring channels, and what they say of all that flows through `stacks`."""
    matrix = _moments(run, stacks, count)
    return Projection.pooling(matrix.shape[0], side, device=matrix.device, moments=matrix)


def _moments(run: Session, stacks: Sequence[Sequence[nn.Module]], count: int) -> Tensor:
    """M [hidden, hidden] on `count` probe batches, fp32."""
    total = _Total()
    with run.phase("probe"), torch.no_grad(), resting_model(run.model), _watching(stacks, total):
        for batch in probe_batches(run, count, init="principal"):
            total.batch = batch
            run.loss(batch)
    matrix = total.matrix
    if matrix is None or not all_finite([matrix]):
        raise ValueError(
            "init='principal': the hidden states of the probe set are not finite; use another "
            "probe set, or init='magnitude'"
        )
    if not all_finite([matrix.trace().reciprocal()]):
        raise ValueError(
            "init='principal': no position of the probe set counts (attention_mask or labels hide "
            "all), or every hidden state is zero; use another probe set, or init='magnitude'"
        )
    return matrix


class _Total:
    """M, summed over batches, layers and tokens."""

    def __init__(self) -> None:
        self.matrix: Tensor | None = None
        self.batch: Mapping[str, Any] = {}

    def add(self, hidden: Tensor) -> None:
        """Add every token of hidden states [..., hidden]."""
        flat = hidden.detach().reshape(-1, hidden.shape[-1])  # [tokens, hidden]
        seen = self._tokens(hidden)
        if self.matrix is None:
            self.matrix = flat.new_zeros(flat.shape[1], flat.shape[1], dtype=torch.float32)
        rows = block_rows(flat.shape[1], flat.shape[0])
        for start in range(0, flat.shape[0], rows):
            x = functional.normalize(flat[start : start + rows].float(), dim=1)
            if seen is not None:
                x.mul_(seen.reshape(-1, 1)[start : start + rows])
            x = x.to(self.matrix.device)  # where layers lie on several
            self.matrix.addmm_(x.t(), x)

    def _tokens(self, hidden: Tensor) -> Tensor | None:
        """Which positions are text, where the batch says so; None for all."""
        shape = hidden.shape[:-1]
        mask, labels = self.batch.get("attention_mask"), self.batch.get("labels")
        if isinstance(mask, Tensor) and mask.shape == shape:
            return mask.bool().to(hidden.device)
        if isinstance(labels, Tensor) and labels.shape == shape:  # of a decoder beside an encoder
            return (labels != -100).to(hidden.device)
        return None


@contextmanager
def _watching(stacks: Sequence[Sequence[nn.Module]], total: _Total) -> Iterator[None]:
    """`total` sees what the first block of each stack is given and what every block makes."""

    def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(iter(inspect.signature(block.forward).parameters))
        total.add(args[0] if args else kwargs[first])

    def after(_: nn.Module, __: Any, output: Any) -> None:
        total.add(output[0] if isinstance(output, tuple) else output)

    hooks = [blocks[0].register_forward_pre_hook(before, with_kwargs=True) for blocks in stacks]
    hooks += [block.register_forward_hook(after) for blocks in stacks for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
