"""The tensor-core kernel of SlideAttention: run in the emulator against the reference, compiled by nvcc."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm")

from attnrewrite.emulator import metal_device, run_function  # noqa: E402
from attnrewrite.localattention.geometry import NeighborhoodGeometry  # noqa: E402
from attnrewrite.lowering import limits  # noqa: E402
from attnrewrite.lowering.kernels import gpu_builder, reference, slide_tensor  # noqa: E402
from attnrewrite.lowering.kernels.gpu_builder import Limits, Operands  # noqa: E402
from attnrewrite.lowering.kernels.slide_tensor_plan import Work, choose_tiling, takes  # noqa: E402
from attnrewrite.lowering.kernels.slide_tensor_staging import SlideStaging  # noqa: E402
from attnrewrite.lowering.kernels.tensor_core import TensorCore  # noqa: E402
from attnrewrite.lowering.targets import CUDA_PRESETS  # noqa: E402
from tests.cuda.compiling import cuda_target, resources  # noqa: E402
from tests.cuda.emulating import allow_memory_of_cuda, emulated_cuda, error, output_of  # noqa: E402
from tests.cuda.test_window_tensor import Library, in_dtype, operands_of, symbol  # noqa: E402
from tests.metal.cases import SLIDES, Case, slide  # noqa: E402


def geometry(kernel: tuple[int, int], stride: int, offset: int, border: str = "zero") -> NeighborhoodGeometry:
    """6 x 9 queries with keys of a larger map."""
    return NeighborhoodGeometry((6, 9), kernel, (1, 1), border, (stride,) * 2, (13, 18), (offset, offset - 1))


CASES = {
    # Rows of an odd number of pixels, one by one; channels that fill no step.
    "k3": slide((13, 9), (3, 3), (1, 1), 2, 30, bias=True, symbolic=True),
    # Four pixels at once; two warps along rows; two chunks of four rows.
    "k7": slide((16, 24), (7, 7), (1, 1), 2, 32, bias=True, one_bias=True, batch=1),
    "k7-on-7": slide((7, 7), (7, 7), (1, 1), 3, 16, 24, border="inward", bias=True),
    # Eight at once, in bands of rows.
    "k13": slide((20, 24), (13, 13), (1, 1), 1, 32, batch=1, bias=True),
    # Five tiles along a row, two rows of them at a time: pairs of tiles go from row to row.
    "k9x27": slide((10, 29), (9, 27), (1, 1), 1, 16, batch=1),
    "wide-keys": slide((9, 12), (5, 3), (1, 1), 1, 128, 18, border="exclude", bias=True, batch=1),
    "exclude-dilated": slide((9, 11), (3, 3), (2, 3), 1, 16, border="exclude", bias=True),
    "inward": slide((14, 16), (7, 5), (1, 1), 2, 64, border="inward", bias=True, symbolic=True, batch=1),
    "inward-dilated": slide((17, 23), (3, 5), (3, 4), 1, 4, border="inward"),
    "wrap-zero": slide((8, 16), (5, 3), (1, 1), 1, 6, border="wrap,zero"),
    "constant": slide((8, 12), (3, 3), (1, 1), 2, 6, 4, border="constant", bias=True),
    # The first rows of keys are none of the second row of queries.
    "strided": slide((6, 9), (4, 3), (1, 1), 2, 8, geometry=geometry((4, 3), 2, -1)),
    "strided-inward": slide((6, 9), (5, 2), (1, 1), 1, 8, 128, geometry=geometry((5, 2), 3, 1, "inward")),
}


@pytest.fixture(autouse=True)
def memory_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_memory_of_cuda(monkeypatch)


def kernel(case: Case, name: str = "run", shared_bytes: int | None = None, **more: Any) -> tvm.tirx.PrimFunc:
    return slide_tensor.slide_attention(case.spec, operands_of(case, **more), emulated_cuda(shared_bytes), name)


def run(case: Case, **more: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    done = run_function(kernel(case, **more), list(case.operands.values()), [output_of(case)])
    return done.outputs[0], done.findings


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    """All kernels, compiled together."""
    with metal_device(recording=True) as device, pytest.MonkeyPatch.context() as patch:
        allow_memory_of_cuda(patch)
        functions = {symbol(name): kernel(in_dtype(case, "float16"), symbol(name)) for name, case in CASES.items()}
        yield device, tvm.tirx.build(tvm.IRModule(functions), target=emulated_cuda(), pipeline=limits.PIPELINE)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_its_reference(library: Library, name: str) -> None:
    (device, module), case = library, in_dtype(CASES[name], "float16")
    output = tvm.runtime.empty(*output_of(case), tvm.metal())
    device.clear()
    module[symbol(name)](*(tvm.runtime.tensor(o, tvm.metal()) for o in case.operands.values()), output)
    assert device.findings == ()
    assert error(case, output.numpy()) <= 1


def test_bfloat16_with_a_wide_bias() -> None:
    case = in_dtype(CASES["k7-on-7"], "bfloat16")
    case.operands["bias"] = CASES["k7-on-7"].operands["bias"].astype(np.float32)
    output, findings = run(case, dtypes={"bias": "float32"})
    assert findings == ()
    assert error(case, output) <= 1


def test_parts_of_wider_maps() -> None:
    """All that lies between their images is NaN."""
    case = in_dtype(slide((8, 12), (3, 3), (1, 1), 2, 12), "float16")
    steps = {"query": 24, "key": 30, "value": 72}
    operands = dict(case.operands)
    for operand, step in steps.items():
        batch, channels, *pixels = operands[operand].shape
        wider = np.full((batch, step, *pixels), np.nan, np.float16)
        wider[:, :channels] = operands[operand]
        operands[operand] = wider.reshape(-1)[: wider.size - (step - channels) * math.prod(pixels)]
    done = run_function(kernel(case, steps=steps), list(operands.values()), [output_of(case)])
    assert done.findings == ()
    assert error(case, done.outputs[0]) <= 1


def test_a_query_without_keys_gives_nan() -> None:
    """The neighbourhoods of the first rows lie above the map."""
    above = NeighborhoodGeometry((8, 8), (3, 3), (1, 1), "exclude", offset=(-5, -1))
    case = in_dtype(slide((8, 8), (3, 3), (1, 1), 1, 8, geometry=above, batch=1), "float16")
    output, _ = run(case)
    expected = reference.slide_attention(case.spec, case.operands)
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(np.isnan(output), np.isnan(expected))


def test_biases_of_the_least_number_are_a_mean() -> None:
    """As libraries mask that know no infinity: what is no neighbour has less than that."""
    case = in_dtype(slide((8, 8), (3, 3), (1, 1), 1, 8, bias=True, batch=1), "bfloat16")
    case.operands["bias"][:] = ml_dtypes.finfo(ml_dtypes.bfloat16).min
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


def test_large_logits_do_not_overflow() -> None:
    """Whole numbers, so that logits of many thousands are exact; in several chunks of keys."""
    case = in_dtype(slide((8, 8), (7, 7), (1, 1), 1, 16, batch=1), "float16")
    for operand in ("query", "key"):
        case.operands[operand][:] = np.round(case.operands[operand] * 40)
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


def test_chunks_of_exact_large_logits_weigh_alike() -> None:
    """2**20 and a quarter for each row of keys: their products with log2(e) are rounded to eighths."""
    case = in_dtype(slide((8, 8), (7, 7), (1, 1), 1, 16, batch=1), "bfloat16")
    tiling = choose_tiling(Work.of(case.spec, case.shapes(1)), Limits.of(emulated_cuda()))
    assert tiling is not None and tiling.chunks > 1
    query, key = (case.operands[operand] for operand in ("query", "key"))
    query[:], key[:] = 0, 0
    query[:, 0], key[:, 0] = 2.0**12, 2.0**10
    query[:, 1], key[:, 1] = 4, np.arange(8)[:, None] / 4
    case.operands["value"][:] = np.where(np.arange(8) % 7 == 0, -1, 1)[:, None]
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


def test_logits_near_the_greatest_number() -> None:
    case = in_dtype(slide((8, 8), (7, 7), (1, 1), 1, 16, bias=True, batch=1), "bfloat16")
    case.operands["bias"][:] = 3e38
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


def test_a_slice_of_one_chunk_in_several_bands() -> None:
    case = in_dtype(slide((10, 9), (1, 17), (1, 1), 1, 32, batch=1), "float16")
    tiling = choose_tiling(Work.of(case.spec, case.shapes(1)), Limits.of(emulated_cuda(LITTLE_MEMORY)))
    assert tiling is not None and tiling.chunks == 1 < tiling.bands
    output, findings = run(case, shared_bytes=LITTLE_MEMORY)
    assert findings == ()
    assert error(case, output) <= 1


@pytest.mark.parametrize("absent", ["key_padding", "value_padding"])
def test_only_one_of_key_and_value_has_a_constant_border(absent: str) -> None:
    case = in_dtype(slide((8, 16), (3, 3), (1, 1), 1, 16, border="constant,inward", batch=1), "float16")
    del case.operands[absent]
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any geometry that the kernel takes, on small maps."""
    spaces = [draw(st.sampled_from(["", "stride", "dilation"])) for _ in range(2)]
    strides, dilations = (
        [draw(st.integers(2, 3)) if s == kind else 1 for s in spaces] for kind in ("stride", "dilation")
    )
    kernel = [draw(st.integers(1, 7)) for _ in range(2)]
    feature = [draw(st.integers(1, 12)) for _ in range(2)]
    keys = [draw(st.integers(1, 20)) for _ in range(2)]
    one = st.sampled_from(["zero", "exclude", "inward", "replicate", "reflect", "wrap"])
    borders = [draw(one) for _ in range(2)]
    if {*borders} == {"zero", "exclude"}:
        borders[0] = borders[1]
    offset = [
        -d * draw(st.integers(0, k - 1)) if b == "exclude" else draw(st.integers(-9, 4))
        for d, k, b in zip(dilations, kernel, borders, strict=True)
    ]
    # Inward, the neighbourhood fits; excluded, every query has a key.
    for axis, border in enumerate(borders):
        if border == "inward":
            keys[axis] = max(keys[axis], kernel[axis] * dilations[axis])
        elif border == "exclude":
            keys[axis] = max(keys[axis], (feature[axis] - 1) * strides[axis] + 1)
    found = NeighborhoodGeometry(
        tuple(feature), tuple(kernel), tuple(dilations), ",".join(borders), tuple(strides), tuple(keys), tuple(offset)
    )
    dims = (draw(st.integers(1, 20)), draw(st.integers(1, 20)))
    heads = draw(st.integers(1, 2))
    more = {"bias": draw(st.booleans()), "symbolic": draw(st.booleans()), "batch": draw(st.integers(1, 2))}
    made = slide(
        tuple(feature), tuple(kernel), tuple(dilations), heads, *dims, geometry=found, border=",".join(borders), **more
    )
    return in_dtype(made, draw(st.sampled_from(["float16", "bfloat16"])))


