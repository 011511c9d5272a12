"""`peft`: any configuration, PEFT's files, and what is refused before anything is touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import memrt
from memrt import registry
from memrt.adapters import adapter_layers, task_heads
from memrt.base_record import BASE_NAME, base_record
from memrt.errors import ConflictError
from memrt.export import export_checkpoint
from memrt.model_source import for_task
from memrt.packed_weights import packed_layers
from memrt.planning import plan
from memrt.runner import model_loss
from memrt.strategies.peft import Peft
from memrt.testing import FAMILIES, tiny_batches, tiny_model
from tests.test_planned_tasks import _counted
from tests.tiny_models import CONFIGS
from tests.trainer_runs import arguments, assert_same, history, model_of, run, saved_state, weights

pytestmark = pytest.mark.filterwarnings(  # PEFT asks transformers by a name of before
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

SAVING = {"save_strategy": "steps", "save_steps": 3}


def logits(model: Any, family: str = "llama") -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(**tiny_batches(family, seed=3)[0])["logits"]
    return result


def fresh(family: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return tiny_model(family).train()


# -------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "strategy",
    [
        registry.parse('peft(method="lora", rank=16, targets="all-linear")'),
        registry.parse("peft(rank=4, alpha=8, dropout=0.1, targets=['q_proj'])"),
        registry.parse("peft(method='ia3', options={'feedforward_modules': []})"),
        Peft(config=peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_rslora=True)),
        Peft(config=peft.LoHaConfig(r=2, target_modules={"q_proj"})),
        Peft(config={"peft_type": "LORA", "r": 5, "target_modules": "all-linear"}),
    ],
    ids=str,
)
def test_settings_survive_json(strategy: Peft) -> None:
    again = registry.from_json(json.loads(json.dumps(strategy.to_json())))
    assert again == strategy
    assert isinstance(again, Peft)
    assert again.build().to_dict() == strategy.build().to_dict()


def test_a_name_and_a_configuration_say_the_same() -> None:
    named = registry.parse("peft(rank=4, dropout=0.1, targets=['q_proj'])")
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj"])
    assert isinstance(named, Peft)
    assert named.build().to_dict() == Peft(config=config).build().to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("peft(method='lorra')", "unknown PEFT method 'lorra'.*lora"),
        ("peft(rank=0)", "rank=0"),
        ("peft(dropout=1.0)", "dropout=1.0"),
        ("peft(method='ia3', rank=3)", "rank=3: PEFT's ia3 has none"),
        ("peft(options={'rang': 3})", "unknown option of PEFT's LoraConfig 'rang'"),
        ("peft(options={'layers_pattern': 'h'})", "refuses these settings"),
        ("peft(rank=3, config={'peft_type': 'LORA'})", "rank=3 and config were given"),
        ("peft(config={'r': 3})", "has no peft_type"),
        ("peft(rank=16, options={'r': 4})", r"rank=16 and options=\{'r': 4\} say the same"),
        ("peft(method='adalora', rank=4, options={'init_r': 6})", "rank=4 and options=.*init_r"),
        ("peft(alpha=8, options={'lora_alpha': 64})", "alpha=8 and options=.*'lora_alpha': 64"),
        ("peft(dropout=0.1, options={'lora_dropout': 0.2})", "dropout=0.1 and options=.*0.2"),
        ("peft(targets=['q_proj'], options={'target_modules': ['v_proj']})", "targets=.* and opt"),
        ("peft(alpha=0)", "alpha=0: must be a number above 0"),
        ("peft(options={'lora_alpha': 0})", "options: lora_alpha=0: must be a number above 0"),
        ("peft(options={'r': 0})", "options: r=0: must be a whole number"),
        ("peft(rank=True)", "rank=True: must be a whole number"),
        ("peft(alpha='x')", "alpha='x': must be a number"),
        ("peft(dropout='x')", "dropout='x': must be a number"),
        ("peft(targets=5)", "targets=5: must be 'all-linear' or a list"),
        ("peft(targets=['q_proj', 3])", "targets=.*'q_proj', 3.*must be"),
        ("peft(method=3)", "method=3: must be a name, such as 'lora'"),
        ("peft(options=3)", "options=3: must be a dict"),
        ("peft(config=3)", "config=3: must be a PEFT configuration"),
        ("peft(config={'peft_type': 'NOPE'})", "unknown peft_type of config 'NOPE'.*LORA"),
        ("peft(config={'peft_type': 'LORA', 'bogus': 1})", "option of PEFT's LoraConfig 'bogus'"),
    ],
)
def test_bad_settings_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        registry.parse(spec)


def test_a_configuration_s_class_is_no_configuration() -> None:
    with pytest.raises(ValueError, match=r"config=<class .*LoraConfig.*must be a PEFT config"):
        Peft(config=peft.LoraConfig)


@pytest.mark.parametrize(
    ("spec", "rank", "alpha"),
    [
        ("peft", 8, 16),
        ("peft(rank=8)", 8, 16),
        ("peft(options={'r': 4})", 4, 8),
        ("peft(rank=4, alpha=4)", 4, 4),
        ("peft(rank=4, options={'lora_alpha': 6})", 4, 6),
        ("peft(options={'r': 4, 'lora_alpha': 6})", 4, 6),
    ],
)
def test_alpha_is_twice_the_rank_unless_it_is_given(spec: str, rank: int, alpha: int) -> None:
    strategy = registry.parse(spec)
    assert isinstance(strategy, Peft)
    assert (strategy.build().r, strategy.build().lora_alpha) == (rank, alpha)


def test_the_rank_of_adalora_is_the_one_that_it_reads() -> None:
    strategy = registry.parse("peft(method='adalora', rank=6, options={'total_step': 9})")
    assert isinstance(strategy, Peft)
    assert (strategy.build().init_r, strategy.build().lora_alpha) == (6, 12)


# -------------------------------------------------------------------- in the model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_and_gradients_of_get_peft_model(family: str) -> None:
    """The same start, loss and gradients as PEFT's own wrapper, from the same seed."""
    config = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
    ours, theirs = fresh(family), fresh(family)
    torch.manual_seed(1)
    session = memrt.prepare(ours, [Peft(config=peft.LoraConfig(**config))])
    torch.manual_seed(1)
    if family == "gpt2":
        config["fan_in_fan_out"] = True
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**config))
    batch = tiny_batches(family)[0]
    torch.manual_seed(2)
    with session.micro_batch():
        loss = model_loss(ours, batch)
        session.backward(loss)
    torch.manual_seed(2)
    expected = model_loss(wrapped, batch)
    expected.backward()
    assert torch.equal(loss, expected)
    found = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    wanted = {n.removeprefix("base_model.model."): p for n, p in wrapped.named_parameters()}
    assert found.keys() == {n for n, p in wanted.items() if p.requires_grad}
    for name, parameter in found.items():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, wanted[name].grad), name


