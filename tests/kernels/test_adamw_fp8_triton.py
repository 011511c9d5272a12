"""The Triton kernel of the FP8 AdamW step: interpreted on the CPU, and compiled for four GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from memrt.kernels.adamw_fp8 import adamw_fp8
from memrt.kernels.expanded_fp8 import decoding_table, num_groups
from tests.kernels.adamw_fp8_cases import KEY, call_of, copy_of, new_state
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted
from tests.kernels.traffic import counted_traffic

pytest.importorskip("triton", reason="Triton is not installed")

SCALARS = ("decay", "step_size", "beta1", "rest1", "beta2", "rest2", "correction", "eps")
# 4 warps of 80 registers a thread leave room for 6 programs on a multiprocessor
MAX_REGISTERS = 80


def test_the_interpreted_kernel_has_the_codes_of_the_reference() -> None:
    """fp32, fp16 and bf16; ragged, rounded stochastically, with gradients that are not numbers."""
    calls = [
        call_of(5001, dtype=torch.float32),
        call_of(300, dtype=torch.float32, broken=True),
        call_of(1, dtype=torch.float16),
        call_of(2048, dtype=torch.float16),
        call_of(3001, dtype=torch.bfloat16),
        call_of(3001, dtype=torch.bfloat16, key=KEY),
        {**call_of(128, dtype=torch.float32), "gradient": torch.zeros(128)},
        {**call_of(64, dtype=torch.float32), **new_state(64), "step": torch.tensor(1.0)},
    ]
    interpreted = call_interpreted("memrt.kernels.adamw_fp8:adamw_fp8", calls)
    for before, found in zip(calls, interpreted, strict=True):
        expected = copy_of(before)
        adamw_fp8(**expected)
        assert not torch.equal(expected["parameter"], before["parameter"])
        for name in new_state(1):
            assert torch.equal(found[name], expected[name]), name
        narrow = found["parameter"].dtype
        ulp = 4 * 2**-24 if narrow is torch.float32 else torch.finfo(narrow).eps
        torch.testing.assert_close(
            found["parameter"], expected["parameter"], rtol=ulp, atol=8 * 2**-24 * 0.1
        )
        if narrow is not torch.float32:  # a rounding of the root seldom reaches a half
            same = found["parameter"] == expected["parameter"]
            assert same.float().mean() > 0.999


def counted_step(found: Tensor, **call: Any) -> None:
    """The bytes of a step's traffic, into `found`."""
    tensors = [t for name, t in call.items() if isinstance(t, Tensor) and name != "step"]
    table = decoding_table(torch.device("cpu"))
    with counted_traffic() as traffic:
        adamw_fp8(**call)
    accesses, addresses = traffic.of(tensors)
    elsewhere = traffic.elsewhere([*tensors, table])
    found.copy_(torch.tensor([accesses, addresses, elsewhere, traffic.of([table])[1]]))


def test_a_step_moves_ten_bytes_an_element() -> None:
    """Every element of parameter, gradient and state is loaded once and stored once."""
    n = 2**13 + 67
    call = call_of(n, dtype=torch.bfloat16, key=KEY)
    call["found"] = torch.zeros(4, dtype=torch.int64)
    (left,) = call_interpreted("tests.kernels.test_adamw_fp8_triton:counted_step", [call])
    accesses, addresses, elsewhere, decoding = left["found"].tolist()
    assert not torch.equal(left["parameter"], call["parameter"])
    assert accesses == addresses == 10 * n + 2 * 2 * (4 + 1) * num_groups(n)
    assert accesses + elsewhere <= 10.5 * n
    # all parameters of a device share the table, which the cache holds
    assert 0 < decoding <= 256 * 1024


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_it_compiles_for_every_architecture_without_spills(
    dtype: str, record_property: Callable[[str, object], None]
) -> None:
    from memrt.kernels._triton.adamw_fp8 import GROUPS, NUM_WARPS

    found = compile_ahead(
        "memrt.kernels._triton.adamw_fp8:adamw_fp8_kernel",
        {
            **dict.fromkeys(("p_ptr", "g_ptr"), f"*{dtype}"),
            **dict.fromkeys(("m_codes_ptr", "v_codes_ptr", "m_power_ptr", "v_power_ptr"), "*u8"),
            **dict.fromkeys(("m_largest_ptr", "v_largest_ptr", "table_ptr"), "*fp32"),
            "num_elements": "i32",
            **dict.fromkeys(SCALARS, "fp32"),
            **dict.fromkeys(("key0", "key1", "step"), "i32"),
        },
        {"STOCHASTIC": dtype == "bf16", "GROUP_SIZE": 128, "GROUPS": GROUPS},
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    assert set(found) == set(ARCHITECTURES)
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.registers <= MAX_REGISTERS, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture], resources


def test_a_cpu_tensor_is_refused_where_triton_does_not_interpret() -> None:
    from memrt.kernels.dispatch import require_triton

    with pytest.raises(ValueError, match=r"tensor on cpu: .*TRITON_INTERPRET=1"):
        require_triton(torch.zeros(1))


def test_without_triton_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from memrt.kernels import dispatch

    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install triton"):
        dispatch.require_triton(torch.zeros(1))


@pytest.mark.gpu
def test_a_gpu_has_the_codes_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for dtype, key in ((torch.float32, None), (torch.bfloat16, KEY), (torch.float16, None)):
        call = call_of(2**16 + 67, dtype=dtype, key=key)
        expected = copy_of(call)
        moved = {
            name: value.cuda() if isinstance(value, torch.Tensor) and name != "step" else value
            for name, value in call.items()
        }
        adamw_fp8(**moved)
        adamw_fp8(**expected)
        for name in new_state(1):
            assert torch.equal(moved[name].cpu(), expected[name]), name
