"""The CPU kernels against the NumPy references. Extents of different axes differ, so that none can be confused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tvm.target import Target, codegen  # noqa: E402
from tvm.tirx import Var  # noqa: E402

from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention, Spec  # noqa: E402
from attnrewrite.localattention.geometry import KeyWindows, NeighborhoodGeometry, WindowGeometry  # noqa: E402
from attnrewrite.lowering.kernels import reference, slide_cpu, window_cpu, window_cpu_operands  # noqa: E402
from attnrewrite.lowering.kernels.vector_math import vector_unit  # noqa: E402

HOST = Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
# float32 sums of up to about 600 products of order 1, against a reference in float64.
FLOAT32 = 1e-5
# The result is rounded to float16 once, half an ulp of the largest; everything between is float32.
FLOAT16 = 2.0**-11 * 1.1

Operands = dict[str, np.ndarray]


def narrower_targets() -> dict[str, Target]:
    """Targets with shorter vectors than the host's that the host can run."""
    targets = {"4 lanes": Target({"kind": "llvm"})}
    if codegen.target_has_features("avx512f", HOST):
        targets["8 lanes"] = Target({"kind": "llvm", "mcpu": "haswell"})
    return targets


def laid_out(spec: Spec, operands: Operands, target: Target = HOST) -> Operands:
    """The operands as the kernel reads them."""
    if isinstance(spec, SlideAttention):
        return operands
    lanes = vector_unit(target).lanes
    return {name: window_cpu_operands.lay_out(name, array, spec, lanes) for name, array in operands.items()}


def compile_kernel(spec: Spec, operands: Operands, target: Target = HOST, symbolic: bool = False):
    """A module whose `attend` takes the operands, laid out, and the output as TVM tensors."""
    batched = ("query", "key", "value")
    batch = Var("n", "int64")
    shapes = {
        name: (batch, *array.shape[1:]) if symbolic and name in batched else array.shape
        for name, array in laid_out(spec, operands, target).items()
    }
    make = window_cpu.flash_window_attention if isinstance(spec, FlashWindowAttention) else slide_cpu.slide_attention
    kernel = make(spec, tuple(operands), shapes, str(operands["query"].dtype), target, "attend")
    return tvm.compile(tvm.IRModule({"attend": kernel}), target)


def run_kernel(module, spec: Spec, operands: Operands, target: Target = HOST) -> np.ndarray:
    size = operands["query"].shape[:-1] if isinstance(spec, FlashWindowAttention) else ()
    value = operands["value"]
    output = tvm.runtime.tensor(np.full((*size, value.shape[-1]) if size else value.shape, 7.0, value.dtype))
    arrays = laid_out(spec, operands, target)
    module["attend"](*(tvm.runtime.tensor(arrays[name]) for name in spec.operands if name in arrays), output)
    return output.numpy()


def expected(spec: Spec, operands: Operands) -> np.ndarray:
    oracle = reference.flash_window_attention if isinstance(spec, FlashWindowAttention) else reference.slide_attention
    return oracle(spec, operands)


def assert_close(found: np.ndarray, wanted: np.ndarray, tolerance: float) -> None:
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    error = np.nanmax(np.abs(found - wanted)) / np.nanmax(np.abs(wanted))
    assert error <= tolerance


def check(spec: Spec, operands: Operands, tolerance: float = FLOAT32, target: Target = HOST) -> None:
    module = compile_kernel(spec, operands, target)
    assert_close(run_kernel(module, spec, operands, target), expected(spec, operands), tolerance)


def window_spec(feature, window, shift=None, padded=False, heads=2, mask_value=None, keys=None) -> FlashWindowAttention:
    geometry = WindowGeometry(feature, window, shift or (0,) * len(window), padded, keys)
    return FlashWindowAttention(geometry, heads, 0.3, mask_value)


