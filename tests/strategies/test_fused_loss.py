"""The fused head: the model's own loss and gradients, without its logits, or a reason why not."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import memrt
from memrt import registry
from memrt.errors import ConflictError
from memrt.profiling.ledger import Ledger
from memrt.runner import model_loss
from memrt.session import Session
from memrt.structure import FAMILIES, Family, RunSettings
from tests.strategies.runs import assert_equal, batch_of, counted, gradients, model_of

FUSED = "fused_loss(chunk_tokens=5)"  # never a divisor of the tokens here
VOCABULARY = 99
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}

BUILD: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "llama tied": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)
    ),
    "gpt2 tied": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "gemma2 capped": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            **GROUPED,
            head_dim=8,
            final_logit_softcapping=2.0,
            attn_logit_softcapping=0.5,
            attn_implementation="eager",
        )
    ),
    "cohere scaled": lambda: transformers.CohereForCausalLM(
        transformers.CohereConfig(**GROUPED, logit_scale=0.25)
    ),
    "granite divided": lambda: transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**GROUPED, logits_scaling=4.0)
    ),
    "phi with a bias": lambda: transformers.PhiForCausalLM(
        transformers.PhiConfig(**SMALL, resid_pdrop=0.0, embd_pdrop=0.0)
    ),
    "bert causal": lambda: transformers.BertLMHeadModel(
        transformers.BertConfig(**SMALL, **NO_DROPOUT, is_decoder=True)
    ),
    "bert masked": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**SMALL, **NO_DROPOUT)
    ),
    "roberta masked": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**{**SMALL, "max_position_embeddings": 40}, **NO_DROPOUT)
    ),
    "modernbert masked": lambda: transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(**{**SMALL, "cls_token_id": 1, "sep_token_id": 2})
    ),
}
KINDS = list(BUILD)
MASKED = [kind for kind in KINDS if "masked" in kind]


def build(kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A model whose biases and norms matter, and whose logits reach beyond a soft cap of 2."""
    torch.manual_seed(seed)
    model = BUILD[kind]().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        model.get_output_embeddings().weight.mul_(4.0)
    return model.to(dtype)


def labels_of(pattern: str) -> Tensor:
    """Labels [3, 12] with uneven masks."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(3, VOCABULARY, (3, 12), generator=generator)
    if pattern == "uneven":
        labels[0, :9] = -100
        labels[2, 3:4] = -100
    elif pattern == "a row without labels":
        labels[1] = -100
    elif pattern == "one label":
        labels[:] = -100
        labels[1, 6] = 50
    elif pattern == "none":
        labels[:] = -100
    return labels


def batch_with(labels: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, VOCABULARY, labels.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def run_plain(model: nn.Module, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Any]:
    """The model's own loss and gradients."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.get("autocast", False)):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach(), gradients(model)


def run_fused(model: nn.Module, batch: dict[str, Any], **options: Any) -> tuple[Tensor, Any]:
    """Loss and gradients under the strategy."""
    model.zero_grad()
    run = memrt.prepare(model, [options.get("spec", FUSED)])
    with run.micro_batch():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=options.get("autocast", False)):
            loss = model(**batch).loss
        run.backward(loss)
    run.detach()
    return loss.detach(), gradients(model)


def run_truth(model: nn.Module, batch: dict[str, Any], *, masked: bool) -> tuple[Tensor, Any]:
    """In fp64, from the logits that the model returns, by the definition of its loss."""
    model.zero_grad()
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    logits, labels = model(**inputs).logits, batch["labels"]
    assert logits.dtype == torch.float64
    if not masked:
        logits, labels = logits[:, :-1], labels[:, 1:]
    num_items = batch.get("num_items_in_batch", (labels != -100).sum())
    total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    loss = total / num_items
    loss.backward()
    return loss.detach(), gradients(model)