@pytest.mark.parametrize(
    "spec",
    [
        "peft(method='ia3')",
        "peft(method='loha', rank=2)",
        "peft(method='lokr', rank=2)",
        "peft(method='oft', options={'oft_block_size': 0, 'r': 4})",
        "peft(method='hra', rank=2)",
        "peft(options={'use_dora': True})",
        "peft(options={'modules_to_save': ['lm_head'], 'bias': 'all'})",
        "peft(targets=['embed_tokens', 'q_proj'])",
    ],
)
def test_other_methods_train_and_leave(spec: str) -> None:
    model = fresh()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    session = memrt.prepare(model, [spec], lr=1e-2)
    losses = []
    for step in range(4):
        batch = tiny_batches("llama", seed=step % 2)[0]
        losses.append(float(session.train_micro_batch(lambda b=batch: model_loss(model, b))))  # type: ignore[misc]
        session.step()
    assert sum(losses[2:]) < sum(losses[:2])
    session.detach()
    assert [type(module) for module in model.modules()] == kinds
    assert [set(vars(module)) for module in model.modules()] == attributes
    found = model.state_dict()
    assert found.keys() == state.keys()
    trained = {"lm_head"} if "modules_to_save" in spec else set()
    for name in state:
        if name.partition(".")[0] not in trained:
            assert torch.equal(found[name], state[name]), name
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_methods_that_pass_over_packed_weights_train_there(method: str) -> None:
    """Each of the list in `memrt.adapter_methods`: a real gradient, and the codes stay."""
    model = fresh()
    session = memrt.prepare(model, ["nf4", f"peft(method='{method}')"], lr=1e-2)
    codes = {name: module.weight.clone() for name, module in packed_layers(model)}
    batch = tiny_batches("llama")[0]
    losses = []
    for _ in range(4):
        losses.append(float(session.train_micro_batch(lambda: model_loss(model, batch))))
        session.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(module.weight, codes[name]) for name, module in packed_layers(model))


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("stack", "message"),
    [
        (["peft(targets=['nope'])"], r"peft: PEFT cannot put LORA into Llama.*'nope'.* not found"),
        (["peft(method='vera')"], "peft: PEFT cannot put VERA into .*get_peft_model"),
        (["peft(method='prompt_tuning', options={'num_virtual_tokens': 3})"], "get_peft_model"),
        (
            ["nf4", "peft(options={'use_dora': True})"],
            "use_dora=True reads .* nf4 keeps them packed",
        ),
        (
            ["nf4", "peft(options={'init_lora_weights': 'pissa'})"],
            "init_lora_weights='pissa' reads",
        ),
        (["int8", "peft(method='hra')"], "PEFT's HRA reads or changes"),
        (["lisa", "peft"], "lisa and peft both own the active set"),
    ],
)
def test_refused_before_anything_is_touched(stack: list[str], message: str) -> None:
    model = fresh()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConflictError, match=message):
        memrt.prepare(model, stack)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_model_with_adapters_is_refused() -> None:
    model = peft.get_peft_model(fresh(), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ConflictError, match="has adapters already"):
        memrt.prepare(model, ["peft"])


