"""What the config of a classifier says of its head: names of the classes, kind of loss, padding.

Adapters are saved without their model's config, and a base that has no head for the task says
nothing of these. So they lie beside the adapters, in `memrt_base.json` (`memrt.base_record`):

    "head_config": {"labels": ["bad", "good"], "problem_type": null, "pad_token_id": 0}

Costs a few bytes in a file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["HeadConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """One classifier's."""

    labels: tuple[str, ...]
    """Names of the classes, by their ids."""
    problem_type: str | None
    pad_token_id: int | None
    """Decoders take the last token that is none of padding."""

    @classmethod
    def of(cls, model: nn.Module) -> HeadConfig | None:
        """A model's; None for what is no classifier of transformers."""
        config: Any = getattr(model, "config", None)
        names = getattr(config, "id2label", None)
        if "Classification" not in type(model).__name__ or not names:
            return None
        if sorted(names) != list(range(len(names))):
            return None
        return cls(
            labels=tuple(str(names[index]) for index in range(len(names))),
            problem_type=config.problem_type,
            pad_token_id=getattr(config.get_text_config(), "pad_token_id", None),
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HeadConfig:
        """The inverse of `to_json`."""
        return cls(
            labels=tuple(map(str, values["labels"])),
            problem_type=values["problem_type"],
            pad_token_id=values["pad_token_id"],
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "labels": list(self.labels)}

    def write_to(self, config: Any) -> None:
        """Give a config of transformers what this says."""
        config.id2label = dict(enumerate(self.labels))
        config.label2id = {name: index for index, name in enumerate(self.labels)}
        config.problem_type = self.problem_type
        if self.pad_token_id is not None:
            for each in (config, config.get_text_config()):
                each.pad_token_id = self.pad_token_id