def assert_as_good(ours: Any, plain: Any, truth: Any, *, eps: float = 2**-24) -> None:
    """An error of at most twice the plain one's over the whole gradient, and at most four times in
    any tensor, where one of the two may be lucky; besides a few roundings of the largest.
    """
    (our_loss, our_gradients), (plain_loss, plain_gradients) = ours, plain
    loss, expected = truth
    floor = 4 * eps * float(loss.abs())
    assert float((our_loss - loss).abs()) <= 2 * float((plain_loss - loss).abs()) + floor
    assert our_gradients.keys() == plain_gradients.keys() == expected.keys()
    ours_squared = plain_squared = 0.0
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        error, plain_error = (g[name] - gradient for g in (our_gradients, plain_gradients))
        ours_squared += float(error.square().sum())
        plain_squared += float(plain_error.square().sum())
        limit = 4 * float(plain_error.abs().max()) + 4 * eps * largest
        assert float(error.abs().max()) <= limit, name
    assert ours_squared <= 2**2 * plain_squared


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the order of fp32 sums over the 36 tokens, and what layers make of that."""
    assert ours.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=4 * 36 * 2**-24 * largest)


# ---------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", ["all", "uneven", "a row without labels", "one label"])
def test_loss_and_gradients_are_the_models_own(kind: str, pattern: str) -> None:
    """Not normalised per chunk, which uneven masks would show."""
    batch = batch_with(labels_of(pattern))
    truth = run_truth(build(kind, dtype=torch.float64), batch, masked=kind in MASKED)
    model = build(kind)
    assert_as_good(run_fused(model, batch), run_plain(model, batch), truth)


@pytest.mark.parametrize("kind", ["llama tied", "gemma2 capped", "bert masked"])
@pytest.mark.parametrize("accumulate", ["float32", "weight"])
def test_a_bf16_model(kind: str, accumulate: str) -> None:
    batch = batch_with(labels_of("uneven"))
    exact = build(kind, dtype=torch.bfloat16).double()
    truth = run_truth(exact, batch, masked=kind in MASKED)
    model = build(kind, dtype=torch.bfloat16)
    ours = run_fused(model, batch, spec=f"fused_loss(chunk_tokens=5, accumulate={accumulate!r})")
    assert {g.dtype for g in ours[1].values()} == {torch.bfloat16}
    assert_as_good(ours, run_plain(model, batch), truth, eps=2**-8)


@pytest.mark.parametrize("kind", ["llama", "gpt2 tied", "bert masked"])
def test_under_autocast(kind: str) -> None:
    batch = batch_with(labels_of("uneven"))
    truth = run_truth(build(kind, dtype=torch.float64), batch, masked=kind in MASKED)
    model = build(kind)
    ours, plain = (run(model, batch, autocast=True) for run in (run_fused, run_plain))
    assert float(plain[0]) != float(run_plain(model, batch)[0])  # autocast does something
    assert_as_good(ours, plain, truth, eps=2**-8)


@pytest.mark.parametrize("kind", ["llama", "bert masked", "modernbert masked"])
def test_a_batch_without_any_label_is_the_models_own_nan_and_zeros(kind: str) -> None:
    batch = batch_with(labels_of("none"))
    model = build(kind)
    (our_loss, ours), (loss, plain) = run_fused(model, batch), run_plain(model, batch)
    assert torch.isnan(our_loss)
    assert torch.isnan(loss)
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        assert torch.equal(ours[name], torch.zeros_like(gradient)), name
        assert torch.equal(gradient, torch.zeros_like(gradient)), name


# ---------------------------------------------------------------- arguments of the loss


@pytest.mark.parametrize("kind", ["llama", "modernbert masked"])
@pytest.mark.parametrize("num_items", [57, torch.tensor(57), torch.tensor(57.0)])
def test_the_number_of_items_divides(kind: str, num_items: int | Tensor) -> None:
    batch = {**batch_with(labels_of("uneven")), "num_items_in_batch": num_items}
    truth = run_truth(build(kind, dtype=torch.float64), batch, masked=kind in MASKED)
    model = build(kind)
    assert_as_good(run_fused(model, batch), run_plain(model, batch), truth)
    assert float(run_fused(model, batch)[0]) < float(
        run_fused(model, batch_with(labels_of("uneven")))[0]
    )


def test_a_model_that_does_not_divide_by_the_number_of_items_still_does_not() -> None:
    """transformers' BERT ignores it; a strategy must not change what is trained."""
    batch = {**batch_with(labels_of("uneven")), "num_items_in_batch": torch.tensor(57)}
    model = build("bert masked")
    ours, plain = run_fused(model, batch)[0], run_plain(model, batch)[0]
    assert float(ours) == pytest.approx(float(plain), rel=1e-6)


