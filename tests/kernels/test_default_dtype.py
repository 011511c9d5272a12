"""What is coded does not depend on torch's default dtype, which loading and many scripts set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

CODED = """
import sys
import torch

torch.set_default_dtype(getattr(torch, sys.argv[1]))

from memrt.kernels.int8_weights import int8_dequantize, int8_quantize
from memrt.kernels.nf4 import nf4_dequantize, nf4_quantize, nf4_quantize_reference
from memrt.kernels.uniform_int4 import int4_dequantize, int4_quantize
from memrt.optimizers.adamw import AdamW
from memrt.optimizers.state_formats import STATE_FORMATS

F32 = torch.float32
weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0), dtype=F32)
made = [nf4_quantize_reference(weight)]
for value in (weight, weight.bfloat16()):
    packed = nf4_quantize(value)
    made += [packed, nf4_dequantize(packed, value.shape, value.dtype)]
    packed = int8_quantize(value, 0)
    made += [packed, int8_dequantize(packed, value.shape, 0, value.dtype)]
packed = int4_quantize(weight)
made += [int4_dequantize(packed, weight.shape)]
for name in sorted(STATE_FORMATS):
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = AdamW([parameter], lr=1e-2, state_format=name)
    for step in range(3):
        parameter.grad = weight.roll(step + 1)
        optimizer.step()
    made.append(parameter.detach())
torch.save([each.float() if each.is_floating_point() else each for each in made], sys.argv[2])
"""


@pytest.mark.filterwarnings("ignore")
def test_codes_are_the_same_in_a_process_of_another_default_dtype(tmp_path: Path) -> None:
    """In processes of their own: tables are made once, under the dtype of the first call."""
    found = {}
    for name in ("float32", "bfloat16"):
        path = tmp_path / name
        subprocess.run([sys.executable, "-c", CODED, name, str(path)], check=True)
        found[name] = torch.load(path)
    assert len(found["float32"]) == len(found["bfloat16"]) == 14
    for index, (one, other) in enumerate(zip(*found.values(), strict=True)):
        assert one.dtype == other.dtype, index
        assert torch.equal(one, other), index


def test_a_packed_weight_is_the_one_of_the_formula_under_a_bf16_default() -> None:
    """As while a bf16 model loads; the codes of scales were half of what they should be."""
    from memrt.kernels import nf4

    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    expected = nf4.nf4_quantize(weight)
    nf4._outer_map.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = nf4.nf4_quantize(weight)
    finally:
        torch.set_default_dtype(torch.float32)
        nf4._outer_map.cache_clear()
    assert torch.equal(found, expected)
