"""The FP8 AdamW step of many parameters: bit for bit that of each alone, in fewer launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from memrt.kernels import adamw_fp8 as single
from memrt.kernels import adamw_fp8_foreach as module
from memrt.kernels.adamw_fp8 import adamw_fp8
from memrt.kernels.adamw_fp8_foreach import adamw_fp8_foreach, workspace_bytes
from memrt.kernels.expanded_fp8 import decoding_table, num_groups
from tests.kernels.adamw_fp8_cases import KEY, SETTINGS, call_of, copy_of, new_state
from tests.kernels.aot import ARCHITECTURES, SHARED_LIMIT_BYTES, compile_ahead
from tests.kernels.interpreter import call_interpreted
from tests.kernels.live_bytes import LiveBytes
from tests.kernels.test_adamw_fp8_triton import MAX_REGISTERS
from tests.kernels.traffic import counted_traffic

STATE = list(new_state(1))
LISTS = {"parameter": "parameters", "gradient": "gradients", "step": "steps"}


def strided(call: dict[str, Any]) -> dict[str, Any]:
    """Parameter and gradient with gaps between their elements."""
    wide = {name: call[name].repeat_interleave(2)[::2] for name in ("parameter", "gradient")}
    return {**call, **wide}


def shifted(call: dict[str, Any]) -> dict[str, Any]:
    """The parameter from an address on that is no multiple of 16."""
    values = torch.cat([call["parameter"][:1], call["parameter"]])
    return {**call, "parameter": values[1:]}


def calls_of() -> list[dict[str, Any]]:
    """Sizes, dtypes, layouts, step numbers and rounding keys as they come together in a model."""
    calls = [
        call_of(1001, dtype=torch.float32),
        call_of(1024, dtype=torch.float32, broken=True),
        call_of(1, dtype=torch.bfloat16, key=KEY),
        call_of(4096, dtype=torch.bfloat16, key=KEY),
        call_of(2048 + 128, dtype=torch.bfloat16, key=[5, 7]),
        call_of(512, dtype=torch.bfloat16),
        call_of(640, dtype=torch.bfloat16, key=[2**31 - 1, 0]),
        strided(call_of(300, dtype=torch.bfloat16, key=KEY)),
        shifted(call_of(2048, dtype=torch.bfloat16, key=[8, 9])),
        call_of(67, dtype=torch.float16),
        call_of(67, dtype=torch.float32),
    ]
    for number, call in enumerate(calls):
        call["step"] = torch.tensor(float(4 + number))
    calls[3] |= {"parameter": calls[3]["parameter"].view(64, 64)}
    calls[3] |= {"gradient": calls[3]["gradient"].view(64, 64)}
    empty = {"parameter": torch.zeros(0, 4), "gradient": torch.zeros(0, 4), **new_state(0)}
    return [*calls, {**empty, "step": torch.tensor(1.0), "rounding_key": None, **SETTINGS}]


def together(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of one call for all of them."""
    lists = {
        LISTS.get(name, name): [call[name] for call in calls]
        for name in ("parameter", "gradient", *STATE, "step")
    }
    keys = [word for call in calls for word in call["rounding_key"] or (-1, -1)]
    return {**lists, **SETTINGS, "rounding_keys": keys}


def assert_as_alone(lists: dict[str, Any], alone: list[dict[str, Any]]) -> None:
    for index, call in enumerate(alone):
        for name in ("parameter", *STATE):
            found = lists[LISTS.get(name, name)][index]
            assert torch.equal(found, call[name]), (index, name)


def test_each_parameter_is_stepped_as_alone() -> None:
    before, alone = calls_of(), calls_of()
    lists = together(calls_of())
    for call in alone:
        adamw_fp8(**call)
    adamw_fp8_foreach(**lists)
    assert_as_alone(lists, alone)
    moved = [
        not torch.equal(a["parameter"], b["parameter"]) for a, b in zip(alone, before, strict=True)
    ]
    assert moved == [True] * 11 + [False]


def test_no_parameter_is_stepped_as_well() -> None:
    adamw_fp8_foreach(**together([]))