def test_without_labels_and_items_the_loss_is_zero() -> None:
    batch = {**batch_with(labels_of("none")), "num_items_in_batch": 7}
    loss, ours = run_fused(build("llama"), batch)
    assert float(loss) == 0.0
    assert not any(gradient.any() for gradient in ours.values())


def test_labels_that_are_shifted_already() -> None:
    labels = labels_of("uneven")
    shifted = functional.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    model = build("llama")
    usual = run_fused(model, batch_with(labels))
    given = {**batch_with(torch.full_like(labels, -100)), "shift_labels": shifted}
    ours, plain = run_fused(model, given), run_plain(model, given)
    assert torch.equal(ours[0], usual[0])
    assert_equal(ours[1], usual[1])
    assert float(plain[0]) == pytest.approx(float(ours[0]), rel=1e-6)


def test_another_index_to_ignore() -> None:
    labels = labels_of("uneven")
    model = build("llama")
    usual = run_fused(model, batch_with(labels))
    given = {**batch_with(labels.masked_fill(labels == -100, 2)), "ignore_index": 2}
    assert not (labels == 2).any()  # or the two would not be the same question
    ours = run_fused(model, given)
    assert torch.equal(ours[0], usual[0])
    assert_equal(ours[1], usual[1])


def test_labels_by_position() -> None:
    model, batch = build("llama"), batch_with(labels_of("uneven"))
    names = list(inspect.signature(transformers.LlamaForCausalLM.forward).parameters)[1:]
    assert "labels" in names
    values = [batch.get(name) for name in names[: names.index("labels") + 1]]
    expected = run_fused(model, batch)[0]
    memrt.prepare(model, [FUSED])
    output = model(*values)
    assert output.logits is None
    assert torch.equal(output.loss.detach(), expected)


def test_accumulation_over_micro_batches_is_one_batch() -> None:
    """The divisor is the window's number of labels, as transformers' Trainer gives it."""
    batch = batch_with(labels_of("uneven"))
    num_items = int((batch["labels"][:, 1:] != -100).sum())
    model = build("llama")
    whole_loss, whole = run_fused(model, batch)
    run = memrt.prepare(model, [FUSED])
    model.zero_grad()
    total = 0.0
    for row in range(3):
        with run.micro_batch(last=row == 2):
            part = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            loss = model(**part, num_items_in_batch=num_items).loss
            run.backward(loss)
            total += float(loss.detach())
    assert total == pytest.approx(float(whole_loss), rel=1e-6)
    assert_close(gradients(model), whole)


# ---------------------------------------------------------------- what trains


