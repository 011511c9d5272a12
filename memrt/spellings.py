"""What other projects call it: their argument names, and the strategy and option that they mean.

One table for all ways in. A row's name is the whole key of a YAML file or a command line
(`galore_update_interval`); less its prefix it is also a name of the option in a strategy's
parentheses (`galore(update_interval=50)`), and some are in transformers' `optim_args`.
A value that memrt has no equivalent for is refused with the reason, never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "IMPLIED",
    "KEYS",
    "OPTIMIZERS",
    "PREFIXES",
    "REFUSED_KEYS",
    "Optimizer",
    "Spelling",
    "is_spelling",
    "options_of",
    "own_options",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """One name: what it sets.

    `values` maps their values to ours and every other is refused with `why`; empty: theirs are
    ours. `option` None: the value says what the strategy does anyway, or, with `is_switch`, that
    the strategy is there. `adds` names a second strategy that a true value asks for.
    """

    strategy: str
    option: str | None = None
    values: Mapping[Any, Any] = field(default_factory=dict)
    why: str = ""
    is_switch: bool = False
    adds: str | None = None
    convert: Callable[[Any], Any] | None = None
    source: str = ""

    def value(self, name: str, value: Any) -> Any:
        """Their value as ours; `name` is what an error calls it."""
        if self.convert is not None:
            return self.convert(value)
        if not self.values:
            return value
        hashable = isinstance(value, (str, int, float, type(None)))
        if not hashable or value not in self.values:
            allowed = " or ".join(repr(each) for each in self.values if each is not None)
            raise ValueError(f"{name}={value!r}: {self.why}; use {allowed or 'nothing'}")
        return self.values[value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """What one of transformers' `optim` names is here.

    `options` are the names in `optim_args`, `defaults` transformers' own values of them; `note`
    says in which way memrt's is another.
    """

    strategies: tuple[str, ...]
    options: Mapping[str, Spelling] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    takes_targets: bool = False
    note: str = ""


def _module_names(value: Any) -> Any:
    """LLaMA-Factory's targets: "all", or names with commas between them."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        return value
    found = tuple(name.strip() for name in names if isinstance(name, str) and name.strip())
    return "all" if found == ("all",) else found


PREFIXES = MappingProxyType(
    {
        "galore": "galore_",
        "q_galore": "qgalore_",
        "apollo": "apollo_",
        "lisa": "lisa_",
        "badam": "badam_",
        "nf4": "bnb_4bit_",
        "offload_activations": "activation_offloading_",
    }
)
"""Strategy -> the prefix of its keys."""

_SIDE: dict[str, Any] = {
    "values": {"std": "std"},
    "why": "memrt keeps the state in the subspace of a weight's smaller side",
}
_LF, _HF, _AXOLOTL, _LMFLOW = "LLaMA-Factory", "transformers", "axolotl", "LMFlow"
_SWITCH: dict[Any, Any] = {True: True, False: False, None: False}
_EITHER = "must be true or false"


def _switch(strategy: str, source: str) -> Spelling:
    return Spelling(strategy=strategy, is_switch=True, values=_SWITCH, why=_EITHER, source=source)


