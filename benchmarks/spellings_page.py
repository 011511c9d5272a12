"""The page for who comes from another project: the table of `memrt/spellings.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memrt.quantization import REFUSED_SETTINGS
from memrt.refused_optimizers import REFUSED_OPTIMIZERS
from memrt.spellings import IMPLIED, KEYS, OPTIMIZERS, PREFIXES, REFUSED_KEYS, Spelling

__all__ = ["spellings_page"]

_INTRODUCTION = """\
# Coming from elsewhere

memrt reads the argument names of transformers and of other projects where they mean the same, and
says once what they became. What it has no equivalent for is refused with the reason; nothing is
ignored. Options that are not named take memrt's defaults, not the other project's. A name of
another project beside `strategies` that says something else is an error.

## transformers' `optim`

`memrt.TrainingArguments(optim="galore_adamw", optim_args="rank=128", optim_target_modules=...)`,
plain `transformers.TrainingArguments` given to `memrt.Trainer` or to a class with `MemoryMixin`,
and `training.optim` of `memrt train` mean the strategies below. No other package is needed, a run
resumes to the bit, micro-batches accumulate, `max_grad_norm` clips and `grad_norm` is the true one.
Where `max_grad_norm` is above 0 (transformers' default is 1.0), what is updated in backward takes a
second backward pass for it (`clip='two_pass'`, [update-time.md](update-time.md)); with
`max_grad_norm=0` it takes one. Two names are refused (below the table); every other `optim` stays
transformers' own.

"""

_GALORE = """
Unlike transformers, memrt gives GaLore the betas and the epsilon of the arguments, and GaLore,
APOLLO and LOMO their weight decay (there each keeps its package's own). Weights whose smaller side
is not above the rank train with AdamW. Of `optim_target_modules`, a list names parts of module
names or regular expressions for whole names, a text is a regular expression, and `"all-linear"`
takes the head too.

"""

_QUANTIZATION = """
## `BitsAndBytesConfig`

`memrt.load(model, quantization_config=BitsAndBytesConfig(...))` is `memrt.load(model, ["nf4"])`,
with one warning, where it says what QLoRA does: `load_in_4bit=True`,
`bnb_4bit_quant_type="nf4"`, `bnb_4bit_use_double_quant=True`, and `bnb_4bit_compute_dtype` the
dtype in which the model is loaded. `nf4` packs the linear layers of the repeated layers, which for
a language model are those that transformers packs; head and embeddings stay. Refused, beside other
values of these and configs of other kinds:

"""

_KEYS = """
## Keys of `memrt train`

In the YAML file, at the top or under `training` or `model`, and as `key=value` or `--key value`.
The key less its prefix is also a name of the option in a strategy's parentheses:
`galore(update_interval=50)`. `use_galore` and its kin may be left out where another key of the
strategy is given. GaLore under another project's key is `form='plain'`, as published.
`memory_strategies` is `strategies`.

"""

_REFUSED = """
## What has no equivalent

"""


def _code(value: object) -> str:
    return f"`{value}`"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _built(strategy: str) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in IMPLIED.get(strategy, {}).items())
    return f"{strategy}({options})" if options else strategy


def _meaning(key: str, spelling: Spelling) -> str:
    if spelling.adds:
        return f"`{spelling.adds}` beside `{spelling.strategy}`"
    if spelling.option is None and spelling.is_switch:
        return f"strategy `{_built(spelling.strategy)}`"
    if spelling.option is None:
        return f"as `{spelling.strategy}` does it; others are refused: {spelling.why}"
    return f"`{spelling.strategy}({spelling.option}=...)`"


def _values(spelling: Spelling) -> str:
    is_switch = spelling.is_switch or spelling.adds
    shown = [each for each in spelling.values if each not in (None, False) or not is_switch]
    words = {True: "true", False: "false", None: "null"}
    return ", ".join(_code(words.get(v, v) if isinstance(v, bool | None) else v) for v in shown)


def spellings_page() -> str:
    """The page."""
    optimizers = _table(
        ["`optim`", "strategies", "`optim_args`", "note"],
        (
            [
                _code(name),
                ", ".join(_code(_built(each)) for each in optimizer.strategies),
                ", ".join(map(_code, optimizer.options)) or "none",
                optimizer.note,
            ]
            for name, optimizer in OPTIMIZERS.items()
        ),
    )
    keys = _table(
        ["key", "means", "values", "from"],
        (
            [_code(key), _meaning(key, each), _values(each) or "any", each.source]
            for key, each in KEYS.items()
        ),
    )
    refused = _table(
        ["key", "why, and what to do"], ([_code(key), why] for key, why in REFUSED_KEYS.items())
    )
    not_optimizers = _table(
        ["`optim`", "why, and what to do"],
        ([_code(name), why] for name, why in REFUSED_OPTIMIZERS.items()),
    )
    settings = _table(
        ["setting", "why, and what to do"],
        ([_code(name), why] for name, why in REFUSED_SETTINGS.items()),
    )
    prefixes = ", ".join(f"`{prefix}` of `{name}`" for name, prefix in PREFIXES.items())
    return (
        f"{_INTRODUCTION}{optimizers}{_GALORE}{not_optimizers}"
        f"{_QUANTIZATION}{settings}{_KEYS}Prefixes: {prefixes}.\n\n{keys}"
        f"{_REFUSED}{refused}"
    )