def test_prompt_learning_goes_through_peft_itself(tmp_path: Path) -> None:
    """What the refusal says to do works: no strategy, PEFT's wrapper, memrt's Trainer."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = run(tmp_path, model=peft.get_peft_model(model_of("llama"), config), max_steps=2)
    assert trainer.state.global_step == 2


# -------------------------------------------------------------------- files


@pytest.mark.parametrize("stack", [["peft(rank=4)"], ["nf4", "peft(rank=4, dropout=0.1)"]], ids=str)
def test_checkpoints_are_pefts_own_and_resume_exactly(stack: list[str], tmp_path: Path) -> None:
    options = {"strategies": stack}
    whole = run(tmp_path / "run", options=options, **SAVING)
    checkpoint = tmp_path / "run/checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    resumed = run(tmp_path / "again", options=options, resume=str(checkpoint), **SAVING)
    assert_same(weights(resumed), weights(whole))
    assert_same(saved_state(resumed), saved_state(whole))
    assert history(resumed)[3:-1] == history(whole)[3:-1]  # the last is a mean over the process

    base = model_of("llama")
    if "nf4" in stack:
        memrt.prepare(base, ["nf4", "peft"]).detach()  # the rounded weights
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run/checkpoint-6")
    assert torch.allclose(logits(loaded), logits(whole.model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model_of("llama")), logits(whole.model))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = run(
        tmp_path,
        options={"strategies": ["peft(rank=4)"], "eval_dataset": None},
        learning_rate=1e-2,
        **SAVING,
    )
    trained = weights(trainer)
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-3")
    trainer._load_best_model()
    changed = [n for n, tensor in weights(trainer).items() if not torch.equal(tensor, trained[n])]
    assert changed
    assert all("lora_" in name for name in changed)


def test_adapters_of_another_rank_are_refused_on_resume(tmp_path: Path) -> None:
    run(tmp_path / "run", options={"strategies": ["peft(rank=4)"]}, **SAVING)
    with pytest.raises(
        ValueError, match=r"written with peft\(rank=4\), this run has peft\(rank=2\)"
    ):
        run(
            tmp_path / "again",
            options={"strategies": ["peft(rank=2)"]},
            resume=str(tmp_path / "run/checkpoint-3"),
        )


@pytest.mark.parametrize("overrides", [{"hidden": 64}, {"layers": 2}], ids=str)
def test_adapters_of_another_model_are_refused(overrides: dict[str, int], tmp_path: Path) -> None:
    options = {"options": {"strategies": ["peft(rank=4)"]}}
    run(tmp_path / "run", **options, **SAVING)
    checkpoint = tmp_path / "run/checkpoint-3"
    for message in ("were trained on another base", "holds adapters of another model or method"):
        other = model_of("llama", **overrides)
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "again", model=other, resume=str(checkpoint), **options)
        (checkpoint / BASE_NAME).unlink(missing_ok=True)  # then names and shapes alone tell


def test_an_export_without_a_base_says_what_to_give(tmp_path: Path) -> None:
    run(tmp_path / "run", options={"strategies": ["peft(rank=4)"]}, **SAVING)
    with pytest.raises(ValueError, match=r"base=None: .*adapters alone"):
        export_checkpoint(tmp_path / "run/checkpoint-3", tmp_path / "plain")


def test_the_base_that_the_adapters_name_is_found(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "base")  # type: ignore[operator]
    model = memrt.load(tmp_path / "base")
    trainer = run(tmp_path / "run", model=model, options={"strategies": ["peft(rank=4)"]}, **SAVING)
    export_checkpoint(tmp_path / "run/checkpoint-6", tmp_path / "plain")
    plain = type(model).from_pretrained(tmp_path / "plain")  # type: ignore[attr-defined]
    assert torch.allclose(logits(plain), logits(trainer.model), rtol=1e-5, atol=1e-5)


def test_a_method_that_cannot_be_folded_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError("not this one")

    model = fresh()
    session = memrt.prepare(model, ["peft(targets=['q_proj'])"])
    assert len(adapter_layers(model)) == 4
    monkeypatch.setattr(peft.tuners.lora.Linear, "merge", refuse)
    with pytest.raises(ValueError, match=r"not this one.*PeftModel\.from_pretrained"):
        session.export()


# -------------------------------------------------------------------- a task's head

CLASSES = "sequence-classification"
IDS = torch.arange(3, 35).reshape(4, 8)


def of_a_task(family: str, task: str, **fields: Any) -> Any:
    config = CONFIGS[family]()
    config.update({"num_labels": 3, "pad_token_id": 0, **fields})
    return memrt.load(for_task(config, task), seed=0)


@pytest.mark.parametrize(
    ("family", "task", "heads"),
    [
        ("llama", CLASSES, ["score"]),
        ("gpt2", "token-classification", ["classifier"]),
        ("bert", CLASSES, ["bert.pooler", "classifier"]),
        ("bert", "question-answering", ["qa_outputs"]),
        ("t5", CLASSES, ["classification_head"]),
        ("vit", "image-classification", ["classifier"]),
        ("llama", "causal-lm", []),
        ("bert", "masked-lm", []),
    ],
)
def test_the_head_of_a_task_is_found_with_adapters_and_without(
    family: str, task: str, heads: list[str]
) -> None:
    model = of_a_task(family, task)
    assert task_heads(model) == heads
    memrt.prepare(model, ["peft(rank=2)"])
    assert task_heads(model) == heads
    adapted = [name for name, _ in adapter_layers(model)]
    assert adapted
    assert not any(name.startswith(head) for name in adapted for head in heads)
    whole = {name.partition(".modules_to_save.")[0] for name in trained_copies_of(model)}
    assert whole == set(heads)


def trained_copies_of(model: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".modules_to_save." in name
    ]


@pytest.mark.parametrize(
    "strategy",
    [
        Peft(rank=2, options={"modules_to_save": ["norm"]}),
        Peft(rank=2, options={"modules_to_save": []}),
        Peft(rank=2, targets=["q_proj", "score"]),
        Peft(config=peft.LoraConfig(r=2, target_modules=["q_proj", "score"])),
    ],
    ids=str,
)
def test_what_a_user_says_of_the_head_stays(strategy: Peft) -> None:
    model = of_a_task("llama", CLASSES)
    config = strategy.build()
    memrt.prepare(model, [strategy])
    assert not any("score" in name for name in trained_copies_of(model))
    assert strategy.build_for(model).modules_to_save == config.modules_to_save


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_plan_of_a_classifier_s_adapters_equals_the_ledger(family: str, dtype: str) -> None:
    config = CONFIGS[family]()
    config.update({"pad_token_id": 0, "dtype": dtype})
    stack = ["peft(rank=2)"]
    planned = plan(config, stack, task=CLASSES, batch_size=2, sequence_length=16)
    peak, maxima, outside = _counted(for_task(config, CLASSES), stack, planned.shape)
    found = planned.simulation.peak
    assert (found.peak_bytes, found.accounts) == (peak.peak_bytes, peak.accounts)
    assert planned.simulation.account_maxima == maxima
    assert planned.simulation.outside == outside


def classified(folder: Path, base: Path, *, seed: int, strategy: Any, **options: Any) -> Any:
    """A run on a base that has no head: every load draws another one."""
    torch.manual_seed(seed)
    model = options.pop("model", None)
    if model is None:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    rows = torch.randint(3, 90, (24, 8), generator=torch.Generator().manual_seed(5))
    data = [{"input_ids": row, "labels": row[0] % 3} for row in rows]
    resume = options.pop("resume", None)
    trainer = memrt.Trainer(
        model=model,
        args=arguments(folder, **{**SAVING, "learning_rate": 3e-2, **options}),
        train_dataset=data,
        strategies=strategy,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def classes_of(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits
    return result


@pytest.mark.parametrize(
    ("family", "stack"), [("llama", ["nf4", "peft(rank=4)"]), ("bert", ["peft(rank=4)"])]
)
def test_a_new_head_trains_is_saved_resumed_and_exported(
    family: str, stack: list[str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    config = CONFIGS[family]()
    config.update({"pad_token_id": 0})
    memrt.load(config, seed=0).save_pretrained(base)  # type: ignore[operator]
    whole = classified(tmp_path / "run", base, seed=1, strategy=stack)
    expected = classes_of(whole.model)
    resumed = classified(
        tmp_path / "on",
        base,
        seed=2,
        strategy=stack,
        resume=str(tmp_path / "run/checkpoint-3"),
    )
    assert torch.equal(classes_of(resumed.model), expected)
    assert_same(saved_state(resumed), saved_state(whole))

    checkpoint = tmp_path / "run/checkpoint-6"
    torch.manual_seed(3)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    if "nf4" in stack:
        memrt.prepare(other, ["nf4", "peft"]).detach()  # the rounded weights
    assert not torch.allclose(classes_of(other), expected, rtol=1e-2, atol=1e-2)
    loaded = peft.PeftModel.from_pretrained(other, checkpoint)
    assert torch.allclose(classes_of(loaded), expected, rtol=1e-5, atol=1e-5)
    done = export_checkpoint(checkpoint, tmp_path / "plain", base=base, task=CLASSES, verify=True)
    assert done.check is not None
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert torch.allclose(classes_of(plain), expected, rtol=1e-5, atol=1e-5)


def test_the_names_of_the_classes_survive_an_export(tmp_path: Path) -> None:
    """And the padding of a decoder, without which its head takes no batch."""
    base = tmp_path / "base"
    memrt.load(CONFIGS["llama"](), seed=0).save_pretrained(base)  # type: ignore[operator]
    assert transformers.AutoConfig.from_pretrained(base).pad_token_id is None
    names = {0: "bad", 1: "fair", 2: "good"}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, id2label=names, label2id={name: index for index, name in names.items()}
    )
    model.config.pad_token_id = 0
    trainer = classified(tmp_path / "run", base, seed=1, strategy=["peft(rank=2)"], model=model)
    checkpoint = tmp_path / "run/checkpoint-6"
    export_checkpoint(checkpoint, tmp_path / "plain", base=base, task=CLASSES, verify=True)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert plain.config.id2label == names
    assert plain.config.label2id == {name: index for index, name in names.items()}
    assert plain.config.problem_type == trainer.model.config.problem_type is not None
    assert plain.config.pad_token_id == 0
    expected = classes_of(trainer.model)
    assert torch.allclose(classes_of(plain), expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_is_left_out_on_purpose_belongs_to_the_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    memrt.load(CONFIGS["llama"](), seed=0).save_pretrained(base)  # type: ignore[operator]
    few = {"per_device_train_batch_size": 1}
    strategy = [Peft(config=peft.LoraConfig(r=2, target_modules=["q_proj"]))]
    whole = classified(tmp_path / "run", base, seed=1, strategy=strategy, **few)
    more = {**few, "resume": str(tmp_path / "run/checkpoint-3")}
    assert base_record(whole.model).head == ("score.weight",)
    same = classified(tmp_path / "on", base, seed=1, strategy=strategy, **more)
    assert torch.equal(same.model.score.weight, whole.model.score.weight)
    with pytest.raises(ValueError, match=r"trained on another base .* biases or the head differ"):
        classified(tmp_path / "other", base, seed=2, strategy=strategy, **more)
    whole.model.eval()
    kind = transformers.LlamaForSequenceClassification
    torch.manual_seed(1)
    kind.from_pretrained(base, num_labels=3).save_pretrained(tmp_path / "right")
    kind.from_pretrained(base, num_labels=3).save_pretrained(tmp_path / "wrong")
    checkpoint = tmp_path / "run/checkpoint-6"
    export_checkpoint(checkpoint, tmp_path / "plain", base=tmp_path / "right", verify=True)
    with pytest.raises(ValueError, match=r"trained on another base .* or the head differ"):
        export_checkpoint(checkpoint, tmp_path / "bad", base=tmp_path / "wrong")