KEYS: Mapping[str, Spelling] = MappingProxyType(
    {
        # GaLore, as published: the gradient is formed
        "use_galore": _switch("galore", _LF),
        "galore_rank": Spelling(strategy="galore", option="rank", source=_LF),
        "galore_update_interval": Spelling(strategy="galore", option="every", source=_LF),
        "galore_update_proj_gap": Spelling(strategy="galore", option="every", source=_HF),
        "galore_scale": Spelling(strategy="galore", option="scale", source=_LF),
        "galore_proj_type": Spelling(strategy="galore", source=_LF, **_SIDE),
        "galore_target": Spelling(
            strategy="galore", option="targets", convert=_module_names, source=_LF
        ),
        "galore_layerwise": Spelling(
            strategy="galore", adds="in_backward", values=_SWITCH, why=_EITHER, source=_LF
        ),
        # Q-GaLore
        "qgalore_rank": Spelling(strategy="q_galore", option="rank", source=_AXOLOTL),
        "qgalore_update_proj_gap": Spelling(strategy="q_galore", option="every", source=_AXOLOTL),
        "qgalore_scale": Spelling(strategy="q_galore", option="scale", source=_AXOLOTL),
        "qgalore_proj_type": Spelling(strategy="q_galore", source=_AXOLOTL, **_SIDE),
        "qgalore_proj_quant": Spelling(
            strategy="q_galore",
            option="basis",
            values={True: "int4", False: "float32"},
            why=_EITHER,
            source=_AXOLOTL,
        ),
        "qgalore_proj_bits": Spelling(
            strategy="q_galore",
            values={4: 4},
            why="memrt keeps the basis in 4 bits, or in 16 or 32 with q_galore(basis=...)",
            source=_AXOLOTL,
        ),
        "qgalore_proj_group_size": Spelling(
            strategy="q_galore",
            values={256: 256},
            why="memrt's groups have 256 elements",
            source=_AXOLOTL,
        ),
        "qgalore_cos_threshold": Spelling(strategy="q_galore", option="lazy", source=_AXOLOTL),
        "qgalore_gamma_proj": Spelling(
            strategy="q_galore",
            values={2: 2},
            why="memrt doubles the interval of a subspace that rests",
            source=_AXOLOTL,
        ),
        "qgalore_queue_size": Spelling(
            strategy="q_galore",
            values={5: 5},
            why="memrt looks at the last 5 refreshes",
            source=_AXOLOTL,
        ),
        # APOLLO
        "use_apollo": _switch("apollo", _LF),
        "apollo_rank": Spelling(strategy="apollo", option="rank", source=_LF),
        "apollo_update_interval": Spelling(strategy="apollo", option="every", source=_LF),
        "apollo_update_proj_gap": Spelling(strategy="apollo", option="every", source=_HF),
        "apollo_scale": Spelling(strategy="apollo", option="scale", source=_LF),
        "apollo_scale_type": Spelling(
            strategy="apollo",
            option="granularity",
            values={"channel": "channel", "tensor": "tensor"},
            why="is a scale for each channel or one for the tensor",
            source=_LF,
        ),
        "apollo_proj": Spelling(
            strategy="apollo",
            values={"random": "random"},
            why="memrt's sketch is random; the gradient's own subspace is what fira has",
            source=_LF,
        ),
        "apollo_proj_type": Spelling(strategy="apollo", source=_LF, **_SIDE),
        "apollo_target": Spelling(
            strategy="apollo", option="targets", convert=_module_names, source=_LF
        ),
        "apollo_scale_front": Spelling(
            strategy="apollo",
            values={False: False},
            why="memrt limits the norm before it is scaled",
            source=_LF,
        ),
        "apollo_layerwise": Spelling(
            strategy="apollo", adds="in_backward", values=_SWITCH, why=_EITHER, source=_LF
        ),
        # LISA
        "use_lisa": _switch("lisa", _LMFLOW),
        "lisa_activated_layers": Spelling(strategy="lisa", option="layers", source=_LMFLOW),
        "lisa_n_layers": Spelling(strategy="lisa", option="layers", source=_AXOLOTL),
        "lisa_num_layers": Spelling(strategy="lisa", option="layers", source="Soup"),
        "lisa_interval_steps": Spelling(strategy="lisa", option="every", source=_LMFLOW),
        "lisa_step_interval": Spelling(strategy="lisa", option="every", source=_AXOLOTL),
        "lisa_train_embeddings": Spelling(strategy="lisa", option="embeddings", source="Soup"),
        # BAdam
        "use_badam": _switch("badam", _LF),
        "badam_mode": Spelling(
            strategy="badam",
            values={"layer": "layer"},
            why="memrt trains whole blocks of the model at a time",
            source=_LF,
        ),
        "badam_switch_mode": Spelling(
            strategy="badam",
            option="order",
            values={name: name for name in ("random", "ascending", "descending")},
            why="a block that never changes is a model with the others frozen: set requires_grad",
            source=_LF,
        ),
        "badam_switch_interval": Spelling(strategy="badam", option="every", source=_LF),
        "badam_switch_block_every": Spelling(strategy="badam", option="every", source="BAdam"),
        "badam_start_block": Spelling(
            strategy="badam",
            values={None: None},
            why="memrt begins where the order does",
            source=_LF,
        ),
        # quantised weights and offloaded activations
        "load_in_4bit": _switch("nf4", _HF),
        "load_in_8bit": _switch("int8", _HF),
        "bnb_4bit_quant_type": Spelling(
            strategy="nf4",
            values={"nf4": "nf4"},
            why="memrt has the normal-float levels, which are the better ones for weights",
            source=_HF,
        ),
        "bnb_4bit_use_double_quant": Spelling(
            strategy="nf4",
            values={True: True},
            why="memrt always quantises the scales too: 0.516 bytes a weight",
            source=_HF,
        ),
        "activation_offloading": Spelling(
            strategy="offload_activations",
            option="place",
            is_switch=True,
            values={True: "host", "cpu": "host", "disk": "disk", False: False, None: False},
            why="activations wait on the host or on disk",
            source=_AXOLOTL,
        ),
        "loss_type": Spelling(
            strategy="fused_loss",
            is_switch=True,
            values={"chunked_nll": True, "nll": False},
            why="memrt has the model's own loss, whole or in chunks of tokens",
            source="TRL",
        ),
    }
)

_STEPS = "memrt.Trainer counts the first 3 steps with memory_report=True; leave it out"
_NO_STREAM = "memrt has no strategy that keeps weights off the device; leave it out, or use nf4"

