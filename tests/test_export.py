"""Export: what comes out loads in plain transformers and computes what the trained model did."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import nn

import memrt
from memrt import registry
from memrt.adapters import has_adapter_files
from memrt.checkpoint import SETTINGS_NAME, STATE_NAME
from memrt.errors import CheckpointWriteError
from memrt.export import export_checkpoint, export_run, strip
from memrt.export_source import Source
from memrt.packed_weights import packed_layers
from memrt.testing import tiny_batches
from tests.contract import SPECS, specs
from tests.trainer_runs import assert_equal, model_of, run, trainer_of, weights

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
RUN_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


def logits(model: Any) -> torch.Tensor:
    batch = tiny_batches("llama", seed=3)[0]
    with torch.no_grad():
        result: torch.Tensor = model.eval()(**batch)["logits"]
    return result


def check_folder(folder: Path, trainer: Any, expected: torch.Tensor) -> None:
    """Loads as the plain class, with the trained tensors, and no file of the run in it."""
    loaded = type(model_of("llama")).from_pretrained(folder)
    assert_equal(loaded.state_dict(), weights(trainer))
    assert torch.equal(logits(loaded), expected)
    names = {path.name for path in folder.iterdir()}
    assert not names & {*RUN_FILES, "training_args.bin", STATE_NAME, SETTINGS_NAME}
    assert not list(folder.parent.glob("_memrt-*"))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", sorted({*registry.names()} - {"ladder"}))
def test_every_strategy_exports_a_run_and_a_checkpoint(
    name: str, bf16: bool, tmp_path: Path
) -> None:
    trainer = run(tmp_path / "run", options={"strategies": specs([name])}, bf16=bf16, **SAVING)
    checkpoint = tmp_path / "run/checkpoint-2"
    base = model_of("llama") if has_adapter_files(checkpoint) else None
    export_checkpoint(checkpoint, tmp_path / "from_checkpoint", base=base)
    export_run(trainer, tmp_path / "from_run")
    model = trainer.model
    assert type(model) is type(model_of("llama"))
    assert "forward" not in vars(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    expected = logits(model)  # the stripped model itself runs, in training too
    model.train()(**tiny_batches("llama")[0])["loss"].backward()
    check_folder(tmp_path / "from_run", trainer, expected)
    check_folder(tmp_path / "from_checkpoint", trainer, expected)


def frozen_but(*parts: str) -> Any:
    """A model of which everything is frozen but these."""
    model = model_of("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
    return model


@pytest.mark.parametrize(
    ("spec", "trained", "num_packed"),
    [
        ("nf4", ("layers.2.", "norm"), 14),  # what trains of the linear weights stays dense
        ("int8", ("layers.2.", "norm"), 14),
        ("nf4(head=True)", ("norm", "embed_tokens"), 22),
        ("nf4(keep=['o_proj'])", ("norm",), 18),
    ],
)
def test_a_whole_checkpoint_unpacks_what_was_packed_and_no_more(
    spec: str, trained: tuple[str, ...], num_packed: int, tmp_path: Path
) -> None:
    options = {"strategies": [spec]}
    trainer = run(tmp_path / "run", model=frozen_but(*trained), options=options, **SAVING)
    assert len(packed_layers(trainer.model)) == num_packed
    expected = logits(trainer.model)
    checkpoint = tmp_path / "run/checkpoint-2"
    done = export_checkpoint(checkpoint, tmp_path / "plain", verify=True)
    assert done.num_unpacked == num_packed
    whole, _, num_unpacked = Source.open(checkpoint, base=None, task=None).stripped_model()
    assert num_unpacked == num_packed
    export_run(trainer, tmp_path / "from_run")
    for folder in (tmp_path / "plain", tmp_path / "from_run"):
        loaded = type(model_of("llama")).from_pretrained(folder)
        assert_equal(loaded.state_dict(), weights(trainer))
        assert_equal(whole.state_dict(), loaded.state_dict())
        assert torch.equal(logits(loaded), expected)


def test_a_ladder_says_how_its_side_network_is_written(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", options={"strategies": [SPECS["ladder"]]}, **SAVING)
    with pytest.raises(ValueError, match=r"memrt\.save_ladder"):
        export_checkpoint(tmp_path / "run/checkpoint-2", tmp_path / "from_checkpoint")
    with pytest.raises(ValueError, match=r"memrt\.save_ladder"):
        export_run(trainer, tmp_path / "from_run")
    assert trainer.session.attachments
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_plain_loop_s_session_is_exported_too(tmp_path: Path) -> None:
    model = model_of("gpt2")
    session = memrt.prepare(model, [SPECS["lisa"], SPECS["activation_checkpoint"]])
    batch = tiny_batches("gpt2")[0]
    session.train_micro_batch(lambda: model(**batch)["loss"])
    session.step()
    export_run(session, tmp_path / "plain")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert_equal(loaded.state_dict(), model.state_dict())


def test_a_trainer_without_strategies_is_exported_too(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", bf16=True, max_steps=1)
    assert trainer.session is None
    export_run(trainer, tmp_path / "plain")
    check_folder(tmp_path / "plain", trainer, logits(trainer.model))


def test_training_on_after_an_export_is_an_error(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", options={"strategies": [SPECS["lisa"]]}, max_steps=1)
    export_run(trainer, tmp_path / "plain")
    with pytest.raises(RuntimeError, match="make a new Trainer"):
        trainer.train()


def test_the_tokenizer_goes_along_with_all_its_chat_templates(tmp_path: Path) -> None:
    vocabulary = {f"t{index}": index for index in range(99)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")),
        unk_token="t0",
        pad_token="t1",
    )
    tokenizer.chat_template = {"default": "one", "tool_use": "other"}
    options = {"strategies": [SPECS["lisa"]], "processing_class": tokenizer}
    trainer = run(tmp_path / "run", options=options, **SAVING)
    export_checkpoint(tmp_path / "run/checkpoint-2", tmp_path / "from_checkpoint")
    export_run(trainer, tmp_path / "from_run")
    # adapters alone have no tokenizer, and their base has
    model_of("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run(tmp_path / "adapted", options={"strategies": [SPECS["peft"]]}, **SAVING)
    adapters = tmp_path / "adapted/checkpoint-2"
    export_checkpoint(adapters, tmp_path / "from_adapters", base=str(tmp_path / "base"))
    for folder in ("from_checkpoint", "from_run", "from_adapters"):
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.chat_template == tokenizer.chat_template


def test_a_checkpoint_of_transformers_is_exported_as_it_is(tmp_path: Path) -> None:
    trainer = run(tmp_path / "run", cls=transformers.Trainer, **SAVING)
    export_checkpoint(tmp_path / "run/checkpoint-2", tmp_path / "plain")
    check_folder(tmp_path / "plain", trainer, logits(trainer.model))


def test_strip_keeps_a_forward_that_was_the_model_s_own(tmp_path: Path) -> None:
    """As TRL's, under the wrapper that accelerate puts over it for bf16."""
    model = model_of("llama")
    inner = model.forward
    own = wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    model.forward = own
    options = {"strategies": [SPECS["lisa"]]}
    trainer = run(tmp_path, model=model, options=options, bf16=True, max_steps=1)
    assert model.forward is not own
    assert strip(trainer.session).forward is own