@pytest.mark.parametrize("kind", ["llama", "bert masked"])
@pytest.mark.parametrize("trains", ["body", "head"])
def test_frozen_parts_get_no_gradient_and_the_rest_the_same(kind: str, trains: str) -> None:
    batch = batch_with(labels_of("uneven"))
    model = build(kind)
    whole = run_fused(model, batch)[1]
    head = {id(p) for p in model.get_output_embeddings().parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_((id(parameter) in head) == (trains == "head"))
    ours, plain = run_fused(model, batch)[1], run_plain(model, batch)[1]
    assert 0 < len(ours) < len(whole)
    assert_close(ours, plain)
    if kind == "llama":  # BERT's head is its embedding, whose gradient is of two uses
        for name, gradient in ours.items():
            assert torch.equal(gradient, whole[name]), name


def test_router_losses_are_added_by_the_model() -> None:
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=4, output_router_logits=True)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).train()
    batch = batch_with(labels_of("uneven"))
    model.router_aux_loss_coef = 10.0
    plain_loss, plain = run_plain(model, batch)
    our_loss, ours = run_fused(model, batch)
    assert float(our_loss) == pytest.approx(float(plain_loss), rel=1e-6)
    assert float(plain_loss) > 20  # two of four experts: 2 at least, times ten
    assert_close(ours, plain)


# ---------------------------------------------------------------- bytes

WIDE = 1999
LONG = 64
TOKENS = 2 * LONG


def _largest(strategies: list[str]) -> int:
    """Of all storages that are born in forward and backward; the vocabulary's own are smaller."""
    model = model_of("llama", layers=2, vocab_size=WIDE)
    ledger = Ledger()
    with ledger:
        run = memrt.prepare(model, strategies, ledger=ledger)
        with run.micro_batch():
            start = ledger.timeline.now
            run.backward(model_loss(model, batch_of("llama", length=LONG)))
    return max(r.num_bytes for r in ledger.timeline.records if r.birth >= start)


def test_the_logits_never_exist() -> None:
    logits = TOKENS * WIDE * 4
    head = 32 * WIDE * 4
    assert _largest([]) >= logits
    assert _largest(["fused_loss(chunk_tokens=16)"]) == head
    assert head < logits / 3


def _peaks(strategies: list[str]) -> dict[str, int]:
    model = model_of("llama", layers=2, vocab_size=WIDE)
    timeline = counted(model, strategies, [batch_of("llama", length=LONG)])
    region = timeline.peak(where=lambda region: region.phase in ("forward", "backward"))
    return {"peak": region.peak_bytes}


def test_the_peak_falls_by_three_times_the_logits_less_a_chunk() -> None:
    """Logits, their log-softmax and their gradient; what remains is one chunk and the gradients.

    The head's gradient exists at the peak now, which it did not: hidden × vocabulary.
    """
    logits, chunk, head = TOKENS * WIDE * 4, 16 * WIDE * 4, 32 * WIDE * 4
    fallen = _peaks([])["peak"] - _peaks(["fused_loss(chunk_tokens=16)"])["peak"]
    assert 2 * logits - chunk - 2 * head < fallen <= 3 * logits


def test_nothing_of_a_micro_batch_stays() -> None:
    gc.collect()
    gc.disable()
    try:
        ledger = Ledger()
        with ledger:
            model = model_of("llama")
            run = memrt.prepare(model, [FUSED], ledger=ledger)
            live = []
            for step in range(4):
                with run.micro_batch():
                    run.backward(model_loss(model, batch_of("llama", seed=step)))
                run.step()
                now = ledger.timeline.now - 1
                live.append(ledger.timeline.breakdown(now).peak_bytes)
        assert len(set(live[1:])) == 1
    finally:
        gc.enable()


# ---------------------------------------------------------------- otherwise the model is as ever


@pytest.mark.parametrize("kind", ["llama", "gpt2 tied", "bert masked", "gemma2 capped"])
def test_evaluation_prediction_and_training_without_labels_have_logits(kind: str) -> None:
    model, batch = build(kind), batch_with(labels_of("uneven"))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}

    def outputs() -> list[Tensor]:
        model.eval()
        with torch.no_grad():
            evaluated = model(**batch)
            predicted = model(**inputs)
        model.train()
        return [evaluated.loss, evaluated.logits, predicted.logits, model(**inputs).logits.detach()]

    plain = outputs()
    run = memrt.prepare(model, [FUSED])
    with run.micro_batch():
        run.backward(model(**batch).loss)
    for ours, expected in zip(outputs(), plain, strict=True):
        assert torch.equal(ours, expected)