REFUSED_KEYS: Mapping[str, str] = MappingProxyType(
    {
        "lisa_layers_attribute": "memrt finds the layers by structure; leave it out",
        "badam_update_ratio": "memrt has no ratio mode; use badam(every=...), which trains blocks",
        "badam_mask_mode": "memrt has no ratio mode; use badam(every=...), which trains blocks",
        "badam_verbose": "the memory report tells what trains; leave it out",
        "qgalore_weight_bits": "trained weights stay in the model's dtype; leave it out",
        "bnb_4bit_compute_dtype": "memrt computes in the dtype of a layer's input; set dtype, or "
        "training.bf16",
        "bnb_4bit_quant_storage": "memrt keeps the codes in bytes; leave it out",
        "offload_optimizer": "memrt keeps optimizer state small in place (int8_states, galore) or "
        "parks that of frozen layers (lisa(parked='host'))",
        "offload_param": _NO_STREAM,
        "stream_layers": _NO_STREAM,
        "layer_offloading": _NO_STREAM,
        "nvme_offload_fraction": _NO_STREAM,
        "profiler_steps": _STEPS,
        "profiler_steps_start": _STEPS,
    }
)
"""Names without an equivalent, and what to do."""

IMPLIED: Mapping[str, Mapping[str, Any]] = MappingProxyType({"galore": {"form": "plain"}})
"""Options that go with a strategy under another project's name: their GaLore forms the gradient."""


def options_of(strategy: str) -> dict[str, Spelling]:
    """Other names of a strategy's options, as they stand in its parentheses."""
    prefix = PREFIXES.get(strategy)
    if prefix is None:
        return {}
    return {
        key.removeprefix(prefix): spelling
        for key, spelling in KEYS.items()
        if key.startswith(prefix) and not spelling.is_switch and spelling.adds is None
    }


def _low_rank(family: str, *more: str, scale: float) -> dict[str, Optimizer]:
    """The optimizers of one projection: all at the step, and layer by layer in backward."""
    known = options_of(family)
    common: dict[str, Any] = {
        "options": {n: known[n] for n in ("rank", "update_proj_gap", "proj_type", *more)}
        | {"scale": known["scale"]},
        "defaults": {"rank": 128, "update_proj_gap": 200, "scale": scale},
        "takes_targets": True,
    }
    return {
        f"{family}_adamw{suffix}": Optimizer(strategies=(family, *extra), **common)
        for suffix, extra in (
            ("", ()),
            ("_8bit", ("int8_states",)),
            ("_layerwise", ("in_backward",)),
            ("_8bit_layerwise", ("int8_states", "in_backward")),
        )
        if family == "galore" or "8bit" not in suffix
    }


def _low_bits(strategy: str, block_size: int, note: str = "") -> Optimizer:
    """torchao's AdamW with moments in few bits."""
    return Optimizer(
        strategies=(strategy,),
        options={
            "block_size": Spelling(
                strategy=strategy,
                values={block_size: block_size},
                why=f"blocks of {strategy} have {block_size} elements",
            ),
            "bf16_stochastic_round": Spelling(
                strategy=strategy,
                values={True: True},
                why="the stochastic_rounding of memrt.TrainingArguments says it",
            ),
        },
        note=note,
    )


_EMBEDDINGS = "moments of embeddings are in 8 bits too, which transformers leaves in 32"
_LOMO = {"clip_grad_value": Spelling(strategy="lomo", option="clip_value")}
_ADALOMO = {n: Spelling(strategy="adalomo", option=n) for n in ("clip_threshold", "decay_rate")}

OPTIMIZERS: Mapping[str, Optimizer] = MappingProxyType(
    {
        **_low_rank("galore", scale=0.25),
        **_low_rank("apollo", "proj", "scale_type", scale=1.0),
        "lomo": Optimizer(strategies=("lomo",), options=_LOMO),
        "adalomo": Optimizer(strategies=("adalomo",), options=_ADALOMO),
        "adamw_8bit": Optimizer(strategies=("int8_states",), note=_EMBEDDINGS),
        "adamw_bnb_8bit": Optimizer(strategies=("int8_states",), note=_EMBEDDINGS),
        "adamw_torch_8bit": _low_bits("int8_states", 256),
        "adamw_torch_4bit": _low_bits(
            "int4_states", 128, "blocks have 128 elements, where transformers asks for 256"
        ),
    }
)
"""transformers' `optim` names that mean a strategy; those that are refused stand in
`memrt.refused_optimizers`, and all others stay transformers' own."""


def is_spelling(key: str) -> bool:
    """Whether a setting's name is another project's."""
    return key in REFUSED_KEYS or key in KEYS or key == "memory_strategies"


def own_options(
    options: Mapping[str, Any],
    others: Mapping[str, Spelling],
    *,
    known: Iterable[str] = (),
    subject: str = "",
) -> dict[str, Any]:
    """The options under memrt's names; one that is in neither table stays as it is.

    Raises `ValueError` where two names of one option say different things.
    """
    where = f"{subject}: " if subject else ""
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    for name, value in options.items():
        spelling = None if name in known else others.get(name)
        own, result = name, value
        if spelling is not None:
            result = spelling.value(f"{where}{name}", value)
            if spelling.option is None:
                continue
            own = spelling.option
        if own in found and found[own] != result:
            raise ValueError(
                f"{where}{given[own]}={options[given[own]]!r} and {name}={value!r} are the "
                "same option; give one"
            )
        found[own], given[own] = result, name
    return found
