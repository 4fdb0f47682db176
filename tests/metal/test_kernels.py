"""The GPU kernels' Metal source, run on the CPU, against the NumPy references; and the limits of the devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

import tvm_ffi  # noqa: E402
from tvm.target import Target  # noqa: E402

from attnrewrite.emulator import MetalDevice, metal_device, metal_target  # noqa: E402
from attnrewrite.errors import CompilerError  # noqa: E402
from attnrewrite.functions.spec import FlashWindowAttention  # noqa: E402
from attnrewrite.localattention.geometry import NeighborhoodGeometry  # noqa: E402
from attnrewrite.lowering import limits  # noqa: E402
from attnrewrite.lowering.kernels import gpu_builder, reference, slide_gpu, slide_gpu_predicted, window_gpu  # noqa: E402
from attnrewrite.lowering.kernels.gpu import attention_kernel  # noqa: E402
from attnrewrite.lowering.kernels.gpu_builder import Limits, Operands  # noqa: E402
from tests.metal.cases import SLIDES, WINDOWS, Case  # noqa: E402

# float32 sums of up to about 600 products of order 1, against a reference in float64.
FLOAT32 = 1e-5
# The result is rounded to float16 once, half an ulp of the largest; everything between is float32.
FLOAT16 = 2.0**-11 * 1.1

CUDA = Target({"kind": "cuda", "arch": "sm_90", "max_shared_memory_per_block": 49152, "thread_warp_size": 32})


def kernel(case: Case, target: Target, name: str) -> Any:
    if isinstance(case.spec, FlashWindowAttention):
        build = window_gpu.flash_window_attention
    else:
        build = slide_gpu_predicted.predicted_attention if case.spec.predicted else slide_gpu.slide_attention
    operands = Operands(case.shapes(tvm.tirx.Var("n", "int64")), str(case.operands["value"].dtype))
    return build(case.spec, operands, target, name)


def symbol(name: str) -> str:
    return f"kernel_{name.replace('-', '_')}"


def emulated(cases: Mapping[str, Case]) -> Any:
    """One module of all the kernels: their source is compiled together."""
    target = metal_target()
    functions = {symbol(name): kernel(case, target, symbol(name)) for name, case in cases.items()}
    return tvm.tirx.build(tvm.IRModule(functions), target=target, pipeline=limits.PIPELINE)


@pytest.fixture(scope="module")
def device() -> Iterator[MetalDevice]:
    with metal_device(recording=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def windows(device: MetalDevice) -> Any:
    return emulated(WINDOWS)


@pytest.fixture(scope="module")
def slides(device: MetalDevice) -> Any:
    return emulated(SLIDES)


def run(module: Any, name: str, case: Case, expected: Sequence[np.ndarray]) -> list[np.ndarray]:
    outputs = [tvm.runtime.empty(array.shape, str(array.dtype), tvm.metal()) for array in expected]
    module[symbol(name)](*(tvm.runtime.tensor(operand, tvm.metal()) for operand in case.operands.values()), *outputs)
    return [output.numpy() for output in outputs]


def check(device: MetalDevice, module: Any, name: str, case: Case) -> None:
    """Right numbers, and no access that a GPU would not forgive."""
    outputs = expected(case)
    device.clear()
    found = run(module, name, case, outputs)
    assert device.findings == ()
    for got, wanted in zip(found, outputs, strict=True):
        tolerance = FLOAT32 if wanted.dtype == np.float32 else FLOAT16
        assert np.abs(got.astype(np.float64) - wanted).max() <= tolerance * np.abs(wanted).max()


def expected(case: Case) -> Sequence[np.ndarray]:
    if isinstance(case.spec, FlashWindowAttention):
        return reference.window_outputs(case.spec, case.operands)
    return [reference.slide_attention(case.spec, case.operands)]


@pytest.mark.parametrize("name", WINDOWS)
def test_window_kernel_computes_its_reference(device: MetalDevice, windows: Any, name: str) -> None:
    check(device, windows, name, WINDOWS[name])


@pytest.mark.parametrize("name", SLIDES)
def test_slide_kernel_computes_its_reference(device: MetalDevice, slides: Any, name: str) -> None:
    check(device, slides, name, SLIDES[name])


@pytest.mark.parametrize("batch", [1, 5])
def test_a_symbolic_batch_is_read_from_the_query(device: MetalDevice, windows: Any, batch: int) -> None:
    case = WINDOWS["shifted"]
    operands = {name: np.repeat(value[:1], batch, axis=0) for name, value in case.operands.items()}
    operands["bias"] = case.operands["bias"]
    check(device, windows, "shifted", Case(case.spec, operands, symbolic=True))


@pytest.mark.parametrize("name", ["shifted", "k3"])
def test_a_batch_whose_indices_have_more_than_32_bits_is_refused(
    device: MetalDevice, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    case = {**WINDOWS, **SLIDES}[name]
    shapes = {operand: (1 << 24, *array.shape[1:]) for operand, array in case.operands.items() if operand != "bias"}
    with pytest.raises(CompilerError, match=r"a tensor has \d+ elements; kernels of GPUs take fewer than 2\*\*31"):
        attention_kernel(case.spec, shapes, dict.fromkeys(shapes, "float32"), metal_target(), "large")
    monkeypatch.setattr(gpu_builder, "INDEXED", case.operands["query"].size)
    module = emulated({name: case})
    one = {operand: array if operand == "bias" else array[:1] for operand, array in case.operands.items()}
    check(device, module, name, Case(case.spec, one))
    with pytest.raises(ValueError, match="a batch of more than 1 has tensors of 2"):
        check(device, module, name, case)


@pytest.mark.parametrize("name", ["shifted", "k3"])
def test_a_grid_is_one_row(name: str) -> None:
    """CUDA has at most 65535 threadgroups along its other axes, whatever the batch."""
    tags: set[str] = set()

    def note(node: Any) -> None:
        if node.attr_key == "thread_extent":
            tags.add(str(node.node.thread_tag))

    tvm_ffi.structural_walk(kernel({**WINDOWS, **SLIDES}[name], CUDA, "run").body, (tvm.tirx.AttrStmt, note))
    assert {tag for tag in tags if tag.startswith("blockIdx")} == {"blockIdx.x"}


def test_a_row_that_is_masked_altogether_gives_nan(windows: Any) -> None:
    case = WINDOWS["mask-tensor"]
    mask = case.operands["mask"].copy()
    mask[2, 5] = -np.inf
    masked = Case(case.spec, {**case.operands, "mask": mask})
    (wanted,) = expected(masked)
    (got,) = run(windows, "mask-tensor", masked, [wanted])
    assert np.isnan(wanted).any()
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))


def test_large_logits_do_not_overflow(device: MetalDevice, windows: Any) -> None:
    case = WINDOWS["mask-tensor"]
    # Whole numbers and a scale of 1/4: logits of thousands, and exact.
    whole = {name: np.round(case.operands[name] * 20) for name in ("query", "key")}
    check(device, windows, "mask-tensor", Case(case.spec, {**case.operands, **whole}))


# tokens, head_dim of query and key, of value, bytes of an element
TILINGS = [
    (49, 32, 32, 4),
    (576, 32, 32, 4),
    (576, 30, 30, 2),
    (64, 512, 512, 4),
    (16, 1, 1, 4),
    (400, 96, 64, 4),
    (1, 8, 300, 4),
]


@pytest.mark.parametrize("target", [metal_target(), CUDA], ids=["metal", "cuda"])
@pytest.mark.parametrize("sizes", TILINGS, ids=str)
def test_window_tilings_keep_to_the_limits(sizes: tuple[int, int, int, int], target: Target) -> None:
    limits = Limits.of(target)
    tokens, *rest = sizes
    tiling = window_gpu.choose_tiling(window_gpu.Sizes(tokens, tokens, *rest), limits)
    assert tiling.shared_bytes() <= limits.shared_bytes <= 49152
    assert tiling.first_bytes("float32" if sizes[3] == 4 else "float16")[-1] == tiling.shared_bytes()
    assert tiling.columns * tiling.rows <= 256


@pytest.mark.parametrize("kernel_size", [3, 5, 7, 9, 13])
@pytest.mark.parametrize("dilation", [1, 2, 8, 40])
def test_slide_tilings_keep_to_the_limits(kernel_size: int, dilation: int) -> None:
    limits = Limits.of(metal_target())
    geometry = NeighborhoodGeometry((56, 64), (kernel_size, kernel_size), (dilation, dilation))
    tiling = slide_gpu.choose_tiling(slide_gpu.Work(geometry, 48, 64, 4), limits)
    assert tiling.shared_floats() * slide_gpu.STAGED_ELEMENT <= limits.shared_bytes
    assert np.prod(tiling.threads) <= limits.threads
    assert [slot for group in tiling.slot_groups for slot in group] == list(range(kernel_size**2))


def test_heads_share_a_threadgroup_where_their_kernels_outweigh_the_map() -> None:
    """Kernels of 3 x 3 and 32 channels, 11.5 KB, beside maps of 25 KB and of 400 KB a head."""
    of_map = {}
    for extent in (7, 28):
        work = slide_gpu.Work(NeighborhoodGeometry((extent, extent), (3, 3), (1, 1)), 32, 32, 4, 24, 90, alike=24)
        tiling = slide_gpu.choose_tiling(work, Limits.of(metal_target()))
        of_map[extent] = tiling.heads
        assert tiling.heads * np.prod(tiling.threads) <= 256
        assert tiling.shared_floats() * slide_gpu.STAGED_ELEMENT <= 32768
    assert of_map[7] > of_map[28] == 1


def test_a_neighbourhood_that_fits_in_no_tile_is_one_sentence() -> None:
    geometry = NeighborhoodGeometry((200, 200), (99, 99), (1, 1))
    with pytest.raises(CompilerError, match="no tile of a neighbourhood of 9801 pixels fits into 32768 bytes"):
        slide_gpu.choose_tiling(slide_gpu.Work(geometry, 48, 64, 4), Limits.of(metal_target()))
