"""What `memrt.load` and `memrt plan` can be pointed at."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import transformers

from memrt.loading import auto_class, load, resolve_config
from memrt.model_source import hub_answers
from tests.tiny_models import CONFIGS, assert_equal_models


def test_a_config_object_is_itself() -> None:
    config = CONFIGS["llama"]()
    assert resolve_config(config) is config


@pytest.mark.parametrize("as_text", [True, False])
def test_a_folder_and_a_file(tmp_path: Path, as_text: bool) -> None:
    CONFIGS["gpt2"]().save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "config.json"):
        config = resolve_config(str(path) if as_text else path)
        assert type(config) is transformers.GPT2Config
        assert config.n_embd == 32


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as caught:
        resolve_config("nobody/nothing-here")
    text = str(caught.value)
    assert text.startswith("'nobody/nothing-here' is neither a local path nor reachable on the Hub")
    assert "\n" not in text


def test_a_hub_that_takes_no_connection_is_not_asked_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as closed:  # bound and not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        assert not hub_answers()
        closed.listen()
        assert hub_answers()
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
        assert hub_answers()  # nobody can tell


@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["single", "sharded"])
def test_a_hub_id_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--somebody--tiny"
    snapshot = cache / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("a" * 40)
    saved = transformers.LlamaForCausalLM(CONFIGS["llama"]()).eval()
    saved.config.save_pretrained(snapshot)
    assert resolve_config("somebody/tiny").hidden_size == 32
    with pytest.raises(ValueError, match=r"'somebody/tiny': no model\.safetensors"):
        load("somebody/tiny")
    saved.save_pretrained(snapshot, max_shard_size=shard)
    assert_equal_models(load("somebody/tiny"), saved)


@pytest.mark.parametrize("path", ["./no/such/folder", "a/b/c", "folder/", "", "~/model"])
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(ValueError, match="is not a local path"):
        resolve_config(path)


def test_things_that_are_no_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path_or_config=3: must be a path"):
        resolve_config(3)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither a folder nor a config\.json"):
        resolve_config(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{nope", r"config\.json: not a readable JSON file"),
        ("[1]", r"config\.json: holds a JSON list"),
        ("{}", r"model_type=None, which transformers does not know"),
        ('{"model_type": "lama"}', r"model_type='lama', which transformers does not know"),
        ('{"model_type": "llama", "hidden_size": "big"}', r"Validation error .*hidden_size"),
    ],
)
def test_a_config_that_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        resolve_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_in_a_config_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="pass trust_remote_code=True"):
        resolve_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("llama", "AutoModelForCausalLM"),
        ("gpt2", "AutoModelForCausalLM"),
        ("mixtral", "AutoModelForCausalLM"),
        ("bert", "AutoModelForMaskedLM"),
        ("modernbert", "AutoModelForMaskedLM"),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("bart", "AutoModelForSeq2SeqLM"),
        ("vit", "AutoModelForImageClassification"),
    ],
)
def test_what_a_family_is_for(family: str, auto: str) -> None:
    assert auto_class(CONFIGS[family]()) is getattr(transformers, auto)


@pytest.mark.parametrize(
    ("family", "architecture", "auto"),
    [
        ("bert", "BertForSequenceClassification", "AutoModelForSequenceClassification"),
        ("bert", "BertLMHeadModel", "AutoModelForCausalLM"),
        ("llama", "LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("llama", "LlamaForTokenClassification", "AutoModelForTokenClassification"),
        ("llama", "LlamaModel", "AutoModelForCausalLM"),
        ("bart", "BartForCausalLM", "AutoModelForCausalLM"),
    ],
)
def test_architectures_decide(family: str, architecture: str, auto: str) -> None:
    config = CONFIGS[family]()
    config.architectures = [architecture]
    assert auto_class(config) is getattr(transformers, auto)


def test_a_task_decides_over_architectures() -> None:
    config = CONFIGS["bert"]()
    config.architectures = ["BertForMaskedLM"]
    found = auto_class(config, "sequence-classification")
    assert found is transformers.AutoModelForSequenceClassification


def test_a_decoder_of_an_encoder_family() -> None:
    config: Any = transformers.BertConfig(is_decoder=True)
    assert auto_class(config) is transformers.AutoModelForCausalLM


def test_tasks_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"task='poetry': must be one of causal-lm, masked-lm"):
        auto_class(CONFIGS["llama"](), "poetry")
    with pytest.raises(ValueError, match=r"no such class for model_type 'llama' \(it has: causal"):
        auto_class(CONFIGS["llama"](), "masked-lm")
    with pytest.raises(ValueError, match=r"model_type 'vits' has no class for any of"):
        auto_class(transformers.VitsConfig())
