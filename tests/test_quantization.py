"""`memrt.load(..., quantization_config=BitsAndBytesConfig(...))`: `nf4`, or refused by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

import memrt
from memrt.packed_weights import packed_layers
from memrt.quantization import REFUSED_SETTINGS
from memrt.testing import tiny_config

QLORA: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
}
BF16 = torch.bfloat16


def load(config: Any, strategies: Any = (), **changed: Any) -> Any:
    quantization = BitsAndBytesConfig(**{**QLORA, **changed})
    return memrt.load(config, strategies, dtype=BF16, seed=0, quantization_config=quantization)


def test_it_is_nf4_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config("llama", hidden=64)
    memrt.load(config, dtype=BF16, seed=0).save_pretrained(tmp_path)
    for source in (config, str(tmp_path)):
        with caplog.at_level(logging.WARNING, logger="memrt"):
            caplog.clear()
            found = load(source)
        (message,) = caplog.messages
        assert message.startswith("quantization_config is run as strategies=['nf4']")
        state = found.state_dict()
        expected = memrt.load(source, ["nf4"], dtype=BF16, seed=0).state_dict()
        assert {n: (v.dtype, v.shape) for n, v in state.items()} == {
            n: (v.dtype, v.shape) for n, v in expected.items()
        }
        # where a scale lies between two codes, bitsandbytes on a CPU takes either
        dense = [name for name, value in state.items() if value.dtype == BF16]
        assert all(torch.equal(state[name], expected[name]) for name in dense)
        assert 0 < len(dense) < len(state)


def test_the_layers_are_those_that_transformers_packs() -> None:
    config = tiny_config("llama", hidden=64)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    kept = get_keys_to_not_convert(theirs)
    replace_with_bnb_linear(theirs, kept, BitsAndBytesConfig(**QLORA))
    names = {name for name, each in theirs.named_modules() if "4bit" in type(each).__name__}
    assert {name for name, _ in packed_layers(load(config))} == names != set()


def test_beside_strategies_it_may_say_the_same() -> None:
    config = tiny_config("llama", hidden=64)
    assert packed_layers(load(config, ["nf4"]))
    with pytest.raises(ValueError, match=r"quantization_config means nf4, and strategies has nf4"):
        load(config, ["nf4(keep=['o_proj'])"])


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"load_in_4bit": False}, "load_in_4bit=False: has no effect"),
        ({"load_in_4bit": False, "load_in_8bit": True}, r"load_in_8bit=True: LLM.int8\(\) quanti"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4': memrt has the normal-float"),
        ({"bnb_4bit_use_double_quant": False}, "use_double_quant=False: memrt always quantises"),
        ({"bnb_4bit_compute_dtype": "float16"}, r"compute_dtype=torch.float16: .* torch.bfloat16"),
        ({"bnb_4bit_compute_dtype": None}, r"load with dtype=torch.float32"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "quant_storage=torch.bfloat16: memrt keeps the"),
        ({"llm_int8_skip_modules": ["lm_head"]}, r"llm_int8_skip_modules=\['lm_head'\]: leave it"),
        ({"llm_int8_enable_fp32_cpu_offload": True}, "offload=True: memrt has no strategy that"),
    ],
)
def test_what_means_something_else_is_refused_by_name(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load(tiny_config("llama", hidden=64), **changed)


def test_other_configs_are_refused_by_name() -> None:
    config = tiny_config("llama", hidden=64)
    for other in (GPTQConfig(bits=4), {"load_in_4bit": True}):
        with pytest.raises(ValueError, match=f"is a {type(other).__name__}: must be a BitsAndBy"):
            memrt.load(config, quantization_config=other)
    defaults = vars(BitsAndBytesConfig())
    assert not any(defaults.get(name) for name in REFUSED_SETTINGS)
