"""Other projects' keys in the YAML and on the command line of `memrt train`."""

from __future__ import annotations

from pathlib import Path

import pytest

from memrt.cli.train_config import TrainConfig, resolve


def test_file_and_words_give_the_same_tree(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "training: {galore_rank: 8, optim: apollo_adamw, learning_rate: 1e-3}\n"
        "lisa_interval_steps: 5\n"
    )
    with pytest.raises(ValueError, match="optim='apollo_adamw' needs optim_target"):
        resolve(str(file), [])
    file.write_text("training: {galore_rank: 8}\ngalore_update_interval: 50\n")
    by_file = resolve(str(file), [])
    by_words = resolve(None, [("galore_rank", ["8"]), ("training.galore-update-interval", ["50"])])
    assert by_file.values == by_words.values
    assert by_file.values["strategies"] == ["galore(rank=8, every=50, form='plain')"]
    # words win over the file
    assert resolve(str(file), [("training.galore_rank", ["16"])]).values["strategies"] == [
        "galore(rank=16, every=50, form='plain')"
    ]


def test_optim_becomes_strategies_and_the_file_that_is_written_says_so(tmp_path: Path) -> None:
    config = resolve(
        None,
        [
            ("optim", ["galore_adamw_layerwise"]),
            ("optim_args", ["rank=4,update_proj_gap=20"]),
            ("optim_target_modules", ["all-linear"]),
            ("max_grad_norm", ["0.5"]),
        ],
    )
    expected = [
        "galore(rank=4, every=20, targets='all-linear', form='plain')",
        "in_backward(clip='two_pass')",
    ]
    assert config.values["strategies"] == config.arguments.strategies == expected
    assert "training.optim" not in config.values
    written = tmp_path / "written.yaml"
    written.write_text(config.to_yaml())
    again = TrainConfig.from_yaml(written)
    assert again.values == config.values
    # resumed with the same words
    resumed = resolve(
        None,
        [
            ("optim", ["galore_adamw_layerwise"]),
            ("optim_args", ["rank=4,update_proj_gap=20"]),
            ("optim_target_modules", ["all-linear"]),
        ],
        base=again,
    )
    assert resumed.values == config.values


def test_refused_and_unknown_keys() -> None:
    with pytest.raises(ValueError, match="lisa_layers_attribute='h': memrt finds"):
        resolve(None, [("lisa_layers_attribute", ["h"])])
    with pytest.raises(ValueError, match=r"unknown key 'data\.galore_rank'"):
        resolve(None, [("data.galore_rank", ["8"])])
    with pytest.raises(ValueError, match="unknown key 'galore_rnk'"):
        resolve(None, [("galore_rnk", ["8"])])
