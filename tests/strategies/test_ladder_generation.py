"""A ladder generates: both networks in one cache give what the whole forward gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memrt
from memrt.ladder.attach import CHILD
from memrt.testing import tiny_batches, tiny_model

DECODERS = ("llama", "gpt2", "qwen3", "gemma3_text", "mistral", "gpt_neox")
# float32 sums in another order: some 16 products of 32 numbers of order one
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def laddered(family: str, config: dict[str, Any] | None = None, **settings: Any) -> nn.Module:
    """A model whose side network says something, ready to generate."""
    torch.manual_seed(0)
    model = tiny_model(family, use_cache=True, **(config or {})).eval()
    given = {"reduction": 2, **settings}
    memrt.prepare(model, [f"ladder({', '.join(f'{k}={v!r}' for k, v in given.items())})"])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if CHILD in name.split(".") and ".up." in name:
            parameter.data.normal_(std=0.5, generator=generator)
    return model


def prompt(side: str) -> dict[str, Tensor]:
    """Two rows of 9 ids, of which the second has 4 of padding on one side."""
    batch = tiny_batches("llama", length=9)[0]
    mask = torch.ones_like(batch["attention_mask"])
    mask[1, :4] = 0
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": mask if side == "left" else mask.flip(1),
    }


def without_cache(model: nn.Module, batch: dict[str, Tensor], count: int) -> Tensor:
    """Greedy ids, each from a forward over everything."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(count):
        positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)[0]
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=-1)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_generation_is_that_of_the_whole_forward(family: str) -> None:
    model = laddered(family)
    batch = prompt("left")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**batch, **settings)
    assert torch.equal(found, without_cache(model, batch, 6))
    torch.manual_seed(0)
    plain = tiny_model(family, use_cache=True).eval()
    assert not torch.equal(found, plain.generate(**batch, **settings)), "the side says nothing"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("every", [1, 2])
def test_token_by_token_gives_the_logits_of_the_whole_forward(side: str, every: int) -> None:
    model = laddered("llama", every=every)
    batch = prompt(side)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache, pieces = None, []
        for start, stop in ((0, 3), (3, 4), (4, 7), (7, 9)):
            output = model(
                ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            pieces.append(output.logits)
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[kept], whole[kept], **TOLERANCE)


@pytest.mark.parametrize(
    "rungs", [{}, {"every": 2}, {"layers": (0, 2)}, {"layers": (1, 2)}], ids=str
)
@pytest.mark.parametrize("first", ["sliding_attention", "full_attention"])
def test_a_side_block_s_cache_is_of_its_backbone_block_s_kind(
    rungs: dict[str, Any], first: str
) -> None:
    """Beyond the window, a sliding cache holds less than a full one."""
    kinds = ["sliding_attention", "full_attention"]
    kinds = kinds if first == kinds[0] else kinds[::-1]
    model = laddered("gemma3_text", config={"sliding_window": 6, "layer_types": 2 * kinds}, **rungs)
    ids = tiny_batches("llama", length=16)[0]["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache, pieces = None, []
        for index in range(ids.shape[1]):
            output = model(ids[:, index : index + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **TOLERANCE)
    assert len(cache.layers) == 4 + (4 if not rungs else 2)


def test_beams_reorder_both_networks_caches() -> None:
    """Beam search reads the cache of other rows than it wrote: its scores tell."""
    model = laddered("llama")
    batch = prompt("left")
    found = model.generate(
        **batch,
        max_new_tokens=6,
        num_beams=3,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ids = found.sequences
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 6, dtype=torch.int64)], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    chosen = logits[:, 8:-1].log_softmax(-1).gather(2, ids[:, 9:, None]).squeeze(2)
    torch.testing.assert_close(chosen.sum(dim=1) / 6, found.sequences_scores, **TOLERANCE)


def test_a_static_cache_has_room_for_both() -> None:
    model = laddered("llama")
    batch = prompt("left")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**batch, **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, model.generate(**batch, **settings))


def test_a_cache_that_the_backbone_filled_alone_is_refused() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", use_cache=True).eval()
    batch = prompt("left")
    with torch.no_grad():
        cache = model(**batch).past_key_values
        memrt.prepare(model, ["ladder(reduction=2)"])
        with pytest.raises(ValueError, match="filled without the ladder"):
            model(batch["input_ids"][:, :1], past_key_values=cache)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_encoder_decoder_generates_with_both_networks(num_beams: int) -> None:
    model = laddered("t5")
    batch = prompt("right")
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = model.generate(**batch, **settings, num_beams=num_beams)
    again = model.generate(**batch, **settings, num_beams=num_beams, use_cache=False)
    assert torch.equal(found, again)
    torch.manual_seed(0)
    plain = tiny_model("t5", use_cache=True).eval()
    assert not torch.equal(found, plain.generate(**batch, **settings, num_beams=num_beams))


def test_the_side_decoder_attends_to_the_side_encoder() -> None:
    model = laddered("t5")
    batch = {**prompt("right"), "decoder_input_ids": torch.tensor([[0, 5, 7], [0, 3, 2]])}
    with torch.no_grad():
        before = model(**batch)
        model.encoder.block[-1].ladder.block.layer[-1].DenseReluDense.wo.weight.mul_(-1)
        after = model(**batch)
    assert not torch.equal(before.logits, after.logits)
    states = (before.encoder_last_hidden_state, after.encoder_last_hidden_state)
    assert torch.equal(*states), "the backbone's decoder reads the backbone's encoder"
    with pytest.raises(ValueError, match="pass input_ids"):
        laddered("t5")(encoder_outputs=(states[0],), decoder_input_ids=batch["decoder_input_ids"])


def test_an_encoder_s_output_of_another_run_is_refused() -> None:
    model = laddered("t5")
    ids = prompt("right")["input_ids"]
    decoder = {"decoder_input_ids": torch.tensor([[0, 5, 7], [0, 3, 2]])}
    with torch.no_grad():
        expected = model(input_ids=ids, **decoder).logits
        first = model.get_encoder()(ids)
        assert torch.equal(model(encoder_outputs=first, **decoder).logits, expected)
        model.get_encoder()(ids.flip(1))
        for _ in range(2):
            with pytest.raises(ValueError, match="of another run of the encoder"):
                model(encoder_outputs=first, **decoder)


def test_training_keeps_no_keys_and_values_that_nobody_reads() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", use_cache=True).train()
    run = memrt.prepare(model, ["ladder(reduction=2)"])
    batch = tiny_batches("llama")[0]
    output = model(**batch)
    assert not output.past_key_values.get_seq_length()
    run.detach()
    with torch.no_grad():
        filled = model(batch["input_ids"]).past_key_values
    run = memrt.prepare(model, ["ladder(reduction=2)"])
    with pytest.raises(ValueError, match="filled without the ladder"):  # it is not thrown away
        model(**{**batch, "attention_mask": None}, past_key_values=filled)
    run.detach()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_detach_gives_every_module_its_mode_back(family: str) -> None:
    model = tiny_model(family).train()
    first = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
    first.eval()
    before = {name: module.training for name, module in model.named_modules()}
    memrt.prepare(model, ["ladder(reduction=2)"]).detach()
    assert {name: module.training for name, module in model.named_modules()} == before
    run = memrt.prepare(model, ["ladder(reduction=2)"])
    model.eval()
    run.detach()
    assert not any(module.training for module in model.modules())
