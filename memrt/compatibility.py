"""Which strategies go together, with which trainer settings, and on which kinds of models.

Nothing here is written down by hand: every cell is what `memrt.compose.conflicts` says of that
stack on a model of that kind, the same function that refuses a stack before a run. The models are
built on fake tensors, so they have the widths of real ones (a rank of 128 bites) and no bytes.
`memrt compat` prints it, `docs/compatibility.md` is its output, and the tests hold it against the
pairs test, which trains every pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from torch import nn

from memrt import registry
from memrt.compose import conflicts
from memrt.kernels.quiet import errors_only
from memrt.profiling.fake import fake_tensors
from memrt.strategy import Strategy
from memrt.structure import Facts, RunSettings, discover

__all__ = [
    "KINDS",
    "SCHEMA",
    "SETTINGS",
    "Compatibility",
    "Kind",
    "PlainModule",
    "Verdict",
    "buildable",
    "facts_of_kinds",
    "survey",
    "verdict_of",
]

SCHEMA = "memrt.compatibility/1"

HIDDEN = 512
NUM_LAYERS = 8
_HEADS = 8
_VOCABULARY = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of model: what of its structure matters to strategies, and how one is built."""

    example: str
    brings: str
    build: Callable[[], nn.Module]


class PlainModule(nn.Module):
    """Repeated blocks in a module that knows nothing of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(HIDDEN),
                nn.Linear(HIDDEN, 2 * HIDDEN),
                nn.GELU(),
                nn.Linear(2 * HIDDEN, HIDDEN),
            )
            for _ in range(NUM_LAYERS)
        )
        self.head = nn.Linear(HIDDEN, _VOCABULARY)


def _transformers(config: str, model: str, **values: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers
        from transformers.initialization import no_init_weights

        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # it prints generation configs
        try:
            with no_init_weights():  # some initialisations look at values
                built: nn.Module = getattr(transformers, model)(
                    getattr(transformers, config)(**values)
                )
        finally:
            transformers.logging.set_verbosity(before)
        return built

    return build


_USUAL: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": _HEADS,
}
_TEXT = {**_USUAL, "vocab_size": _VOCABULARY}
_GROUPED = {**_TEXT, "num_key_value_heads": _HEADS // 2}

KINDS: Mapping[str, Kind] = {
    "decoder": Kind(
        example="Llama, Qwen, Mistral",
        brings="separate linear layers, a head of its own",
        build=_transformers("LlamaConfig", "LlamaForCausalLM", **_GROUPED),
    ),
    "fused decoder": Kind(
        example="GPT-2",
        brings="fused and transposed weights, a head tied to the embeddings",
        build=_transformers(
            "GPT2Config",
            "GPT2LMHeadModel",
            n_embd=HIDDEN,
            n_layer=NUM_LAYERS,
            n_head=_HEADS,
            vocab_size=_VOCABULARY,
            bos_token_id=0,
            eos_token_id=0,
        ),
    ),
    "experts": Kind(
        example="Mixtral",
        brings="experts in one three-dimensional weight",
        build=_transformers("MixtralConfig", "MixtralForCausalLM", **_GROUPED, num_local_experts=4),
    ),
    "encoder": Kind(
        example="BERT, RoBERTa",
        brings="attends both ways, a tied head behind a transform",
        build=_transformers("BertConfig", "BertForMaskedLM", **_TEXT),
    ),
    "encoder-decoder": Kind(
        example="T5",
        brings="two lists of layers, cross attention",
        build=_transformers(
            "T5Config",
            "T5ForConditionalGeneration",
            d_model=HIDDEN,
            d_ff=2 * HIDDEN,
            num_layers=NUM_LAYERS,
            num_heads=_HEADS,
            d_kv=HIDDEN // _HEADS,
            vocab_size=_VOCABULARY,
            decoder_start_token_id=0,
        ),
    ),
    "images": Kind(
        example="ViT",
        brings="patches instead of tokens, a classifier as the head",
        build=_transformers(
            "ViTConfig", "ViTForImageClassification", **_USUAL, image_size=32, patch_size=8
        ),
    ),
    "plain": Kind(
        example="your own nn.Module",
        brings="repeated blocks, no config and no accessor for a head",
        build=PlainModule,
    ),
}

SETTINGS: Mapping[str, RunSettings] = {
    "max_grad_norm=1": RunSettings(max_grad_norm=1.0),
    "gradient_accumulation_steps=4": RunSettings(accumulation_steps=4),
    "fp16=True": RunSettings(fp16=True),
    "gradient_checkpointing=True": RunSettings(gradient_checkpointing=True),
    "fsdp": RunSettings(sharded="fsdp"),
    "deepspeed": RunSettings(sharded="deepspeed"),
    "DataParallel": RunSettings(data_parallel=True),
}
"""Settings of the trainer, which take part in conflicts as strategies do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What `conflicts` says of one stack: reasons by kind of model, none where it runs."""

    reasons: Mapping[str, tuple[str, ...]]

    @property
    def text(self) -> str:
        """`yes` and `no` on every kind that was asked, `some` on some, `none` without kinds."""
        refused = [kind for kind, found in self.reasons.items() if found]
        if not self.reasons:
            return "none"
        return "yes" if not refused else "no" if len(refused) == len(self.reasons) else "some"

    @property
    def runs_on(self) -> list[str]:
        """Kinds without a reason against it."""
        return [kind for kind, found in self.reasons.items() if not found]

    def grouped(self) -> list[tuple[str, list[str]]]:
        """Reasons with the kinds that they hold for; equal but for a name is one reason."""
        groups: dict[str, tuple[str, list[str]]] = {}
        for kind, found in self.reasons.items():
            if found:
                text = "; ".join(found)
                groups.setdefault(_without_names(text), (text, []))[1].append(kind)
        return list(groups.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"verdict": self.text, "reasons": {k: list(v) for k, v in self.reasons.items()}}


def _without_names(text: str) -> str:
    """A reason without dotted names and numbers, which differ from model to model."""
    words = text.split()
    return " ".join(word for word in words if "." not in word and not word.strip("()").isdigit())


@dataclass(frozen=True, slots=True, kw_only=True)
class Compatibility:
    """The whole matrix. `settings` are those of `SETTINGS`, each with one strategy."""

    strategies: tuple[Strategy, ...]
    alone: Mapping[str, Verdict]
    pairs: Mapping[tuple[str, str], Verdict]
    settings: Mapping[tuple[str, str], Verdict]
    unbuilt: Mapping[str, str] = field(default_factory=dict)
    """Strategies that cannot be made without settings, with the reason."""

    def pair(self, one: str, other: str) -> Verdict:
        """The verdict of two, in either order."""
        return self.pairs[(one, other) if (one, other) in self.pairs else (other, one)]

    def to_json(self) -> dict[str, Any]:
        """Plain values under a versioned schema."""
        return {
            "schema": SCHEMA,
            "kinds": {
                name: {"example": kind.example, "brings": kind.brings}
                for name, kind in KINDS.items()
            },
            "strategies": [
                {
                    "name": strategy.name,
                    "settings": strategy.to_json(),
                    "lowers": [account.value for account in strategy.lowers],
                    "exact": strategy.exact,
                    "needs": sorted(promise.value for promise in strategy.needs),
                    "breaks": sorted(promise.value for promise in strategy.breaks),
                    **self.alone[strategy.name].to_json(),
                }
                for strategy in self.strategies
            ],
            "pairs": [
                {"strategies": list(names), **verdict.to_json()}
                for names, verdict in self.pairs.items()
            ],
            "settings": [
                {"strategy": name, "setting": setting, **verdict.to_json()}
                for (name, setting), verdict in self.settings.items()
            ],
            "need_settings": dict(self.unbuilt),
        }


def facts_of_kinds() -> dict[str, Facts]:
    """A model of every kind on fake tensors, with what structure finds in it."""
    found = {}
    for name, kind in KINDS.items():
        with fake_tensors():
            model = kind.build()
        found[name] = Facts(model=model, structure=discover(model), settings=RunSettings())
    return found


def buildable(names: Sequence[str]) -> tuple[list[Strategy], dict[str, str]]:
    """Strategies with their default settings, and why the others have none."""
    built, unbuilt = [], {}
    for name in names:
        try:
            built.append(registry.parse(name))
        except (TypeError, ValueError) as error:
            unbuilt[name] = str(error)
    return built, unbuilt


def verdict_of(
    strategies: Sequence[Strategy],
    facts: Mapping[str, Facts],
    *,
    settings: RunSettings | None = None,
) -> Verdict:
    """What `conflicts` says of a stack on every model of `facts`."""
    reasons = {}
    # a check may warn of what it lets pass: advice for a run, and there is none here
    with fake_tensors(), errors_only("memrt"):
        for kind, found in facts.items():
            asked = found if settings is None else replace(found, settings=settings)
            reasons[kind] = tuple(conflicts(strategies, asked))
    return Verdict(reasons=reasons)


def survey(
    strategies: Sequence[Strategy],
    facts: Mapping[str, Facts],
    *,
    unbuilt: Mapping[str, str] | None = None,
) -> Compatibility:
    """Every strategy alone, in pairs and with the trainer's settings.

    A kind that refuses a pair or a setting for a reason that one strategy has alone already is left
    out there: it says nothing about the pair. What runs only beside others (a frozen base) is thus
    asked with each of them.
    """
    alone = {strategy.name: verdict_of([strategy], facts) for strategy in strategies}

    def together(*members: Strategy, settings: RunSettings | None = None) -> Verdict:
        found = verdict_of(members, facts, settings=settings).reasons
        known = {
            kind: {reason for member in members for reason in alone[member.name].reasons[kind]}
            for kind in found
        }
        return Verdict(
            reasons={
                kind: reasons
                for kind, reasons in found.items()
                if not reasons or not known[kind].issuperset(reasons)
            }
        )

    return Compatibility(
        strategies=tuple(strategies),
        alone=alone,
        pairs={
            (one.name, other.name): together(one, other)
            for one, other in combinations(strategies, 2)
        },
        settings={
            (strategy.name, name): together(strategy, settings=settings)
            for strategy in strategies
            for name, settings in SETTINGS.items()
        },
        unbuilt=dict(unbuilt or {}),
    )
