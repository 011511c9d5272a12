"""PEFT's methods beside LoRA: equal to PEFT's wrapper, with its files, or refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn

import memrt
from memrt.adapter_reach import adapter_layers
from memrt.adapter_starts import give_back, parts_taken, weights_at_risk
from memrt.errors import ConflictError
from memrt.runner import model_loss
from memrt.strategies.peft import Peft
from memrt.testing import tiny_batches, tiny_model

pytestmark = pytest.mark.filterwarnings(  # PEFT asks transformers by a name of before
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Setting .save_embedding_layers.:UserWarning",
    "ignore:Unsupported layer type:UserWarning",
    "ignore:.init_lora_weights. is 'eva':UserWarning",
)

TARGETS = ["q_proj", "v_proj", "down_proj"]


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return tiny_model("llama", layers=2).train()


def of(kind: str, **values: Any) -> dict[str, Any]:
    return {"peft_type": kind, "target_modules": TARGETS, **values}


SAME: dict[str, dict[str, Any]] = {
    "several ranks": of("LORA", r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
    "trained biases and embeddings": of(
        "LORA", r=4, bias="lora_only", lora_bias=False, modules_to_save=["embed_tokens"]
    ),
    "embeddings": of("LORA", r=4, target_modules=["embed_tokens", "q_proj"]),
    "dora": of("LORA", r=4, use_dora=True, lora_dropout=0.1),
    "pissa": of("LORA", r=4, init_lora_weights="pissa"),
    "tokens": of("TRAINABLE_TOKENS", target_modules=["embed_tokens"], token_indices=[*range(99)]),
    "c3a": of("C3A", block_size=4),
    "delora": of("DELORA", r=4),
    "fourierft": of("FOURIERFT", n_frequency=20),
    "ln_tuning": of("LN_TUNING", target_modules=["input_layernorm"]),
    "loha": of("LOHA", r=2),
}


@pytest.mark.parametrize("name", SAME)
def test_a_method_trains_as_pefts_own_wrapper_and_is_saved_for_it(
    name: str, tmp_path: Path
) -> None:
    strategy = Peft(config=SAME[name])
    ours, theirs = fresh(), fresh()
    torch.manual_seed(1)
    session = memrt.prepare(ours, [strategy], lr=1e-2, weight_decay=0.0)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(theirs, strategy.build())
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    for step in range(3):
        batch = tiny_batches("llama", seed=step)[0]
        torch.manual_seed(step)
        found = session.train_micro_batch(lambda b=batch: model_loss(ours, b))  # type: ignore[misc]
        session.step()
        torch.manual_seed(step)
        expected = model_loss(wrapped, batch)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    session.attachments[0].save_apart(tmp_path)
    batch = tiny_batches("llama", seed=7)[0]
    with torch.no_grad():
        wanted = ours.eval()(**batch).logits
        loaded = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()(**batch).logits
        before = fresh().eval()(**batch).logits
    assert torch.allclose(loaded, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (of("ADALORA", total_step=20), "wrapper of ADALORA moves ranks between the layers"),
        ({"peft_type": "CPT", "task_type": "CAUSAL_LM"}, "CPT puts nothing into the model"),
        (of("POLY"), "wrapper of POLY tells the layers the task"),
        (
            of("LORA", task_type="CAUSAL_LM", alora_invocation_tokens=[3]),
            r"alora_invocation_tokens=\[3\]: PEFT's wrapper",
        ),
        (of("LORA", layer_replication=[[0, 1], [0, 2]]), "layer_replication=.*changes the model"),
        (of("LORA", init_lora_weights="eva"), "'eva': LoRA is started on data"),
        (of("RANDLORA", r=4), "RANDLORA shares tensors between layers"),
        (of("LILY"), "LILY shares tensors between layers"),
    ],
    ids=str,
)
def test_what_needs_pefts_own_wrapper_is_refused(config: dict[str, Any], message: str) -> None:
    """Each trained on without a word before: with fixed ranks, nothing at all, or unsavable."""
    model = fresh()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConflictError, match=f"{message}.*without this strategy"):
        memrt.prepare(model, [Peft(config=config)])
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's
def test_linear_layers_that_peft_leaves_out_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """It takes the dense MLPs and shared experts of a mixture for the experts by their names."""
    memrt.prepare(tiny_model("bert"), ["peft(rank=2)"])
    memrt.prepare(tiny_model("deepseek_v3"), ["peft(rank=2, targets=['q_b_proj'])"])
    assert not caplog.messages
    model = tiny_model("deepseek_v3")
    memrt.prepare(model, ["peft(rank=2)"])
    assert "no adapters on 12 linear layers (such as model.layers.0.mlp.gate_proj)" in caplog.text


def test_biases_that_a_head_brings_too_are_refused_before_they_cannot_be_saved() -> None:
    biases = "peft(rank=2, options={'bias': 'all', 'modules_to_save': ['lm_head']})"
    model = tiny_model("phi")
    with pytest.raises(ConflictError, match=r"saves lm_head\.bias.*'lm_head'.*bias='lora_only'"):
        memrt.prepare(model, [biases])
    memrt.prepare(model, [biases.replace("'all'", "'lora_only'")])
    memrt.prepare(tiny_model("llama"), [biases])  # whose head has none


@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("llama", TARGETS, {"init_lora_weights": "pissa"}),
        ("llama", TARGETS, {"init_lora_weights": "pissa_niter_4"}),
        ("llama", TARGETS, {"init_lora_weights": "olora"}),
        ("llama", TARGETS, {"kasa_config": peft.KasaConfig()}),
        ("gpt2", ["c_attn", "c_proj"], {"init_lora_weights": "pissa"}),  # weights [in, out]
    ],
)
def test_what_a_start_takes_of_the_weights_comes_back(
    family: str, targets: list[str], options: dict[str, Any]
) -> None:
    """Of what it began with, whatever was trained since; nothing twice after an export."""
    torch.manual_seed(0)
    model = tiny_model(family, layers=2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strategy = Peft(config=peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options))
    session = memrt.prepare(model, [strategy], lr=1e-1)
    for batch in tiny_batches(family, count=2):
        session.train_micro_batch(lambda b=batch: model_loss(model, b))  # type: ignore[misc]
        session.step()
    session.detach()
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():  # two roundings of fp32
        assert torch.allclose(after[name], tensor, rtol=0, atol=float(4e-7 * tensor.abs().max()))
    session, batch = memrt.prepare(model, [strategy]), tiny_batches(family)[0]
    with torch.no_grad():
        adapted = model.eval()(**batch).logits
        exported = session.export().eval()(**batch).logits
    assert torch.allclose(exported, adapted, atol=1e-5)


def test_weights_that_a_start_rounds_are_kept_apart() -> None:
    """LoftQ's, which nothing else tells."""
    model, config = fresh(), SimpleNamespace(init_lora_weights="loftq")
    weights = weights_at_risk(config, model)
    memrt.prepare(model, [Peft(rank=2)])
    parts = parts_taken(config, model, weights, adapter="default")
    layers = [layer.get_base_layer() for _, layer in adapter_layers(model)]
    wanted = [layer.weight.clone() for layer in layers]
    for layer in layers:
        layer.weight.data = layer.weight.data.round(decimals=2)
    give_back(parts)
    assert len(parts) == len(layers) > 0
    assert all(torch.equal(a.weight, b) for a, b in zip(layers, wanted, strict=True))
    assert not weights_at_risk(SimpleNamespace(init_lora_weights="pissa"), model)


def test_a_start_that_fails_halfway_leaves_the_model_as_it_was() -> None:
    """Layers before the one that is no number have started."""
    model: Any = fresh()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    strategy = Peft(rank=4, targets=tuple(TARGETS), options={"init_lora_weights": "pissa"})
    with pytest.raises(RuntimeError, match="non-finite"):
        memrt.prepare(model, [strategy])
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor, before[name], rtol=0, atol=1e-6, equal_nan=True)