def window_operands(spec: FlashWindowAttention, optional=(), d=16, dv=None, batch=2, dtype="float32") -> Operands:
    """Random operands; `optional` names those beyond query, key and value: "window_bias" is a bias per window,
    "head_positions" one table of relative positions per head.
    """
    random = np.random.default_rng(7)
    geometry, heads = spec.geometry, spec.num_heads
    dv = d if dv is None else dv
    n, m, windows = geometry.tokens_per_window, geometry.keys_per_window, geometry.num_windows
    shapes = {
        "query": (batch, *geometry.feature_size, heads * d),
        "key": (batch, *geometry.key_size, heads * d),
        "value": (batch, *geometry.key_size, heads * dv),
        "bias": (windows if "window_bias" in optional else 1, heads, n, m),
        "mask": (windows, n if geometry.keys is None else 1, m),
        "key_padding": (heads * d,),
        "value_padding": (heads * dv,),
        "relative_position": (heads if "head_positions" in optional else 1, positions(spec), d),
    }
    wanted = {"query", "key", "value", *optional} | ({"bias"} if "window_bias" in optional else set())
    wanted |= {"relative_position"} if "head_positions" in optional else set()
    return {name: random.standard_normal(shapes[name]).astype(dtype) for name in spec.operands if name in wanted}


def positions(spec: FlashWindowAttention) -> int:
    """Rows of one table of relative positions per axis."""
    window, keys = spec.geometry.window_size, spec.geometry.keys
    return sum(n * m for n, m in zip(window, window if keys is None else keys.window_size, strict=True))


def slide_spec(feature, kernel, dilation=None, heads=2) -> SlideAttention:
    return SlideAttention(NeighborhoodGeometry(feature, kernel, dilation or (1,) * len(kernel)), heads, 0.3)


def slide_operands(spec: SlideAttention, optional=(), d=16, dv=None, batch=2, rows="d", dtype="float32") -> Operands:
    """Random operands; rows "d" or "heads*d" is the number of rows of the learned kernels and their biases."""
    random = np.random.default_rng(7)
    geometry, heads = spec.geometry, spec.num_heads
    dv = d if dv is None else dv
    repeat = 1 if rows == "d" else heads
    k = geometry.keys_per_query
    shapes = {
        "query": (batch, heads * d, *geometry.feature_size),
        "key": (batch, heads * d, *geometry.feature_size),
        "value": (batch, heads * dv, *geometry.feature_size),
        "bias": (heads, k),
        "key_kernel": (repeat * d, k, *geometry.kernel_size),
        "key_bias": (repeat * d, k),
        "value_kernel": (repeat * dv, k, *geometry.kernel_size),
        "value_bias": (repeat * dv, k),
    }
    wanted = {"query", "key", "value", *optional}
    return {name: random.standard_normal(shapes[name]).astype(dtype) for name in spec.operands if name in wanted}


ALL_WINDOW_OPERANDS = ("bias", "mask", "key_padding", "value_padding")
WINDOWS = {
    "1-d": (window_spec((12,), (4,)), {}),
    "1-d shifted": (window_spec((12,), (4,), (1,), mask_value=-100.0), {}),
    "2-d": (window_spec((6, 15), (3, 5)), {}),
    "2-d shifted on one axis": (window_spec((6, 15), (3, 5), (0, 2), mask_value=-100.0), {}),
    "2-d shifted": (window_spec((14, 21), (7, 7), (3, 2), mask_value=-100.0), {"optional": ("bias",)}),
    "2-d shifted without mask": (window_spec((14, 21), (7, 7), (3, 2)), {"optional": ("bias",)}),
    "2-d shifted, excluded": (window_spec((8, 12), (4, 4), (2, 1), mask_value=-math.inf), {}),
    "3-d": (window_spec((4, 6, 10), (2, 3, 5)), {}),
    "3-d shifted": (window_spec((4, 6, 10), (2, 3, 5), (1, 1, 2), mask_value=-100.0), {}),
    "padded": (window_spec((10, 12), (4, 5)), {"optional": ("key_padding", "value_padding")}),
    "padded with zeros": (window_spec((10, 12), (4, 5)), {}),
    "padded with a key only": (window_spec((10, 12), (4, 5)), {"optional": ("key_padding",)}),
    "shifted, then padded": (
        window_spec((10, 12), (4, 5), (2, 3), mask_value=-100.0),
        {"optional": ("key_padding", "value_padding")},
    ),
    "padded, then shifted": (
        window_spec((10, 12), (4, 5), (2, 3), padded=True, mask_value=-100.0),
        {"optional": ("key_padding", "value_padding")},
    ),
    "3-d padded, then shifted": (window_spec((3, 5, 7), (2, 3, 4), (1, 0, 2), padded=True), {}),
    "everything": (
        window_spec((10, 12), (4, 5), (2, 3), padded=True, mask_value=-5.0),
        {"optional": (*ALL_WINDOW_OPERANDS, "window_bias")},
    ),
    "mask": (window_spec((6, 15), (3, 5)), {"optional": ("mask",)}),
    "bias per window": (window_spec((6, 15), (3, 5)), {"optional": ("window_bias",)}),
    "head_dim 6": (window_spec((8, 12), (4, 4), heads=3), {"d": 6, "optional": ("bias",)}),
    "head_dim 30": (window_spec((8, 12), (4, 4)), {"d": 30}),
    "head_dim 64": (window_spec((8, 12), (4, 4)), {"d": 64}),
    "head_dim 7, of values 19": (window_spec((8, 12), (4, 4)), {"d": 7, "dv": 19}),
    "head_dim 40, of values 1": (window_spec((8, 12), (4, 4)), {"d": 40, "dv": 1}),
    "one head": (window_spec((8, 12), (4, 4), heads=1), {}),
    "one token per window": (window_spec((3, 5), (1, 1)), {}),
    "one window": (window_spec((7, 7), (7, 7), heads=4), {"batch": 1, "optional": ("bias",)}),
    "window 8": (window_spec((16, 24), (8, 8), (4, 4), mask_value=-100.0), {"optional": ("bias",), "d": 32}),
    "window 24": (window_spec((24, 48), (24, 24), (12, 12), mask_value=-100.0), {"optional": ("bias",), "batch": 1}),
}