def test_generation_works_between_steps() -> None:
    model = build("llama")
    ids = torch.tensor([[5, 6, 7]])
    expected = model.eval().generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
    run = memrt.prepare(model.train(), [FUSED])
    with run.micro_batch():
        run.backward(model(**batch_with(labels_of("all"))).loss)
    observed = model.eval().generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(observed, expected)


@pytest.mark.parametrize("kind", ["llama", "bert masked", "modernbert masked"])
def test_what_else_a_model_returns_is_returned(kind: str) -> None:
    model, batch = build(kind), batch_with(labels_of("uneven"))
    plain = model(**batch, output_hidden_states=True)
    memrt.prepare(model, [FUSED])
    ours = model(**batch, output_hidden_states=True)
    assert "logits" not in ours
    assert len(ours.hidden_states) == len(plain.hidden_states) == 3
    for one, other in zip(ours.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(one, other)
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0].detach(), ours.loss.detach())


def test_the_signature_that_trainers_read_stays() -> None:
    model = build("llama")
    before = inspect.signature(model.forward)
    memrt.prepare(model, [FUSED])
    assert inspect.signature(model.forward) == before


def test_detaching_gives_the_model_back() -> None:
    model, batch = build("gpt2 tied"), batch_with(labels_of("all"))
    classes = [type(module) for module in model.modules()]
    run = memrt.prepare(model, [FUSED])
    assert [type(module) for module in model.modules()] != classes
    run.detach()
    assert [type(module) for module in model.modules()] == classes
    assert model(**batch).logits is not None


def test_a_wrapped_language_model_is_found() -> None:
    """As PEFT and containers hold it: the inner model's own forward gives the loss."""

    class Container(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.get_output_embeddings()

        def forward(self, **batch: Any) -> Any:
            return self.inner(**batch)

    model, batch = Container(build("llama")).train(), batch_with(labels_of("uneven"))
    plain = run_plain(model, batch)
    ours = run_fused(model, batch)
    assert float(ours[0]) == pytest.approx(float(plain[0]), rel=1e-6)
    run = memrt.prepare(model, [FUSED])
    with run.micro_batch():
        assert model(**batch).logits is None


# ---------------------------------------------------------------- refusals


def refusal(model: nn.Module, settings: RunSettings | None = None) -> str:
    with pytest.raises(ConflictError) as caught:
        Session(model, registry.parse_all(["fused_loss"]), settings=settings)
    assert not any("Interception" in type(module).__name__ for module in model.modules())
    return str(caught.value)


def test_a_classifier_is_refused() -> None:
    config = transformers.LlamaConfig(**GROUPED)
    message = refusal(transformers.LlamaForSequenceClassification(config))
    assert "LlamaForSequenceClassification has no language-model head" in message


def test_an_encoder_and_decoder_of_an_unknown_loss_is_refused() -> None:
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=VOCABULARY
    )
    message = refusal(transformers.BartForConditionalGeneration(config))
    assert "BartForConditionalGeneration" in message
    assert "computes its loss in a way of its own" in message


def test_a_causal_model_that_does_not_shift_its_labels_is_refused() -> None:
    config = transformers.BartConfig(
        d_model=32, decoder_layers=1, decoder_attention_heads=2, vocab_size=VOCABULARY
    )
    message = refusal(transformers.BartForCausalLM(config))
    assert "BartForCausalLM (loss_type='ForCausalLM') computes its loss in a way" in message


def test_a_plain_module_is_refused() -> None:
    assert "PlainModel has no language-model head" in refusal(model_of("plain"))


def test_a_forward_that_was_replaced_is_refused() -> None:
    model = build("llama")
    model.forward = model.forward  # type: ignore[method-assign]
    message = refusal(model)
    assert "LlamaForCausalLM.forward was replaced on this instance" in message
    assert "SFTTrainer" in message