def test_nothing_is_stepped_if_one_is_refused() -> None:
    calls = calls_of()[:3]
    calls[2]["exp_avg_power"] = torch.zeros(1)
    lists = together(calls)
    before = [tensor.clone() for tensor in lists["parameters"]]
    with pytest.raises(ValueError, match="exp_avg_power must be 1"):
        adamw_fp8_foreach(**lists)
    for name in ("gradients", "exp_avg_codes", "steps", "rounding_keys"):
        with pytest.raises(ValueError, match="3 parameters, lists of"):
            adamw_fp8_foreach(**{**together(calls_of()[:3]), name: lists[name][:-1]})
    assert all(torch.equal(a, b) for a, b in zip(lists["parameters"], before, strict=True))


def test_opcheck() -> None:
    torch.library.opcheck(adamw_fp8_foreach, (), together([calls_of()[i] for i in (2, 7, 9, 11)]))
    torch.library.opcheck(adamw_fp8_foreach, (), together([]))


def test_workspace_is_that_of_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter's temporaries are gone before the next one's are made."""
    monkeypatch.setattr(single, "PIECE_ELEMENTS", 4096)
    lists = together(calls_of())
    known = [t for each in lists.values() if isinstance(each, list) for t in each]
    with torch.no_grad(), LiveBytes([t for t in known if isinstance(t, Tensor)]) as seen:
        adamw_fp8_foreach._init_fn(**lists)
    declared = workspace_bytes(**lists)
    assert seen.peak_bytes <= declared + 16 * 4096 // 128  # some [groups] are alive too
    assert declared <= 1.5 * seen.peak_bytes


def test_workspace_on_a_gpu_is_the_table() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from memrt.kernels._triton.adamw_fp8 import One
    from memrt.kernels._triton.adamw_fp8_foreach import _table

    calls = [call_of(256, dtype=torch.float32) for _ in range(3)]
    ones = [
        One(c["parameter"], c["gradient"], [c[name] for name in STATE], [0.5] * 8, None, 1)
        for c in calls
    ]
    table, num_programs = _table(ones)
    assert num_programs == 3
    with FakeTensorMode():
        for count, expected in ((3, table.nbytes), (1, 0), (0, 0), (500, 8 * 128 * 15)):
            fakes = [torch.empty(256, device="cuda") for _ in range(count)]
            assert workspace_bytes(fakes, fakes) == expected
        turned = [torch.empty(2, 9999, device="cuda").t() for _ in range(2)]
        assert workspace_bytes(turned, turned) == 2 * 4 * 19998


# ---------------------------------------------------------------- Triton


def both(launches: Tensor, limit: int, alone: list[dict[str, Any]], **lists: Any) -> None:
    """One call for all, and one for each; how many launches of each kernel the first took."""
    pytest.importorskip("triton")
    module.MAX_TENSORS = limit
    from memrt.kernels._triton import adamw_fp8_foreach as kernels

    counts = {"_launch_some": 0, "launch": 0}

    def counted(name: str) -> Callable[..., None]:
        launch = getattr(kernels, name)

        def count(*arguments: Any) -> None:
            counts[name] += 1
            launch(*arguments)

        return count

    for name in counts:
        setattr(kernels, name, counted(name))
    adamw_fp8_foreach(**lists)
    launches.copy_(torch.tensor(list(counts.values())))
    for call in alone:
        adamw_fp8(**call)


def test_the_interpreted_kernel_has_the_bits_of_single_launches() -> None:
    """With at most two parameters in a launch; and the codes are the reference's."""
    pytest.importorskip("triton", reason="Triton is not installed")
    call = {**together(calls_of()), "alone": calls_of(), "limit": 2}
    call["launches"] = torch.zeros(2, dtype=torch.int64)
    (left,) = call_interpreted("tests.kernels.test_adamw_fp8_foreach:both", [call])
    assert_as_alone(left, left["alone"])
    expected = calls_of()
    for index, each in enumerate(expected):
        adamw_fp8(**each)
        for name in STATE:
            assert torch.equal(left[name][index], each[name]), (index, name)
    # two ragged ones in fp32, two in bf16, and two of three that are not; three are of other kinds
    assert left["launches"].tolist() == [3, 1 + 3]


