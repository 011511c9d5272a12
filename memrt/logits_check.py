"""Whether a written folder computes what the run's model computed: logits of one random batch.

Tolerance. At each of a model's weight matrices the result is rounded, and how far that moves the
logits depends on the model: attention and the sums of a residual stream make much or little of it.
So it is measured. Each model runs once more with every matrix's result Y [..., out] rounded anew,

    Y + eps(dtype of Y) / 2 · rms(Y) · a normal random number

and the largest move of a logit is what rounding explains of one model. The two models differ by the
rounding of both and by that of the folded or cast weights, and the largest of some thousands of
errors varies from draw to draw by half; hence four times the larger of both models' moves. Costs a
forward of each model. A forgotten scale, a transposed ΔW or a missing layer moves logits by a good
part of their root mean square.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memrt.packed_weights import is_packed

__all__ = ["LogitsCheck", "compare_logits", "logits_of", "rounding_of"]

_SEED = 20260801
_ROWS = 2
_TOKENS = 16
# two for two models and the weights between them (√3), two for the draw; on six tiny families in
# two dtypes, with weights of two sizes, differences were 0.4 to 1.6 times the move
_MARGIN = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsCheck:
    """The largest difference of two models' logits, beside what rounding explains."""

    max_difference: float
    tolerance: float
    rms: float
    rounding: float
    """The larger move of both models' logits when their matrices' results are rounded anew."""
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
            f"tolerance {self.tolerance:.3g} ({_MARGIN:g} times what rounding at "
            f"{self.num_matrices} matrices moves them; their rms is {self.rms:.3g})"
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


@torch.no_grad()
def rounding_of(model: Any, logits: Tensor) -> float:
    """How far logits of the fixed batch move when each matrix's result is rounded once more."""
    generator = torch.Generator().manual_seed(_SEED)

    def rounded_anew(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():  # a router's
            return output
        size = torch.finfo(output.dtype).eps / 2 * output.float().square().mean().sqrt()
        noise = torch.randn(output.shape, generator=generator).to(output.device)
        return (output.float() + size * noise).to(output.dtype)

    hooks = [module.register_forward_hook(rounded_anew) for module in _matrices(model)]
    try:
        moved = logits_of(model)
    finally:
        for hook in hooks:
            hook.remove()
    return float((moved - logits).abs().max())


def compare_logits(reference: Tensor, model: Any, *, rounding: float) -> LogitsCheck:
    """Logits of `model` against those of the run's model, which rounding moves by `rounding`."""
    logits = logits_of(model)
    if logits.shape != reference.shape:
        raise ValueError(
            f"verify=True: the exported model gives logits {list(logits.shape)}, the run's model "
            f"{list(reference.shape)}"
        )
    difference = (logits - reference).abs().max()
    finite = bool(torch.isfinite(logits).all()) and bool(torch.isfinite(reference).all())
    rounding = max(rounding, rounding_of(model, logits))
    return LogitsCheck(
        max_difference=float(difference) if finite else float("inf"),
        tolerance=_MARGIN * rounding,
        rms=float(reference.square().mean().sqrt()),
        rounding=rounding,
        num_matrices=len(_matrices(model)),
        shape=tuple(reference.shape),
    )


def _matrices(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _has_matrix(module)]


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(module, nn.Embedding):
        return False
    return weight.ndim > 1 or is_packed(module)


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
