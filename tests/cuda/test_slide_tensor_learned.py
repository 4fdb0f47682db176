"""The tensor-core kernel of SlideAttention with learned kernels: run in the emulator, compiled by nvcc."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm")

from attnrewrite.emulator import metal_device, metal_target, run_function  # noqa: E402
from attnrewrite.lowering import limits  # noqa: E402
from attnrewrite.lowering.kernels import reference, slide_tensor_learned  # noqa: E402
from attnrewrite.lowering.kernels.gpu import attention_kernel  # noqa: E402
from attnrewrite.lowering.kernels.gpu_builder import Limits, Operands  # noqa: E402
from attnrewrite.lowering.kernels.slide_tensor_learned_plan import MAX_WARPS, takes, tiling_of  # noqa: E402
from attnrewrite.lowering.kernels.slide_tensor_learned_staging import Staging  # noqa: E402
from attnrewrite.lowering.kernels.tensor_core import TensorCore  # noqa: E402
from attnrewrite.lowering.targets import CUDA_PRESETS  # noqa: E402
from tests.cuda.compiling import cuda_target, resources  # noqa: E402
from tests.cuda.emulating import ROUNDOFF, allow_memory_of_cuda, emulated_cuda, output_of  # noqa: E402
from tests.cuda.test_window_tensor import Library, in_dtype, operands_of, symbol  # noqa: E402
from tests.metal.cases import SLIDES, Case, slide  # noqa: E402


def learned(
    feature: tuple[int, int], kernel: tuple[int, int], heads: int, head_dim: int, value_dim: int = 0, **more: Any
) -> Case:
    """Kernels that all heads share, unless `more` says otherwise."""
    more = {"dilation": (1, 1), "key_kernel": head_dim, "value_kernel": value_dim or head_dim, **more}
    return slide(feature, kernel, more.pop("dilation"), heads, head_dim, value_dim or None, **more)


CASES = {
    "learned-alike": SLIDES["learned-alike"],
    # Four heads in a threadgroup, each with biases of its own; rows of an odd number of pixels.
    "small-map": learned((7, 7), (3, 3), 4, 32, bias=True, key_bias=128, value_bias=128, batch=1),
    # Loads of four pixels; tiles that stick out of the map, two chunks of channels, the last of them half empty.
    "chunks": learned((9, 20), (3, 3), 1, 40, 24, bias=True, one_bias=True, symbolic=True, key_bias=40),
    # Kernels do not fit beside each other: one chunk's at a time. Taps in a loop, two tiles of slots.
    "k5": learned((6, 12), (5, 5), 1, 18, bias=True, value_bias=18, batch=1),
    "dilated": learned((10, 9), (1, 5), 2, 6, dilation=(1, 2), bias=True, bias_of_pixels=True, value_kernel=0),
    # Only moved keys; values with kernels of each head.
    "dilated-rows": learned((9, 10), (3, 1), 2, 8, dilation=(3, 1), key_kernel=0, key_bias=8, value_kernel=16),
}


def scaled(case: Case, scale: float) -> Case:
    return dataclasses.replace(case, spec=dataclasses.replace(case.spec, scale=scale))


@pytest.fixture(autouse=True)
def memory_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_memory_of_cuda(monkeypatch)


def kernel(case: Case, name: str = "run", **more: Any) -> tvm.tirx.PrimFunc:
    return slide_tensor_learned.slide_attention(case.spec, operands_of(case, **more), emulated_cuda(), name)


def run(case: Case, **more: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    done = run_function(kernel(case, **more), list(case.operands.values()), [output_of(case)])
    return done.outputs[0], done.findings


def exact(case: Case) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in case.operands.items()}


def error(case: Case, output: np.ndarray) -> float:
    """The largest, of what may be. Products of query and key are rounded at each tap, weights are, and the result is.
    All but the last are independent: what they add up to is below twice the root of the sum of their squares (beyond
    four standard deviations). Weights and results below the normal numbers are rounded to multiples of the least one.
    """
    operands, geometry, heads = exact(case), case.spec.geometry, case.spec.num_heads
    expected = reference.slide_attention(case.spec, operands)
    keys, values = (reference._neighbours(geometry, operands, name, np.float64) for name in ("key", "value"))
    batch, channels, pixels, slots = keys.shape  # [B, C, P, K]
    query = operands["query"].reshape(batch, channels, pixels)
    bias = operands.get("bias", np.zeros((1, slots)))
    bias = bias if bias.ndim == 3 else bias[:, None]
    logits = case.spec.scale * of_heads(query[..., None] * keys, heads).sum(2) + bias
    weights = reference.softmax(logits, axis=-1)[:, :, None]  # [B, nH, 1, P, K]

    taps = reference._neighbours(geometry, {"key": operands["key"]}, "key", np.float64)
    kernel = operands.get("key_kernel", np.eye(slots)[None]).reshape(-1, slots, slots)
    squares = np.einsum("bcp,bcpt,cjt->bcpj", query**2, taps**2, reference._row_per_channel(kernel, channels) ** 2)
    of_logits = case.spec.scale**2 * of_heads(squares, heads).sum(2)[:, :, None]
    values, mean = of_heads(values, heads), of_heads(expected.reshape(batch, -1, pixels, 1), heads)
    moved = (weights * values) ** 2 + (weights * (values - mean)) ** 2 * of_logits
    roundoff, least = ROUNDOFF[str(output.dtype)], float(ml_dtypes.finfo(output.dtype).smallest_subnormal)
    relative = (2 * np.sqrt(moved.sum(-1))).reshape(expected.shape) + np.abs(expected)
    absolute = (np.abs(values).sum(-1).reshape(expected.shape) + 1) * least / 2
    return float((np.abs(output.astype(np.float64) - expected) / (roundoff * relative + absolute)).max())


def of_heads(array: np.ndarray, heads: int) -> np.ndarray:
    """[B, nH*d, ...] -> [B, nH, d, ...]."""
    batch, channels, *rest = array.shape
    return array.reshape(batch, heads, channels // heads, *rest)


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    """All kernels, compiled together."""
    with pytest.MonkeyPatch.context() as patch, metal_device(recording=True) as device:
        allow_memory_of_cuda(patch)
        functions = {symbol(name): kernel(in_dtype(case, "float16"), symbol(name)) for name, case in CASES.items()}
        yield device, tvm.tirx.build(tvm.IRModule(functions), target=metal_target(), pipeline=limits.PIPELINE)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_computes_its_reference(library: Library, name: str) -> None:
    device, module = library
    case = in_dtype(CASES[name], "float16")
    output = tvm.runtime.empty(*output_of(case), tvm.metal())
    device.clear()
    module[symbol(name)](*(tvm.runtime.tensor(o, tvm.metal()) for o in case.operands.values()), output)
    assert device.findings == ()
    assert error(case, output.numpy()) <= 1


# Two warps, the second with fewer rows.
SMALL = learned((7, 7), (3, 1), 1, 8, key_bias=8, bias=True, batch=1)


def test_bfloat16() -> None:
    case = in_dtype(SMALL, "bfloat16")
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


def unfused(case: Case) -> np.ndarray:
    """What the op's body makes of it, rounded after each operator; sums are float32."""
    operands, dtype = case.operands, case.operands["query"].dtype

    def rounded(array: np.ndarray) -> np.ndarray:
        return array.astype(dtype).astype(np.float32)

    def shifted(name: str) -> np.ndarray:
        neighbours = reference._neighbours(case.spec.geometry, {name: operands[name]}, name, np.float32)
        kernel = operands[f"{name}_kernel"].astype(np.float32)
        kernel = reference._row_per_channel(kernel.reshape(*kernel.shape[:2], -1), neighbours.shape[1])
        slots = rounded(np.einsum("bcpt,cjt->bcpj", neighbours, kernel))
        if (bias := operands.get(f"{name}_bias")) is not None:
            slots = rounded(slots + reference._row_per_channel(bias, slots.shape[1]).astype(np.float32)[:, None])
        return slots

    heads, query = case.spec.num_heads, operands["query"].astype(np.float32)
    products = rounded(rounded(query * np.float32(case.spec.scale)).reshape(*query.shape[:2], -1, 1) * shifted("key"))
    logits = rounded(of_heads(products, heads).sum(2)) + operands["bias"].astype(np.float32)[:, None]
    weights = rounded(reference.softmax(rounded(logits), -1))
    values = rounded(weights[:, :, None] * of_heads(shifted("value"), heads))
    total = np.zeros(values.shape[:-1], np.float32)
    for slot in range(values.shape[-1]):
        total = rounded(total + values[..., slot])
    return total.reshape(output_of(case)[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_it_is_nearer_to_the_truth_than_the_ops_body(dtype: str) -> None:
    """Though it rounds products of which the body rounds the sums."""
    case = in_dtype(learned((4, 8), (3, 3), 1, 16, bias=True), dtype)
    expected = reference.slide_attention(case.spec, exact(case))
    ours, theirs = (np.abs(o.astype(np.float64) - expected) for o in (run(case)[0], unfused(case)))
    assert ours.mean() < 0.5 * theirs.mean()
    assert ours.max() < theirs.max()


def test_images_in_a_row_share_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them, two by two, so that the last threadgroup has one."""
    monkeypatch.setattr(slide_tensor_learned, "choose_run", lambda *_: 2)
    case = in_dtype(learned((4, 8), (3, 1), 1, 8, bias=True, batch=3, symbolic=True), "float16")
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


def test_parts_of_wider_maps() -> None:
    """All that lies between them is NaN."""
    case = in_dtype(learned((3, 6), (1, 3), 2, 6), "float16")
    steps = {name: case.operands[name].shape[1] + more for name, more in (("query", 2), ("key", 1), ("value", 9))}
    operands = dict(case.operands)
    for name, step in steps.items():
        images, channels, *extents = operands[name].shape
        wider = np.full((images, step, *extents), np.nan, np.float16)
        wider[:, :channels] = operands[name]
        operands[name] = wider.reshape(-1)[: wider.size - (step - channels) * math.prod(extents)]
    done = run_function(kernel(case, steps=steps), list(operands.values()), [output_of(case)])
    assert done.findings == ()
    assert error(case, done.outputs[0]) <= 1


def test_the_scale_comes_before_the_product() -> None:
    """Of queries and keys, which would leave float16 without it. Powers of two, so that logits are exact. A scale below
    zero does, too.
    """
    case = in_dtype(learned((4, 8), (3, 1), 1, 64, key_kernel=0, batch=1), "float16")
    case = scaled(case, -case.spec.scale)
    for name in ("query", "key"):
        case.operands[name][:] = np.sign(case.operands[name]) * 512
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


def taps_exchanged(self: Any, row: int, tap: int) -> int:
    return self.offsets.index(row + self.taps[0] - 1 - tap)


def channels_exchanged(self: TensorCore, a: Any, b: Any) -> Any:
    return self._call("firsts", b, a)


KERNEL = slide_tensor_learned._LearnedKernel
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "taps exchanged": (KERNEL, "neighbour", taps_exchanged),
    "channels exchanged": (TensorCore, "firsts", channels_exchanged),
    "kernels not staged": (Staging, "stage_parameters", lambda self, operand, first_head, chunk: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(*FAULTS[fault])
    case = in_dtype(SMALL, "float16")
    output, findings = run(case)
    assert findings or error(case, output) > 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any geometry that the kernel takes, of up to 15 slots."""
    kernel = draw(st.sampled_from([(1, 1), (3, 1), (1, 3), (3, 3), (5, 1), (1, 7), (3, 5), (1, 15)]))
    feature = draw(st.tuples(st.integers(1, 18), st.integers(1, 26)))
    heads, head_dim, value_dim = (draw(st.integers(1, most)) for most in (4, 40, 40))
    rows = {
        f"{name}_{kind}": draw(st.sampled_from([0, channels, heads * channels]))
        for name, channels in (("key", head_dim), ("value", value_dim))
        for kind in ("kernel", "bias")
    }
    more = {name: draw(st.booleans()) for name in ("bias", "one_bias", "bias_of_pixels", "symbolic")}
    dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return slide(feature, kernel, dilation, heads, head_dim, value_dim, **rows, **more, batch=draw(st.integers(1, 2)))


@settings(max_examples=2, deadline=None, derandomize=True)
@given(cases(), st.sampled_from(["float16", "bfloat16"]))
def test_any_geometry(case: Case, dtype: str) -> None:
    case = in_dtype(case, dtype)
    if tiling_of(case.spec, {name: o.shape for name, o in case.operands.items()}, Limits.of(emulated_cuda())) is None:
        return
    output, findings = run(case)
    assert findings == ()
    assert error(case, output) <= 1


def takes_case(case: Case, dtype: str, chip: str) -> bool:
    return takes(case.spec, {name: o.shape for name, o in case.operands.items()}, dtype, cuda_target(chip))


def test_what_it_takes_and_what_not() -> None:
    assert takes_case(SMALL, "float16", "sm_75")
    assert takes_case(SMALL, "bfloat16", "sm_80")
    assert takes_case(SLIDES["learned-k5"], "float16", "sm_80")
    assert not takes_case(SMALL, "float32", "sm_90")  # would not be exact
    assert not takes_case(SMALL, "bfloat16", "sm_75")  # its tensor cores do not multiply it
    assert not takes_case(SLIDES["k3"], "float16", "sm_90")  # nothing learned
    assert not takes_case(learned((8, 8), (7, 7), 1, 8), "float16", "sm_90")  # 49 slots
    assert takes_case(scaled(SMALL, -3.0), "float16", "sm_90")
    for scale in (0.0, 1e-8, math.inf, math.nan):  # no power of two near it multiplies the queries
        assert not takes_case(scaled(SMALL, scale), "float16", "sm_90")
    assert not takes_case(SLIDES["three-axes"], "float16", "sm_90")
    assert not takes(SMALL.spec, {n: o.shape for n, o in SMALL.operands.items()}, "float16", metal_target())


@pytest.mark.parametrize(("dtype", "on_tensor_cores"), [("float16", True), ("float32", False)])
def test_it_is_chosen_for_half_precision(dtype: str, on_tensor_cores: bool) -> None:
    shapes = {name: o.shape for name, o in SMALL.operands.items()}
    chosen = attention_kernel(SMALL.spec, shapes, dict.fromkeys(shapes, dtype), cuda_target("sm_80"), "run")
    assert ("attnrewrite_mma_float16" in chosen.script()) == on_tensor_cores


def slide_swin(extent: int, heads: int, head_dim: int = 32, batch: int = 64) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Spec and shapes of Slide-Swin's op on a map of so many pixels a side."""
    case = learned((extent, extent), (3, 3), heads, head_dim, key_bias=heads * head_dim, value_bias=head_dim, batch=1)
    shapes = {name: o.shape for name, o in case.operands.items()}
    return case.spec, {n: (batch, *s[1:]) if n in ("query", "key", "value") else s for n, s in shapes.items()}


@pytest.mark.parametrize("chip", ["sm_75", "sm_90"])
@pytest.mark.parametrize(("extent", "heads"), [(56, 3), (28, 6), (14, 12), (7, 24), (5, 1), (33, 4)])
@pytest.mark.parametrize("head_dim", [5, 16, 32, 48, 128])
def test_tilings_keep_to_the_limits(extent: int, heads: int, head_dim: int, chip: str) -> None:
    spec, shapes = slide_swin(extent, heads, head_dim)
    tiling = tiling_of(spec, shapes, Limits.of(cuda_target(chip)))
    assert tiling is not None
    assert 2 * tiling.shared_elements <= 49152
    assert math.prod(tiling.warps) <= MAX_WARPS
    assert heads % tiling.heads == 0
    queries = math.prod(reach.tile * reach.tiles for reach in tiling.reaches)
    # 7 x 7 queries are padded to 8 x 8, 5 x 5 to 8 x 8, 33 x 33 to 36 x 40.
    assert queries <= extent**2 * (2.6 if extent == 5 else 1.33)


def compiled(extent: int, heads: int, head_dim: int, *chips: str) -> list[Any]:
    spec, shapes = slide_swin(extent, heads, head_dim)
    function = slide_tensor_learned.slide_attention(spec, Operands(shapes, "float16"), cuda_target(chips[0]), "run")
    return resources(function, *chips)


def test_it_compiles_without_spills() -> None:
    kernels = compiled(28, 6, 32, "sm_75", "sm_90")
    assert [kernel.arch for kernel in kernels] == ["sm_75", "sm_90"]
    assert not any(kernel.spills for kernel in kernels)
    # Two threadgroups of 256 threads on a multiprocessor from sm_80 on, by registers (64 K).
    assert kernels[1].registers <= 128


@pytest.mark.slow
@pytest.mark.parametrize(("extent", "heads"), [(56, 3), (28, 6), (14, 12), (7, 24)])
@pytest.mark.parametrize("head_dim", [5, 16, 32, 64, 128])
def test_no_geometry_spills_on_any_preset(extent: int, heads: int, head_dim: int) -> None:
    kernels = compiled(extent, heads, head_dim, *CUDA_PRESETS)
    assert [kernel.arch for kernel in kernels] == list(CUDA_PRESETS)
    assert [kernel for kernel in kernels if kernel.spills] == []