def test_what_cannot_be_exported_is_refused_before_the_run_ends(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, family="plain", options={"strategies": [SPECS["lisa"]]})
    with pytest.raises(ValueError, match="PlainModel is not a transformers model"):
        export_run(trainer, tmp_path / "out")
    assert trainer.session.attachments
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="is taken"):
        export_run(trainer, tmp_path / "full")
    with pytest.raises(ValueError, match="no such folder"):
        export_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no config\.json"):
        export_checkpoint(tmp_path / "full", tmp_path / "out")


def test_a_class_that_transformers_does_not_have_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    model.config.architectures = ["Elsewhere"]
    model.config.save_pretrained(tmp_path / "run")
    with pytest.raises(ValueError, match=r"\['Elsewhere'\].* is no class"):
        export_checkpoint(tmp_path / "run", tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(tmp_path / "run", options={"strategies": [SPECS["lisa"]]}, max_steps=1)

    def full(self: nn.Module, folder: Path, **_: Any) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        export_run(trainer, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("adapters", "name"),
    [
        ("peft(rank=2, targets=['q_proj', 'lm_head'])", "lm_head"),
        ("peft(rank=2, targets=['embed_tokens', 'lm_head'])", "model.embed_tokens"),  # each apart
        ("peft(rank=2, options={'modules_to_save': ['lm_head']})", "lm_head"),
        ("peft(rank=2, options={'modules_to_save': ['embed_tokens']})", "model.embed_tokens"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|tied):UserWarning")
def test_adapters_at_one_end_of_a_tied_weight_are_not_folded(adapters: str, name: str) -> None:
    """The other end would change with it, and what was trained would not be what is written."""
    model: Any = model_of("llama", tie_word_embeddings=True)
    session = memrt.prepare(model, [adapters], lr=1e-2)
    batch = tiny_batches("llama")[0]
    session.train_micro_batch(lambda: model(**batch).loss)
    session.step()
    before = logits(model)
    with pytest.raises(ValueError, match=rf"^{name}\.weight was adapted apart from .*is tied to"):
        strip(session)
    assert torch.equal(logits(model), before)  # nothing was folded
    session.detach()
    assert model.lm_head.weight is model.model.embed_tokens.weight
