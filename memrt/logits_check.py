"""Whether a written folder computes what the run's model computed: logits of one random batch.

Tolerance. A model's N weight matrices lie one behind the other; at each of them both models round
the result, by at most eps/2 of it, and folding or casting rounds the weight itself once more. These
errors are independent, so they add up like √N: a logit moves by about eps · √N of the logits' root
mean square, and the largest of some thousands by four times that,

    tolerance = 4 · eps(dtype) · √N · rms(logits)

with the eps of the coarser of the two models' dtypes (2⁻⁷ for bfloat16, 2⁻²³ for float32). A
forgotten scale, a transposed ΔW or a missing layer moves logits by a good part of their rms.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LogitsCheck", "compare_logits", "logits_of"]

_SEED = 20260801
_ROWS = 2
_TOKENS = 16
_SPREAD = 4.0
"""Standard deviations that the largest of some thousands of errors lies out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsCheck:
    """The largest difference of two models' logits, beside what their dtype explains."""

    max_difference: float
    tolerance: float
    rms: float
    dtype: str
    num_matrices: int
    shape: tuple[int, ...]

    @property
    def passed(self) -> bool:
        """Whether rounding explains the difference."""
        return self.max_difference <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Everything, with `passed`."""
        return {**asdict(self), "shape": list(self.shape), "passed": self.passed}

    def __str__(self) -> str:
        return (
            f"max|Δ| of {'×'.join(map(str, self.shape))} logits is {self.max_difference:.3g}, "
            f"tolerance {self.tolerance:.3g} (4 · eps({self.dtype}) · √{self.num_matrices} · rms "
            f"{self.rms:.3g})"
        )


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Logits of the fixed random batch, in float32."""
    model.eval()
    output = model(**_batch(model))
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"verify=True: {type(model).__name__} gives no logits; export without it and compare "
            "outputs of your own"
        )
    return logits.float()


def compare_logits(reference: Tensor, model: Any, *, dtypes: set[torch.dtype]) -> LogitsCheck:
    """Logits of `model` against those of the run's model; `dtypes` are those of both models."""
    logits = logits_of(model)
    if logits.shape != reference.shape:
        raise ValueError(
            f"verify=True: the exported model gives logits {list(logits.shape)}, the run's model "
            f"{list(reference.shape)}"
        )
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    matrices = sum(
        isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim > 1
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
    )
    rms = float(reference.square().mean().sqrt())
    difference = (logits - reference).abs().max()
    finite = bool(torch.isfinite(logits).all()) and bool(torch.isfinite(reference).all())
    return LogitsCheck(
        max_difference=float(difference) if finite else float("inf"),
        tolerance=_SPREAD * torch.finfo(coarsest).eps * max(matrices, 1) ** 0.5 * rms,
        rms=rms,
        dtype=str(coarsest).removeprefix("torch."),
        num_matrices=matrices,
        shape=tuple(reference.shape),
    )


def _batch(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    config, device = model.config, model.device
    if model.main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (_ROWS, config.num_channels, height, width)
        pixels = torch.randn(shape, generator=generator)
        return {"pixel_values": pixels.to(device=device, dtype=model.dtype)}
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    if model.main_input_name != "input_ids" or not isinstance(vocabulary, int):
        raise ValueError(
            f"verify=True: no batch can be made for {type(model).__name__} (input "
            f"{model.main_input_name!r}); export without it and compare outputs of your own"
        )
    # models that classify need the padding token's name to take more than one row
    rows = 1 if getattr(config, "pad_token_id", None) is None else _ROWS
    ids = torch.randint(vocabulary, (rows, _TOKENS), generator=generator).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
    return batch
