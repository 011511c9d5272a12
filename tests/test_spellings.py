"""Other projects' argument names: one table, and what each name means, wherever it is written."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

import pytest

from memrt import registry
from memrt.spellings import KEYS, OPTIMIZERS, PREFIXES, REFUSED_KEYS, is_spelling, options_of
from memrt.translation import translated


def run_of(keys: dict[str, Any], *, strategies: Any = None, **base: Any) -> list[str]:
    """The strategies that a file with these keys ends up with."""
    tree = dict(keys) if strategies is None else {**keys, "strategies": strategies}
    found: list[str] = translated(tree, base=base)["strategies"]
    return found


def test_the_table_names_options_that_exist() -> None:
    for key, spelling in KEYS.items():
        known = {each.name for each in fields(registry.strategy_class(spelling.strategy))}
        assert spelling.option is None or spelling.option in known, key
        assert spelling.source, key
        assert bool(spelling.values) == bool(spelling.why), key
        assert spelling.option or spelling.values, f"{key} says nothing"
    assert not KEYS.keys() & REFUSED_KEYS.keys()
    for strategy in PREFIXES:
        known = {each.name for each in fields(registry.strategy_class(strategy))}
        others = set(options_of(strategy))
        same = {name for name in others & known if options_of(strategy)[name].option != name}
        assert not same, f"{strategy}: {same} are memrt's names too, with another meaning"
    for optimizer in OPTIMIZERS.values():
        assert optimizer.defaults.keys() <= optimizer.options.keys()


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"use_galore": True}, ["galore(form='plain')"]),
        (
            {
                "galore_rank": 8,
                "galore_update_interval": 50,
                "galore_scale": 2.0,
                "galore_proj_type": "std",
                "galore_target": "q_proj, v_proj",
            },
            [
                "galore(rank=8, every=50, scale=2.0, targets=('q_proj', 'v_proj'), form='plain')",
            ],
        ),
        ({"galore_target": "all"}, ["galore(form='plain')"]),
        ({"galore_target": ["all"]}, ["galore(form='plain')"]),
        (
            {"use_galore": True, "galore_layerwise": True},
            ["galore(form='plain')", "in_backward(clip='two_pass')"],
        ),
        (
            {"galore_layerwise": True, "training": {"max_grad_norm": 0.0}},
            ["galore(form='plain')", "in_backward"],
        ),
        ({"use_galore": True, "galore_layerwise": False}, ["galore(form='plain')"]),
        (
            {"apollo_rank": 1, "apollo_scale_type": "tensor", "apollo_proj": "random"},
            ["apollo(rank=1, granularity='tensor')"],
        ),
        ({"qgalore_rank": 64, "qgalore_cos_threshold": 0.5}, ["q_galore(rank=64, lazy=0.5)"]),
        ({"qgalore_proj_quant": False}, ["q_galore(basis='float32')"]),
        (
            {"lisa_activated_layers": 3, "lisa_interval_steps": 5},
            ["lisa(layers=3, every=5)"],
        ),
        ({"lisa_n_layers": 3, "lisa_step_interval": 5}, ["lisa(layers=3, every=5)"]),
        ({"lisa_num_layers": 3, "lisa_n_layers": 3}, ["lisa(layers=3)"]),
        ({"lisa_train_embeddings": False}, ["lisa(embeddings=False)"]),
        (
            {"use_badam": True, "badam_mode": "layer", "badam_switch_mode": "descending"},
            ["badam(order='descending')"],
        ),
        ({"badam_switch_interval": 100, "badam_start_block": None}, ["badam(every=100)"]),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            ["nf4"],
        ),
        ({"model": {"load_in_8bit": True, "path": "x"}}, ["int8"]),
        ({"activation_offloading": True}, ["offload_activations"]),
        ({"training": {"activation_offloading": "disk"}}, ["offload_activations(place='disk')"]),
        ({"activation_offloading": False}, []),
        ({"loss_type": "chunked_nll"}, ["fused_loss"]),
        ({"training": {"loss_type": "nll"}}, []),
        ({"memory_strategies": ["lisa", {"galore": {"rank": 8}}]}, ["lisa", "galore(rank=8)"]),
        (
            {"training": {"optim": "galore_adamw", "optim_target_modules": "all-linear"}},
            ["galore(targets='all-linear', form='plain')"],
        ),
    ],
)
def test_a_key_means_a_strategy(
    keys: dict[str, Any], expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        rest = translated(keys, base={})
    assert rest["strategies"] == expected
    assert len(caplog.messages) == 1
    assert not [key for key in rest if is_spelling(key)]
    for section in ("model", "training"):
        left = set(rest.get(section, {}))
        assert left <= {"path", "max_grad_norm"}


def test_without_such_keys_nothing_changes(caplog: pytest.LogCaptureFixture) -> None:
    tree = {"strategies": ["lisa"], "training": {"optim": "adafactor"}, "model": None}
    assert translated(tree, base={}) == tree
    assert not caplog.messages


def test_what_strategies_says_already_is_not_said_twice() -> None:
    assert run_of({"galore_rank": 8}, strategies=["galore(rank=8)"]) == ["galore(rank=8)"]
    assert run_of({"use_galore": True}, strategies=["galore(rank=9)"]) == ["galore(rank=9)"]
    assert run_of({"load_in_4bit": True}, strategies=["peft"]) == ["peft", "nf4"]
    # a resumed run has them already
    base = {"strategies": ["galore(rank=8, form='plain')"], "training.max_grad_norm": 0.0}
    assert run_of({"galore_rank": 8}, **base) == base["strategies"]
    layerwise = run_of({"galore_rank": 8, "galore_layerwise": True}, **base)
    assert layerwise == [*base["strategies"], "in_backward"]


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"galore_proj_type": "full"}, "galore_proj_type='full': memrt keeps .* use 'std'"),
        ({"badam_mode": "ratio"}, "badam_mode='ratio': memrt trains whole blocks"),
        ({"badam_switch_mode": "fixed"}, "badam_switch_mode='fixed': a block that never changes"),
        ({"badam_update_ratio": 0.1}, "badam_update_ratio=0.1: memrt has no ratio mode"),
        ({"lisa_layers_attribute": "model.layers"}, "memrt finds the layers by structure"),
        ({"apollo_scale_front": True}, "apollo_scale_front=True: memrt limits the norm"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4': memrt has the normal"),
        ({"bnb_4bit_compute_dtype": "bfloat16"}, "memrt computes in the dtype"),
        ({"activation_offloading": "legacy"}, "activation_offloading='legacy'.* or 'disk'"),
        ({"loss_type": "dft"}, "loss_type='dft': .*; use 'chunked_nll' or 'nll'"),
        ({"offload_param": {"device": "cpu"}}, "no strategy that keeps weights off the device"),
        ({"use_galore": "yes"}, "use_galore='yes': must be true or false"),
        ({"galore_rank": 0}, "rank=0: must be a whole number"),
        (
            {"galore_update_interval": 5, "galore_update_proj_gap": 6},
            "galore_update_interval=5 and galore_update_proj_gap=6 are the same option",
        ),
        (
            {"lisa_n_layers": 3, "lisa_activated_layers": 2},
            "lisa_n_layers=3 and lisa_activated_layers=2 are the same option",
        ),
        ({"galore_rank": 8, "training": {"galore_rank": 9}}, "training.galore_rank=9: give one"),
        ({"galore_rank": 8, "use_galore": False}, "no effect with use_galore=False"),
        (
            {"galore_rank": 8, "strategies": ["galore(rank=9)"]},
            r"galore_rank=8: strategies has galore\(rank=9\) and this says rank=8",
        ),
        (
            {"memory_strategies": ["lisa"], "strategies": ["badam"]},
            "are the same setting; give strategies alone",
        ),
        (
            {"training": {"optim": "lomo"}, "strategies": ["lomo"]},
            r"training.optim='lomo' means lomo\(clip='two_pass'\), and strategies has lomo",
        ),
        ({"training": {"optim": "galore_adamw"}}, "needs optim_target_modules"),
    ],
)
def test_what_has_no_equivalent_or_clashes_is_refused(keys: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        translated(keys, base={})


def test_options_in_parentheses(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = registry.parse("galore(update_proj_gap=50, proj_type='std', rank=8)")
    assert str(found) == "galore(rank=8, every=50)"  # gradient-free: only names are others'
    (message,) = caplog.messages
    assert message.startswith("galore: update_proj_gap, proj_type: memrt's names are")
    for spec, expected in (
        ("lisa(n_layers=3, step_interval=5)", "lisa(layers=3, every=5)"),
        ("badam(switch_mode='ascending')", "badam(order='ascending')"),
        ("apollo(scale_type='tensor')", "apollo(granularity='tensor')"),
        ("nf4(quant_type='nf4')", "nf4"),
        ("galore(target='all')", "galore"),
        ("galore(every=7, update_interval=7)", "galore(every=7)"),
    ):
        assert str(registry.parse(spec)) == expected


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("galore(proj_type='left')", "galore: proj_type='left': memrt keeps"),
        (
            "galore(every=7, update_interval=8)",
            "galore: every=7 and update_interval=8 are the same",
        ),
        ("lisa(layers_attribute='h')", "memrt finds the layers by structure"),
        ("badam(update_ratio=0.1)", "memrt has no ratio mode"),
        ("galore(layerwise=True)", "has no option 'layerwise'"),
        ("lisa(update_interval=3)", "has no option 'update_interval'"),
        ("badam(rate=3)", "has no option 'rate'"),
    ],
)
def test_options_in_parentheses_that_are_refused(spec: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        registry.parse(spec)