HALO = KeyWindows((8, 12), (8, 6), (4, 4), (-2, -1), (1, 1))
DILATED = KeyWindows((8, 12), (3, 2), (4, 4), (0, 1), (2, 3))
POOLED = KeyWindows((16, 24), (8, 8), (8, 8), (0, 0), (1, 1))
KEY_WINDOWS = {
    "1-d halo": (window_spec((12,), (4,), keys=KeyWindows((12,), (8,), (4,), (-2,), (1,))), {}),
    "halo": (window_spec((8, 12), (4, 4), keys=HALO), {"optional": ("bias", "mask", "key_padding", "value_padding")}),
    "halo of zeros": (window_spec((8, 12), (4, 4), keys=HALO), {"d": 10, "optional": ("bias",)}),
    "halo around": (window_spec((8, 12), (4, 4), keys=replace(HALO, border="wrap")), {}),
    "halo of the edge": (window_spec((8, 12), (4, 4), (1, 2), keys=replace(HALO, border="edge")), {}),
    "halo reflected": (window_spec((8, 12), (4, 4), keys=replace(HALO, border="reflect")), {"d": 24}),
    "halo shifted": (window_spec((8, 12), (4, 4), (1, 2), keys=HALO), {"optional": ("window_bias",)}),
    "halo of a padded map": (window_spec((7, 12), (4, 4), (2, 0), keys=replace(HALO, feature_size=(7, 12))), {}),
    "dilated keys": (window_spec((8, 12), (4, 4), keys=DILATED), {}),
    "keys of a larger map": (window_spec((8, 12), (4, 4), (0, 2), keys=POOLED), {"optional": ("bias",)}),
    "many keys": (
        window_spec((16, 32), (16, 16), keys=KeyWindows((16, 32), (26, 26), (16, 16), (-5, -5), (1, 1))),
        {"batch": 1, "d": 10, "optional": ("bias",)},
    ),
}

RELATIVE_POSITIONS = {
    "1-d": (window_spec((12,), (4,)), {"optional": ("relative_position",)}),
    "2-d": (window_spec((6, 15), (3, 5), (1, 2), mask_value=-100.0), {"optional": ("relative_position", "bias")}),
    "2-d padded": (
        window_spec((30, 20), (14, 14)),
        {"optional": ("relative_position", "key_padding", "value_padding")},
    ),
    "3-d per head": (window_spec((4, 6, 10), (2, 3, 5)), {"optional": ("head_positions",)}),
    "long rows": (window_spec((4, 36), (2, 18)), {"optional": ("head_positions",), "d": 7}),
    "one window": (window_spec((12, 20), (12, 20)), {"optional": ("relative_position",), "batch": 1}),
    "halo": (window_spec((8, 12), (4, 4), keys=HALO), {"optional": ("relative_position",)}),
}