def counted_step(found: Tensor, **lists: Any) -> None:
    """The bytes of the traffic of a step, into `found`."""
    tensors = [t for name, each in lists.items() if name != "steps" for t in _tensors_of(each)]
    table = decoding_table(torch.device("cpu"))
    with counted_traffic() as traffic:
        adamw_fp8_foreach(**lists)
    found.copy_(torch.tensor([*traffic.of(tensors), traffic.elsewhere([*tensors, table])]))


def _tensors_of(value: Any) -> list[Tensor]:
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, list) else []


def test_a_step_moves_ten_bytes_an_element() -> None:
    """The table counts, though it is read from a cache: these parameters are small."""
    pytest.importorskip("triton", reason="Triton is not installed")
    sizes = (2048, 4096, 2048 + 640)
    call = together([call_of(n, dtype=torch.bfloat16, key=KEY) for n in sizes])
    call["found"] = torch.zeros(3, dtype=torch.int64)
    (left,) = call_interpreted("tests.kernels.test_adamw_fp8_foreach:counted_step", [call])
    accesses, addresses, elsewhere = left["found"].tolist()
    assert accesses == addresses == sum(10 * n + 20 * num_groups(n) for n in sizes)
    assert elsewhere > 0
    assert accesses + elsewhere <= 10.5 * sum(sizes)


@pytest.mark.parametrize(
    ("dtype", "aligned"),
    [
        ("bf16", True),
        pytest.param("fp32", True, marks=pytest.mark.slow),
        pytest.param("bf16", False, marks=pytest.mark.slow),
    ],
)
def test_it_compiles_for_every_architecture_without_spills(
    dtype: str, aligned: bool, record_property: Callable[[str, object], None]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from memrt.kernels._triton.adamw_fp8 import GROUPS, NUM_WARPS
    from memrt.kernels._triton.adamw_fp8_foreach import BLOCKS

    found = compile_ahead(
        "memrt.kernels._triton.adamw_fp8_foreach:adamw_fp8_foreach_kernel",
        {
            "tensors_ptr": "*i64",
            **dict.fromkeys(("p_ptr", "g_ptr"), f"*{dtype}"),
            "codes_ptr": "*u8",
            **dict.fromkeys(("largest_ptr", "table_ptr"), "*fp32"),
            **dict.fromkeys(("decay", "beta1", "rest1", "beta2", "rest2", "eps"), "fp32"),
        },
        {
            "STOCHASTIC": dtype == "bf16",
            "ALIGNED": aligned,
            "GROUP_SIZE": 128,
            "GROUPS": GROUPS,
            "BLOCKS": BLOCKS,
        },
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    assert set(found) == set(ARCHITECTURES)
    for architecture, resources in found.items():
        record_property(f"sm_{architecture}", str(resources))
        assert resources.spill_bytes == 0, resources
        assert resources.registers <= MAX_REGISTERS, resources
        assert resources.shared_bytes <= SHARED_LIMIT_BYTES[architecture], resources
        # without wide loads and stores, which alignment allows, it takes 1624 to 1928
        assert (resources.num_instructions < 1400) is aligned, resources


@pytest.mark.gpu
def test_a_gpu_has_the_bits_of_single_launches() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def moved(value: Any) -> Any:
        return value.cuda() if isinstance(value, Tensor) else value

    sizes = [4096 * (1 + number % 7) + number % 3 for number in range(300)]
    calls = [call_of(n, dtype=torch.bfloat16, key=[n, 1]) for n in sizes]
    calls += [call_of(5001, dtype=torch.float32), *calls_of()]
    calls = [{k: v if k == "step" else moved(v) for k, v in call.items()} for call in calls]
    lists = together([copy_of(call) for call in calls])
    adamw_fp8_foreach(**lists)
    for call in calls:
        adamw_fp8(**call)
    assert_as_alone(lists, calls)
