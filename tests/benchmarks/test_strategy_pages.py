"""Pages from docstrings: nothing lost, nothing broken by Markdown, bytes from the plans' file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cards, generated_pages, strategy_pages
from benchmarks.cards import MODELS, PARTNERED, REFERENCE, STACKS
from memrt.cli.stacks import parse_stack
from memrt.compatibility import Compatibility, buildable, facts_of_kinds, survey
from memrt.profiling.accounts import Account
from memrt.registry import strategy_class

NAMES = generated_pages.built_in()
GIB = 2**30


@pytest.fixture(scope="module")
def matrix() -> Compatibility:
    strategies, unbuilt = buildable(["badam", "fused_loss", "galore", "lisa"])
    return survey(strategies, facts_of_kinds(), unbuilt=unbuilt)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_is_explained(name: str) -> None:
    cls = strategy_class(name)
    described = strategy_pages.options(cls)
    prose = " ".join((each.__doc__ or "") for each in cls.__mro__)
    unsaid = [
        each.name
        for each in fields(cls)
        if each.name not in described and f"`{each.name}`" not in prose
    ]
    assert not unsaid, f"say what {', '.join(unsaid)} is in the docstring of {cls.__name__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """Words of a docstring that carry what a page has to say; None: no equation of its own."""

    equation: str | None = None
    num_bytes: str
    cost: str
    source: str


_TWO_PASS = "a second backward pass"
SAID = {
    "activation_checkpoint": Said(
        num_bytes="`tokens × hidden` elements (its input) are kept",
        cost="Costs one more forward of the checkpointed layers (about a third of a step)",
        source="Chen et al. 2016, arXiv 1604.06174",
    ),
    "adalomo": Said(
        equation="(`memrt.optimizers.adalomo` has the formula)",
        num_bytes="4 (rows + columns) bytes in place of AdamW's 8 rows columns",
        cost="costs three sweeps over a gradient in place of one",
        source="Lv et al. 2023, arXiv 2310.10195",
    ),
    "apollo": Said(
        equation="W ← W (1 - lr·wd) - lr·sqrt(scale)·limit(dW·diag(‖N_j‖ / ‖R_j‖))",
        num_bytes="moments 8 n r (2.03 n r with `int8_states`) in place of 8 m n",
        cost="the sketch, 2 m n r operations a weight and step",
        source="Zhu et al. 2024, arXiv 2412.05270",
    ),
    "apollo_mini": Said(
        equation="W ← W (1 - lr·wd) - lr·sqrt(128)·limit(dW·‖N‖ / ‖R‖)",
        num_bytes="moments 8 n in place of 8 m n",
        cost="2 m n operations a weight and step",
        source="Zhu et al. 2024, arXiv 2412.05270",
    ),
    "badam": Said(
        num_bytes="AdamW's state is 8 B bytes and never more",
        cost="on average the backward pass is half as long",
        source="Luo et al. 2024, arXiv 2404.02827",
    ),
    "fira": Said(
        equation="W ← W (1 - lr·wd) - lr·(scale·P N + residual_scale·limit(E diag(phi)))",
        num_bytes="basis 4 m r, moments 8 n r",
        cost="two products with P, 4 m n r operations a weight and step",
        source="Chen et al. 2024, arXiv 2410.01623",
    ),
    "fp8_states": Said(
        equation="Formula: `memrt.kernels.adamw_fp8`",
        num_bytes="2 × (1 + 5/128) = 2.08 bytes a parameter instead of 8",
        cost="Costs a rounding of the moments every step",
        source="Xi et al. 2024, arXiv 2410.19313",
    ),
    "fused_lora": Said(
        equation="y + (alpha / r) (M ∘ x) Aᵀ Bᵀ",
        num_bytes="about 16 units",
        cost="Costs 2 · in · r operations a token and layer",
        source="Hu et al. 2021, arXiv 2106.09685",
    ),
    "fused_loss": Said(
        num_bytes="from about 3 × tokens × vocabulary × 4 bytes",
        cost="Costs no product more",
        source="Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989",
    ),
    "galore": Said(
        equation="W ← W (1 - lr·wd) - lr·scale·P N",
        num_bytes="basis 4 m r",
        cost="2 r (m + n) a token in place of dW's 2 m n, 2 m n r a step for P N",
        source="Zhao et al. 2024, arXiv 2403.03507",
    ),
    "in_backward": Said(
        num_bytes="4 (n_1 + n_2 + ...) bytes to about 4 max(n_i)",
        cost=_TWO_PASS,
        source="Lv et al. 2023, arXiv 2306.09782",
    ),
    "int4_states": Said(
        equation="Formula: `memrt.kernels.adamw_int4`",
        num_bytes="2 × (1/2 + 4/128) = 1.06 bytes a parameter instead of 8",
        cost="Costs a coarse rounding of the moments every step",
        source="Li, Chen and Zhu 2023, arXiv 2309.01507",
    ),
    "int8": Said(
        equation="W_i ~ code * max |W_i| / 127",
        num_bytes="1 + 4 / in bytes a weight",
        cost="Costs time and saves none: each product makes its dense weight",
        source="After Dettmers et al. 2022 (LLM.int8()), arXiv 2208.07339",
    ),
    "int8_states": Said(
        num_bytes="8 to 2 × (1 + 4/256) = 2.03 bytes a parameter",
        cost="Costs a rounding of the moments every step",
        source="Dettmers et al. 2021, arXiv 2110.02861",
    ),
    "ladder": Said(
        equation="Z = g_i S + (1 - g_i) down_i(H_i), S <- block_i(Z)",
        num_bytes="nothing; the side's blocks keep about 19 side",
        cost="A step costs a forward of the backbone and about 3/reduction² more",
        source="Sung et al. 2022, arXiv 2206.06522",
    ),
    "lisa": Said(
        equation="T = (parameters outside the layers) + `layers` × (parameters of a layer)",
        num_bytes="AdamW's state is 8 T bytes and never more",
        cost="Costs nothing in time",
        source="Pan et al. 2024, arXiv 2403.17919",
    ),
    "lomo": Said(
        equation="W <- W (1 - lr weight_decay) - lr G",
        num_bytes="4 n_max bytes (2 in bf16) in place of 4 n",
        cost=_TWO_PASS,
        source="Lv et al. 2023, arXiv 2306.09782",
    ),
    "nf4": Said(
        equation="W ~ level[code] * scale",
        num_bytes="0.516 bytes a weight",
        cost="Costs a pass over the weight for each product",
        source="Dettmers et al. 2023 (QLoRA), arXiv 2305.14314",
    ),
    "offload_activations": Said(
        num_bytes="Host memory grows by the same bytes",
        cost="traffic is the saved bytes times two or more",
        source="PyTorch's `torch.autograd.graph.save_on_cpu`",
    ),
    "peft": Said(
        equation="y = x Wᵀ + (alpha / r) x Aᵀ Bᵀ",
        num_bytes="16 · r · (in + out) bytes a layer in fp32",
        cost="costs 6 r (in + out) operations a token and layer",
        source="Hu et al. 2021 (LoRA), arXiv 2106.09685",
    ),
    "q_galore": Said(
        num_bytes="basis (1/2 + 4/256) m r, moments 2.03 n r",
        cost="Costs what `galore` does",
        source="Zhang et al. 2024, arXiv 2407.08296",
    ),
}
"""What every page says; reworded there, it is reworded here, and cannot be lost by an edit."""


@pytest.mark.parametrize("name", NAMES)
def test_every_docstring_has_its_equation_bytes_cost_and_source(name: str) -> None:
    text = " ".join(" ".join(strategy_pages._paragraphs(strategy_class(name))).split())
    for field in fields(Said):
        words = getattr(SAID[name], field.name)
        assert words is None or words in text, f"{name} lost its {field.name}: {words}"


def test_what_a_docstring_is_asked_for_is_what_it_should_say() -> None:
    assert list(SAID) == sorted(NAMES)
    for name, said in SAID.items():
        assert re.search(r"\d|bytes|elements", said.num_bytes), name
        assert re.search(r"[Cc]osts|operations|pass|traffic|token", said.cost), name
        assert re.search(r"arXiv \d{4}\.\d{5}|PyTorch's", said.source), name
        formula = said.equation
        assert formula is None or re.search("[=←~+]|<-|ormula", formula), name


def test_every_page_has_the_bytes_of_a_plan() -> None:
    """Alone or, where it does not run alone, beside what it needs."""
    for name in NAMES:
        shown = strategy_pages._bytes(name)
        assert re.search(r"\| \*\*peak\*\* \| [\d.,]+ \| [\d.,]+ \|", shown), name
        partnered = PARTNERED.get(name)
        assert partnered is None or f"`{partnered.stack}` against" in shown, name
    for name, partnered in PARTNERED.items():
        assert name in {each.name for each in parse_stack([partnered.stack]).strategies}
        assert partnered.without in {"none", *NAMES, *dict(STACKS)} - PARTNERED.keys()


def test_a_page_says_what_the_docstring_says(matrix: Compatibility) -> None:
    page = strategy_pages.strategy_page("galore", matrix)
    assert page.startswith("# galore\n\n**GaLore without the gradient: AdamW in a rank-r subspace")
    assert "arXiv 2403.03507" in page
    assert "| `rank` | `128` | of the subspace." in page
    assert "| lowers | gradients, optimizer |" in page
    assert "| breaks | a weight's full gradient exists |" in page
    assert "; fsdp needs that a weight's full gradient exists, which galore breaks" in page
    partners = ", ".join(f"[`{name}`]({name}.md)" for name in ("badam", "fused_loss", "lisa"))
    assert f"Together with: {partners}." in page
    refused = strategy_pages.strategy_page("lisa", matrix)
    assert "| [`badam`](badam.md) | all | badam and lisa both own the active set" in refused


def test_stars_and_brackets_mean_themselves() -> None:
    shown = strategy_pages._prose("8 * m * n, rank<m, a_b and `x * <y>`")
    assert shown == r"8 \* m \* n, rank&lt;m, a\_b and `x * <y>`"
    block = strategy_pages._paragraph("Then\n    y = x * W\nfollows.")
    assert block == "Then\n\n```text\ny = x * W\n```\n\nfollows."


def _row(size: str, stack: str, peak: int) -> dict[str, Any]:
    return {
        "model": size,
        "stack": stack,
        "reason": None,
        "peak_bytes": peak,
        "accounts": {account.value: peak // 5 for account in Account},
        "place_peaks": {"device": peak, "host": 2 * GIB, "disk": 0},
        "region": {"step": 1, "phase": "backward", "module": ""},
        "device_bytes": {"low": peak, "expected": peak, "high": peak},
    }


def test_the_first_stack_that_fits_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: Compatibility
) -> None:
    file = tmp_path / "cards.json"
    monkeypatch.setattr(strategy_pages, "FILE", file)
    assert "Not planned yet" in strategy_pages.cards_page()
    assert "Not planned yet" in strategy_pages.strategy_page("lisa", matrix)
    sizes = {stack: (10 - index) * 4 * GIB for index, (stack, _) in enumerate(STACKS)}
    rows = [_row(size, stack, peak) for size in MODELS for stack, peak in sizes.items()]
    rows.append(_row(REFERENCE, "lisa", 15 * GIB))
    conditions = {
        "date": "2026-01-02T",
        "commit": "abc",
        "packages": {"torch": "2", "transformers": "5"},
    }
    file.write_text(json.dumps({"rows": rows, "conditions": conditions}))
    page = strategy_pages.cards_page()
    cells = dict.fromkeys(MODELS, "1 (40.00 GiB)")
    assert f"| 80 GiB (A100, H100) | {' | '.join(cells.values())} |" in page
    assert "| 24 GiB (RTX 4090, A10, L4) | 6 (20.00 GiB) |" in page
    assert "| 8 GiB | 9 (8.00 GiB) |" in page
    assert "| 9 | 8.0 + 2.0 on the host |" in page
    shown = strategy_pages.strategy_page("lisa", matrix)
    assert "| **peak** | 40.0 | 15.0 |" in shown
    assert "Not planned yet" in strategy_pages._bytes("nf4")
    rows += [_row(REFERENCE, "peft", 30 * GIB), _row(REFERENCE, "nf4+peft", 10 * GIB)]
    file.write_text(json.dumps({"rows": rows, "conditions": conditions}))
    assert "| **peak** | 30.0 | 10.0 |" in strategy_pages._bytes("nf4")
    assert "`nf4+peft` against `peft`" in strategy_pages._bytes("nf4")
    rows.append({"model": REFERENCE, "stack": "int8+peft", "reason": "why"})
    file.write_text(json.dumps({"rows": rows, "conditions": conditions}))
    with pytest.raises(ValueError, match=r"int8\+peft does not run"):
        strategy_pages._bytes("int8")


def test_the_stacks_are_stacks() -> None:
    for stack, what in STACKS:
        parse_stack([stack])
        assert what
    assert cards.STACKS[0][0] == "none"


@pytest.mark.slow
def test_a_committed_row_is_what_is_planned_now() -> None:
    if not cards.FILE.is_file():
        pytest.skip("benchmarks/results/cards.json is not there; run python -m benchmarks.cards")
    rows = json.loads(cards.FILE.read_text("utf-8"))["rows"]
    committed = {(row["model"], row["stack"]): row for row in rows}
    for stack in ("none", "activation_checkpoint+fused_loss+int8_states"):
        assert cards.planned("8B", stack) == committed[("8B", stack)], (
            "run python -m benchmarks.cards, then python -m benchmarks.tables"
        )


def test_a_page_of_a_strategy_that_is_gone_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generated_pages, "pages", lambda: {"docs/strategies/lisa.md": "new"})
    (tmp_path / "docs/strategies").mkdir(parents=True)
    (tmp_path / "docs/strategies/lisa.md").write_text("old")
    (tmp_path / "docs/strategies/gone.md").write_text("old")
    stale = ["docs/strategies/gone.md", "docs/strategies/lisa.md"]
    assert generated_pages.refresh(tmp_path, check=True) == stale
    assert generated_pages.refresh(tmp_path, check=False) == stale
    assert (tmp_path / "docs/strategies/lisa.md").read_text() == "new"
    assert not (tmp_path / "docs/strategies/gone.md").exists()
    assert generated_pages.refresh(tmp_path, check=True) == []