# Those of the kernel; the other operands of the op are computed by its written-out body (coverage.py).
ALL_SLIDE_OPERANDS = ("bias", "key_kernel", "key_bias", "value_kernel", "value_bias")
SLIDES = {
    "1-d": (slide_spec((13,), (3,)), {}),
    "1-d shorter than the kernel": (slide_spec((3,), (7,)), {}),
    "2-d kernel 3": (slide_spec((11, 18), (3, 3)), {}),
    "2-d kernel 5": (slide_spec((11, 18), (5, 5)), {}),
    "2-d kernel 7": (slide_spec((30, 41), (7, 7)), {}),
    "2-d kernel 13": (slide_spec((30, 41), (13, 13)), {"batch": 1}),
    "2-d kernel 3 x 5": (slide_spec((11, 18), (3, 5)), {}),
    "2-d kernel 1 x 3": (slide_spec((5, 18), (1, 3)), {}),
    "2-d kernel 3 x 1": (slide_spec((5, 18), (3, 1)), {}),
    "dilated 2": (slide_spec((30, 41), (3, 3), (2, 2)), {}),
    "dilated 3 x 2": (slide_spec((19, 41), (5, 3), (3, 2)), {}),
    "dilated beyond the map": (slide_spec((4, 6), (3, 3), (5, 7)), {}),
    "3-d": (slide_spec((3, 5, 17), (3, 5, 3)), {}),
    "3-d dilated": (slide_spec((5, 7, 9), (3, 3, 3), (2, 1, 3)), {}),
    "4-d": (slide_spec((2, 3, 4, 5), (3, 1, 3, 3)), {}),
    "row of one pixel": (slide_spec((9, 1), (3, 3)), {}),
    "row of fifteen pixels": (slide_spec((4, 15), (3, 3)), {}),
    "row of sixteen pixels": (slide_spec((4, 16), (3, 3)), {}),
    "two strips across": (slide_spec((3, 300), (3, 3)), {"d": 8, "batch": 1}),
    "four strips across": (slide_spec((7, 1000), (3, 5), (1, 3)), {"d": 4, "batch": 1}),
    "bias": (slide_spec((11, 18), (3, 3)), {"optional": ("bias",)}),
    "key bias": (slide_spec((11, 18), (3, 3)), {"optional": ("key_bias",)}),
    "value bias": (slide_spec((11, 18), (3, 3)), {"optional": ("value_bias",)}),
    "key kernel": (slide_spec((11, 18), (3, 3)), {"optional": ("key_kernel",)}),
    "value kernel": (slide_spec((11, 18), (3, 3)), {"optional": ("value_kernel",)}),
    "value kernel and key bias": (slide_spec((11, 18), (3, 3)), {"optional": ("value_kernel", "key_bias")}),
    "everything": (slide_spec((11, 18), (3, 3), (2, 1)), {"optional": ALL_SLIDE_OPERANDS}),
    "everything per head": (slide_spec((11, 18), (3, 3)), {"optional": ALL_SLIDE_OPERANDS, "rows": "heads*d"}),
    "everything 5 x 3": (slide_spec((11, 18), (5, 3)), {"optional": ALL_SLIDE_OPERANDS, "d": 8}),
    "everything 1-d": (slide_spec((18,), (5,)), {"optional": ALL_SLIDE_OPERANDS, "d": 8}),
    "everything 3-d": (slide_spec((3, 4, 10), (3, 1, 3)), {"optional": ALL_SLIDE_OPERANDS, "d": 8}),
    "head_dim 6": (slide_spec((11, 18), (3, 3), heads=3), {"d": 6}),
    "head_dim 30": (slide_spec((11, 18), (3, 3)), {"d": 30}),
    "head_dim 7, of values 19": (slide_spec((11, 18), (3, 3)), {"d": 7, "dv": 19}),
    "head_dim 40, of values 1": (slide_spec((11, 18), (3, 3)), {"d": 40, "dv": 1}),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_window_attention(case):
    spec, options = WINDOWS[case]
    check(spec, window_operands(spec, **options))


@pytest.mark.parametrize("case", KEY_WINDOWS)
def test_window_attention_to_keys_elsewhere(case):
    spec, options = KEY_WINDOWS[case]
    check(spec, window_operands(spec, **options))


@pytest.mark.parametrize("case", RELATIVE_POSITIONS)
def test_window_attention_with_relative_positions(case):
    spec, options = RELATIVE_POSITIONS[case]
    spec = replace(spec, relative_scale=0.2)
    check(spec, window_operands(spec, **options))


@pytest.mark.parametrize("case", SLIDES)
def test_slide_attention(case):
    spec, options = SLIDES[case]
    check(spec, slide_operands(spec, **options))


@pytest.mark.parametrize("lanes", narrower_targets())
@pytest.mark.parametrize("case", ["2-d shifted", "everything", "head_dim 7, of values 19", "window 24", "many keys"])
def test_window_attention_with_shorter_vectors(case, lanes):
    spec, options = {**WINDOWS, **KEY_WINDOWS}[case]
    check(spec, window_operands(spec, **options), target=narrower_targets()[lanes])


@pytest.mark.parametrize("lanes", narrower_targets())
@pytest.mark.parametrize("case", ["2-d kernel 7", "dilated 3 x 2", "everything", "head_dim 7, of values 19"])
def test_slide_attention_with_shorter_vectors(case, lanes):
    spec, options = SLIDES[case]
    check(spec, slide_operands(spec, **options), target=narrower_targets()[lanes])


@pytest.mark.parametrize("case", ["2-d shifted", "everything", "head_dim 30"])
def test_window_attention_in_float16(case):
    spec, options = WINDOWS[case]
    check(spec, window_operands(spec, dtype="float16", **options), FLOAT16)


@pytest.mark.parametrize("case", ["2-d kernel 5", "row of fifteen pixels", "everything"])
def test_slide_attention_in_float16(case):
    spec, options = SLIDES[case]
    check(spec, slide_operands(spec, dtype="float16", **options), FLOAT16)


@pytest.mark.parametrize("case", ["2-d shifted", "everything"])
def test_window_attention_takes_any_batch(case):
    spec, options = WINDOWS[case]
    module = compile_kernel(spec, window_operands(spec, **options), symbolic=True)
    for batch in (1, 2, 5):
        operands = window_operands(spec, **{**options, "batch": batch})
        assert_close(run_kernel(module, spec, operands), expected(spec, operands), FLOAT32)


@pytest.mark.parametrize("case", ["2-d kernel 3", "everything"])
def test_slide_attention_takes_any_batch(case):
    spec, options = SLIDES[case]
    module = compile_kernel(spec, slide_operands(spec, **options), symbolic=True)
    for batch in (1, 2, 5):
        operands = slide_operands(spec, **{**options, "batch": batch})
        assert_close(run_kernel(module, spec, operands), expected(spec, operands), FLOAT32)


def test_excluded_keys_have_exactly_no_weight():
    spec, options = WINDOWS["mask"]
    operands = window_operands(spec, **options)
    operands["mask"] = np.where(np.random.default_rng(3).random(operands["mask"].shape) < 0.5, -np.inf, 0).astype("f")
    operands["mask"][:, :, 0] = 0
    excluded_everywhere = 4
    operands["mask"][:, :, excluded_everywhere] = -np.inf
    module = compile_kernel(spec, operands)
    found = run_kernel(module, spec, operands)
    assert_close(found, expected(spec, operands), FLOAT32)
    pixels = spec.geometry.pixels()[:, excluded_everywhere]
    operands["value"].reshape(2, -1, operands["value"].shape[-1])[:, pixels] = 1e30
    assert np.array_equal(run_kernel(module, spec, operands), found)


def test_a_row_without_keys_is_nan_and_only_that_row():
    spec, options = WINDOWS["mask"]
    operands = window_operands(spec, **options)
    operands["mask"][1, 3] = -np.inf
    found = run_kernel(compile_kernel(spec, operands), spec, operands)
    assert_close(found, expected(spec, operands), FLOAT32)
    assert np.isnan(found).sum() == operands["value"].shape[0] * operands["value"].shape[-1]


def test_keys_excluded_in_whole_blocks():
    """More keys than are computed at a time: for some queries those of the first block are all excluded."""
    spec = window_spec((24, 24), (24, 24))
    operands = window_operands(spec, ("mask",), batch=1)
    operands["mask"][0, ::3, :550] = -np.inf
    operands["mask"][0, 1::3, 20:] = -np.inf
    operands["mask"][0, 7] = -np.inf
    check(spec, operands)


def test_a_row_of_the_lowest_number_is_a_mean():
    spec = window_spec((6, 15), (3, 5))
    operands = window_operands(spec, ("mask",))
    operands["mask"][1, 3] = np.finfo(np.float32).min
    operands["query"][:] = 0
    check(spec, operands)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits_stay_finite(scale):
    """Softmax is an argmax here; the logits of the two largest keys differ by far more than float32 rounds them."""
    windows, slides = window_spec((6, 15), (3, 5)), slide_spec((11, 18), (3, 3))
    for spec, operands in (
        (replace(windows, scale=scale), window_operands(windows, d=1)),
        (replace(slides, scale=scale), slide_operands(slides, d=1)),
    ):
        for name in ("query", "key"):
            operands[name] = np.round(operands[name] * 4) / 4
        check(spec, operands)


def test_nan_in_a_query_reaches_its_own_pixel_only():
    spec, options = WINDOWS["2-d shifted"]
    operands = window_operands(spec, **options)
    operands["query"][1, 5, 6, 3] = np.nan
    found = run_kernel(compile_kernel(spec, operands), spec, operands)
    assert_close(found, expected(spec, operands), FLOAT32)


@pytest.mark.parametrize("wrong", ["doubled", "shifted", "nan"])
def test_the_comparison_fails_on_wrong_outputs(wrong):
    right = np.random.default_rng(1).standard_normal((3, 5, 7))
    outputs = {"doubled": right * 2, "shifted": np.roll(right, 1, 1), "nan": np.where(right > 2, np.nan, right)}
    with pytest.raises(AssertionError):
        assert_close(outputs[wrong], right, FLOAT32)


@pytest.mark.parametrize("mcpu", ["cortex-a76", "skylake-avx512"])
def test_kernels_compile_for_other_machines(mcpu):
    triple = "aarch64-linux-gnu" if mcpu == "cortex-a76" else "x86_64-linux-gnu"
    target = Target({"kind": "llvm", "mtriple": triple, "mcpu": mcpu})
    for (spec, options), operands in ((WINDOWS["everything"], window_operands), (SLIDES["everything"], slide_operands)):
        compile_kernel(spec, operands(spec, dtype="float16", **options), target)


few_examples = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@st.composite
def window_specs(draw) -> FlashWindowAttention:
    axes = draw(st.integers(1, 3))
    window = tuple(draw(st.integers(1, 5)) for _ in range(axes))
    feature = tuple(draw(st.integers(w, 11)) for w in window)
    shift = tuple(draw(st.integers(0, w - 1)) for w in window)
    mask_value = draw(st.sampled_from([None, -100.0, -math.inf]))
    return window_spec(feature, window, shift, draw(st.booleans()), draw(st.integers(1, 3)), mask_value)


@few_examples
@given(window_specs(), st.sets(st.sampled_from([*ALL_WINDOW_OPERANDS, "window_bias"])), st.integers(1, 20))
def test_any_small_window_attention(spec, optional, head_dim):
    check(spec, window_operands(spec, optional, d=head_dim, dv=head_dim + 1))


@st.composite
def slide_specs(draw) -> SlideAttention:
    axes = draw(st.integers(1, 3))
    feature = tuple(draw(st.integers(1, 19)) for _ in range(axes))
    kernel = tuple(draw(st.sampled_from([1, 3, 5])) for _ in range(axes))
    dilation = tuple(draw(st.integers(1, 3)) for _ in range(axes))
    return slide_spec(feature, kernel, dilation, draw(st.integers(1, 3)))


@few_examples
@given(slide_specs(), st.sets(st.sampled_from(["bias", "key_bias", "value_bias"])), st.integers(1, 20))
def test_any_small_slide_attention(spec, optional, head_dim):
    check(spec, slide_operands(spec, optional, d=head_dim, dv=head_dim + 1))
