"""Random weights: the bits of `from_config`, one module at a time."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import initialization

from memrt.loading import auto_class, load
from memrt.profiling.fake import fake_initialisers, fake_tensors, is_fake
from memrt.profiling.ledger import Ledger
from memrt.strategy import Strategy
from tests.tiny_models import CONFIGS, assert_equal_models, tensors


def from_config(config: Any, dtype: torch.dtype, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", CONFIGS)
def test_bits_of_from_config(family: str, dtype: torch.dtype) -> None:
    config = CONFIGS[family]()
    assert_equal_models(load(config, dtype=dtype, seed=7), from_config(config, dtype, 7))


def test_another_seed_gives_other_weights() -> None:
    config = CONFIGS["llama"]()
    one, other = load(config, seed=1), load(config, seed=2)
    drawn = [name for name, p in one.named_parameters() if p.ndim > 1]
    assert not any(torch.equal(tensors(one)[name], tensors(other)[name]) for name in drawn)


def test_a_seed_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    load(CONFIGS["gpt2"](), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_the_global_generator_moves_as_in_from_config() -> None:
    config = CONFIGS["llama_tied"]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        expected = auto_class(config).from_config(copy.deepcopy(config))
        state = torch.get_rng_state()
        torch.manual_seed(11)
        assert_equal_models(load(config), expected)
        assert torch.equal(torch.get_rng_state(), state)


def test_the_config_that_was_passed_is_not_changed() -> None:
    config = CONFIGS["llama"]()
    before = config.to_dict()
    load(config, dtype="bfloat16")
    assert config.to_dict() == before


def test_dtype_of_the_config() -> None:
    config = CONFIGS["llama"]()
    config.dtype = torch.float16
    assert {p.dtype for p in load(config).parameters()} == {torch.float16}


def test_each_module_is_marked_so_that_transformers_does_not_draw_again() -> None:
    model: Any = load(CONFIGS["gpt2"](), seed=1)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    model.init_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OneByte(Strategy):
    """Keeps one byte of each weight, so that what is left at the peak is what is not yet placed."""

    name = "one_byte"

    def place_weight(self, name: str, tensor: Tensor) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "bert", "mixtral", "vit"])
def test_peak_is_one_module_when_nothing_is_kept(family: str) -> None:
    with Ledger() as ledger:
        model = load(CONFIGS[family](), [OneByte()], ledger=ledger, seed=1)
    result = sum(tensor.nbytes for tensor in tensors(model).values())
    whole = load(CONFIGS[family](), seed=1)
    own = [(*m.parameters(recurse=False), *m.buffers(recurse=False)) for m in whole.modules()]
    scratch = max(sum(tensor.nbytes for tensor in module) for module in own)
    if family.startswith("llama"):  # without biases a module's tensors are one tensor
        assert scratch == max(tensor.nbytes for tensor in tensors(whole).values())
    peak = ledger.timeline.peak().peak_bytes
    assert peak <= result + scratch
    assert peak < sum(p.nbytes for p in whole.parameters())


class _Config(transformers.PreTrainedConfig):  # type: ignore[misc]
    model_type = "memrt-test"


class _Block(nn.Module):
    """Two layers and a gain of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gain = nn.Parameter(torch.empty(8))


class _Pair(transformers.PreTrainedModel):  # type: ignore[misc]
    """A model whose block initialises its children's weights together, as CLIP's attention does."""

    config_class = _Config

    def __init__(self, config: Any, *, forgets: bool = False) -> None:
        super().__init__(config)
        self.block = _Block()
        if forgets:
            self.scale = nn.Parameter(torch.full((3,), 2.0))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _Block):
            initialization.normal_(module.gain)
            for part in (module.first, module.second):
                initialization.normal_(part.weight, std=5.0)


class _Forgetful(_Pair):
    """Leaves a value to its constructor, which a meta model cannot know."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, forgets=True)


@pytest.fixture
def registered(request: pytest.FixtureRequest) -> Any:
    cls = request.param
    mapping = transformers.AutoModelForCausalLM._model_mapping
    transformers.AutoConfig.register("memrt-test", _Config)
    transformers.AutoModelForCausalLM.register(_Config, cls)
    yield cls
    del mapping._extra_content[_Config]
    del transformers.CONFIG_MAPPING._extra_content["memrt-test"]


@pytest.mark.parametrize("registered", [_Pair], indirect=True)
def test_a_weight_is_placed_after_the_last_module_that_writes_it(registered: Any) -> None:
    seen: dict[str, Tensor] = {}

    @dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
    class Spy(Strategy):
        name = "spy"

        def place_weight(self, name: str, tensor: Tensor) -> Tensor:
            assert name not in seen
            seen[name] = tensor.clone()
            return tensor

    config = _Config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = registered(config)
    model = load(config, [Spy()], seed=3, task="causal-lm")
    assert_equal_models(model, expected)
    assert seen.keys() == dict(expected.named_parameters()).keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in expected.named_parameters())


@pytest.mark.parametrize("registered", [_Forgetful], indirect=True)
def test_a_value_that_only_the_constructor_knows_is_refused_by_name(registered: Any) -> None:
    with pytest.raises(ValueError, match=r"_Forgetful leaves values to its constructor.*: scale"):
        load(_Config(), task="causal-lm")


@pytest.mark.parametrize("registered", [_Forgetful], indirect=True)
def test_a_plan_asks_for_no_values_and_is_made(registered: Any) -> None:
    """Such a model is trained from its checkpoint, which has them."""
    with fake_tensors(), fake_initialisers():
        model = load(_Config(), task="causal-lm")
    assert all(is_fake(each) and each.device.type == "cpu" for each in model.state_dict().values())