@settings(max_examples=2, deadline=None, derandomize=True)
@given(cases())
def test_any_geometry(case: Case) -> None:
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


# 24 channels end within a step of 16; with so little memory, rows of keys come in bands.
SMALL = slide((8, 10), (7, 5), (1, 1), 1, 24, bias=True, batch=1)
LITTLE_MEMORY = 16384


def of_one_query(value: Any, lane: Any) -> Any:
    return gpu_builder.from_lane(value, lane // 8 * 8)


def the_same_row(self: Any, key: Any) -> Any:
    return key[0] % 2 == 0


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "": (slide_tensor, "STEP", 16),
    "nothing waited for": (TensorCore, "wait", lambda self, pending: None),
    "no barriers": (slide_tensor, "barrier", lambda: None),
    "no zeros beside the key": (SlideStaging, "clear", lambda self: None),
    "factors of another query": (slide_tensor, "from_lane", of_one_query),
    "every other row left out": (slide_tensor._SlideTensorKernel, "takes_part", the_same_row),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    case = in_dtype(SMALL, "float16")
    output, findings = run(case, shared_bytes=LITTLE_MEMORY)
    assert (findings == () and error(case, output) <= 1) == (fault == "")


def takes_case(case: Case, dtype: str, chip: str) -> bool:
    shapes = {name: operand.shape for name, operand in case.operands.items()}
    return takes(case.spec, shapes, dtype, cuda_target(chip))


def test_what_it_takes_and_what_not() -> None:
    plain = SLIDES["k3"]
    assert takes_case(plain, "float16", "sm_75")
    assert takes_case(plain, "bfloat16", "sm_80")
    assert not takes_case(plain, "float32", "sm_90")  # would not be exact
    assert not takes_case(plain, "bfloat16", "sm_75")  # its tensor cores do not multiply it
    assert not takes_case(SLIDES["learned-k3"], "float16", "sm_90")
    assert not takes_case(SLIDES["predicted-weights"], "float16", "sm_90")
    assert not takes_case(SLIDES["one-axis"], "float16", "sm_90")
    assert not takes_case(SLIDES["exclude"], "float16", "sm_90")  # a bias for every query
    assert not takes_case(slide((9, 9), (3, 3), (1, 1), 1, 130), "float16", "sm_90")
    assert not takes_case(slide((9, 9), (3, 3), (1, 1), 1, 4), "float16", "sm_90")  # single multiply-adds are fewer
    spread = NeighborhoodGeometry((6, 6), (3, 3), (1, 2), stride=(1, 2))
    assert not takes_case(slide((6, 6), (3, 3), (1, 2), 1, 16, geometry=spread), "float16", "sm_90")


@pytest.mark.parametrize("kernel", [3, 5, 7, 13, 21])
def test_tilings_keep_to_the_limits(kernel: int) -> None:
    limits = Limits.of(cuda_target("sm_75"))
    for side, channels, instances, in_vectors in itertools.product((7, 14, 56), (8, 32, 128), (1, 500), (True, False)):
        work = Work(
            NeighborhoodGeometry((side, side), (kernel,) * 2, (1, 1)), channels, channels, instances, in_vectors
        )
        tiling = choose_tiling(work, limits)
        assert tiling is not None
        assert tiling.shared_bytes <= limits.shared_bytes
        assert math.prod(tiling.threads) <= limits.threads
        assert tiling.key_tiles % 2 == 0
        assert tiling.bands * tiling.band >= tiling.rows.staged


def compiled(kernel: int, side: int, channels: int, *chips: str, dtype: str = "float16", **more: Any) -> list[Any]:
    """A kernel for a large batch."""
    case = in_dtype(slide((side, side), (kernel, kernel), (1, 1), 2, channels, bias=True, batch=1, **more), dtype)
    shapes = {name: (64, *o.shape[1:]) if o.ndim == 4 else o.shape for name, o in case.operands.items()}
    function = slide_tensor.slide_attention(case.spec, Operands(shapes, dtype), cuda_target(chips[0]), "run")
    return resources(function, *chips)


def test_it_compiles_without_spills() -> None:
    kernels = compiled(7, 56, 32, "sm_75", "sm_90")
    assert [kernel.arch for kernel in kernels] == ["sm_75", "sm_90"]
    assert not any(kernel.spills for kernel in kernels)
    # Two threadgroups of 256 threads on a multiprocessor, by registers (64 K).
    assert all(kernel.registers <= 128 for kernel in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 5, 7, 9, 13])
@pytest.mark.parametrize("channels", [8, 16, 30, 32, 64, 128])
def test_no_geometry_spills_on_any_preset(size: int, channels: int) -> None:
    for side in (13, 56):
        kernels = compiled(size, side, channels, *CUDA_PRESETS)
        assert [kernel.arch for kernel in kernels] == list(CUDA_PRESETS)
        assert [kernel for kernel in kernels if kernel.spills] == []