def test_a_loss_function_that_was_replaced_is_refused() -> None:
    model = build("llama")
    model.loss_function = lambda *_, **__: torch.zeros(())
    assert "LlamaForCausalLM.loss_function was replaced on this instance" in refusal(model)


def test_a_head_that_is_no_plain_linear_layer_is_refused() -> None:
    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2.0

    model = build("llama")
    model.lm_head = Adapted(32, VOCABULARY)
    assert "the head 'lm_head' of LlamaForCausalLM is a Adapted, not a plain" in refusal(model)


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (["peft(rank=2, options={'modules_to_save': ['lm_head']})"], "trains a copy of it"),
        (["peft(rank=2, targets=['q_proj', 'lm_head'])"], "adapts the head 'lm_head'"),
        (["nf4(head=True)", "peft(rank=2)"], "packs the head 'lm_head'"),
    ],
)
def test_a_head_that_the_rest_of_the_stack_changes_is_refused(
    others: list[str], reason: str
) -> None:
    model = model_of("llama")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConflictError, match=reason):
        memrt.prepare(model, [*others, "fused_loss"])
    assert [type(module) for module in model.modules()] == kinds
    memrt.prepare(model, ["nf4", "peft(rank=2, targets=['q_proj'])", "fused_loss"])


def test_settings_that_need_logits_are_refused() -> None:
    smooth = refusal(build("llama"), RunSettings(label_smoothing=0.1))
    assert "label_smoothing_factor=0.1 needs logits" in smooth
    assert "compute_loss_func" in refusal(build("llama"), RunSettings(custom_loss=True))


@pytest.mark.parametrize("kind", ["cohere scaled", "gemma2 capped", "granite divided"])
def test_a_family_whose_logits_are_changed_in_an_unknown_way_is_an_error(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a wrong loss: without its row, a family's first loss says what is missing."""
    known = {name: Family() for name in FAMILIES}
    monkeypatch.setattr("memrt.structure.FAMILIES", known)
    model, batch = build(kind), batch_with(labels_of("all"))
    run = memrt.prepare(model, [FUSED])
    with (
        pytest.raises(ValueError, match=r"add its row to memrt\.structure\.FAMILIES"),
        run.micro_batch(),
    ):
        model(**batch)


@pytest.mark.parametrize("kind", ["cohere scaled", "gemma2 capped", "granite divided"])
def test_the_config_is_read_for_every_value(kind: str) -> None:
    """Another factor or cap gives another loss: the tests above do not hold by neutral values."""
    model, batch = build(kind), batch_with(labels_of("all"))
    run_plain(model, batch)
    loss = float(run_fused(model, batch)[0])
    for key in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if hasattr(model.config, key):
            setattr(model.config, key, 0.7)
        if hasattr(model, key):
            setattr(model, key, 0.7)
    changed, plain = float(run_fused(model, batch)[0]), float(run_plain(model, batch)[0])
    assert changed == pytest.approx(plain, rel=1e-6)
    assert abs(changed - loss) > 1e-2


def test_a_label_for_every_token_is_asked_for_and_an_error_leaves_nothing() -> None:
    model, batch = build("llama"), batch_with(labels_of("all"))
    expected = run_fused(model, batch)[0]
    memrt.prepare(model, [FUSED])
    with pytest.raises(ValueError, match="without logits_to_keep"):
        model(**batch, logits_to_keep=3)
    assert torch.equal(model(**batch).loss.detach(), expected)
    assert model.eval()(**batch).logits.shape == (3, 12, VOCABULARY)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fused_loss(chunk_tokens=0)", r"chunk_tokens=0: must be"),
        ("fused_loss(chunk_tokens=True)", r"chunk_tokens=True: must be"),
        ("fused_loss(accumulate='bf16')", r"accumulate='bf16': use one of float32, weight"),
    ],
)
def test_values_are_checked(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memrt.prepare(build("llama"), [spec])
