"""State formats: what an optimizer keeps of its moments between two steps, and in how many bytes.

| format  | an element is kept as                                      | bytes an element     |
|---------|------------------------------------------------------------|----------------------|
| float32 | two fp32 moments                                           | 8                    |
| fp8     | two E4M3 codes; fp32 magnitude and power of 128 elements   | 2 + 10 / 128 = 2.08  |
| int4    | two codes in a byte, and two fp32 scales of 128 elements   | 1 + 8 / 128 = 1.06   |
| int8    | two codes, and two fp32 scales a block of 256 elements     | 2 + 8 / 256 = 2.03   |

plus one fp32 step counter a parameter. Every format is a layout of plain tensors
(`memrt.optimizers.state_format`). Moments are never bf16: there v * 0.999 rounds back to v, and the
effective learning rate decays silently.

All but float32 leave parameters with fewer than 4096 elements in fp32. int8 costs 2 KiB a device
for its code maps. Small elements of a block lose precision to its largest in int8: rows of an
embedding that are rarely met feel it most; fp8 stretches its codes to the range of each group.

int4 rounds coarsely: keep fp8 or int8 where the loss is to be that of fp32 states.

Sources: Loshchilov and Hutter, arXiv 1711.05101 (AdamW); Dettmers et al., arXiv 2110.02861 (int8);
Xi et al., arXiv 2410.19313 (fp8); Li et al., arXiv 2309.01507 (int4).
"""

from __future__ import annotations

from memrt.optimizers.float32_state import Float32
from memrt.optimizers.quantized_states import MIN_QUANTIZED_ELEMENTS, Fp8, Int4, Int8
from memrt.optimizers.state_format import AdamWSettings, StateFormat, StateTensor, Update

__all__ = [
    "MIN_QUANTIZED_ELEMENTS",
    "STATE_FORMATS",
    "AdamWSettings",
    "Float32",
    "Fp8",
    "Int4",
    "Int8",
    "StateFormat",
    "StateTensor",
    "Update",
]

STATE_FORMATS: dict[str, type[StateFormat]] = {
    form.name: form for form in (Float32, Fp8, Int4, Int8)
}
