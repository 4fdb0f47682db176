"""`--precision` on CPUs: products by weights with narrow operands, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

pytest.importorskip("tvm")

from tvm.target import Target, codegen

from attnrewrite.errors import UserError
from attnrewrite.lowering.compile import compile_model
from attnrewrite.lowering.narrow import to_bf16
from attnrewrite.lowering.targets import parse_target
from tests.lowering.assembly import assembly, multiply_add_loops
from tests.lowering.compiling import artifact, compiled, model, node, normal, reference, relative_error

HOST = Target({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()})
needs_bf16 = pytest.mark.skipif(
    not codegen.target_has_features("avx512bf16", HOST), reason="this CPU does not multiply bfloat16 values"
)
PRECISIONS = ["fp16", pytest.param("bf16", marks=needs_bf16)]
# Products of rounded operands are exact in float32; what is left is the order of the sums.
EXACT = 2e-6


def rounded(values, precision):
    """float32 values as the precision keeps them."""
    if precision == "fp16":
        return values.astype(np.float16).astype(np.float32)
    return (to_bf16(values).astype(np.uint32) << 16).view(np.float32)


def linear(m, k, n, weights=None):
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    return model(nodes, {"x": [m, k]}, {"w": normal(k, n) if weights is None else weights, "b": normal(n)})


def convolution(channels, features, weights):
    nodes = [node("Conv", "x w b", "y", kernel_shape=[3, 3], pads=[1, 1, 1, 1])]
    return model(nodes, {"x": [1, channels, 11, 13]}, {"w": weights, "b": normal(features)})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("m", "k", "n"), [(49, 96, 128), (53, 38, 71), (1, 64, 1003)])
def test_linear_layer_is_a_product_of_rounded_operands(precision, m, k, n):
    x, w = normal(m, k), normal(k, n)
    found = compiled(linear(m, k, n, w), precision)(x)
    features = rounded(x, precision) if precision == "bf16" else x
    assert relative_error(found, reference(linear(m, k, n, rounded(w, precision)), features)) <= EXACT
    assert relative_error(found, reference(linear(m, k, n, w), x)) > 1e-5


@pytest.mark.parametrize("precision", PRECISIONS)
def test_convolution_is_a_product_of_rounded_operands(precision):
    x, w = normal(1, 12, 11, 13), normal(20, 12, 3, 3)
    found = compiled(convolution(12, 20, w), precision)(x)
    features = rounded(x, precision) if precision == "bf16" else x
    assert relative_error(found, reference(convolution(12, 20, rounded(w, precision)), features)) <= EXACT


@needs_bf16
def test_channels_that_do_not_pair_stay_float32():
    x = normal(17, 37)
    assert relative_error(compiled(linear(17, 37, 24), "bf16")(x), reference(linear(17, 37, 24), x)) <= EXACT


def test_bfloat16_rounds_to_even_and_keeps_what_is_no_number():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0xFF800000, 0x7F800001, 0x80000000], np.uint32)
    assert [*to_bf16(bits.view(np.float32))] == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80, 0x7FC0, 0x8000]


@needs_bf16
def test_what_is_no_number_passes_through():
    x = normal(3, 32)
    x[0, 5], x[1, 7] = np.nan, np.inf
    found = compiled(linear(3, 32, 16, np.abs(normal(32, 16))), "bf16")(x)
    assert np.isnan(found[0]).all()
    assert np.isposinf(found[1]).all()
    assert np.isfinite(found[2]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activations_beyond_float16_stay_finite(precision):
    """Two layers with a norm and a softmax; 1e5 and its products are infinite in float16."""
    nodes = [
        node("MatMul", "x w", "p"),
        node("Add", "p b", "a"),
        node("LayerNormalization", "a g b", "n", axis=-1, epsilon=1e-5),
        node("MatMul", "a v", "q"),
        node("Add", "q n", "s"),
        node("Softmax", "n", "t", axis=-1),
        node("Mul", "s t", "y"),
    ]
    weights = {"w": normal(64, 64), "v": normal(64, 64, seed=1), "b": normal(64), "g": normal(64, seed=2)}
    proto = model(nodes, {"x": [9, 64]}, weights)
    x = 1e5 * normal(9, 64)
    assert not np.isfinite(x.astype(np.float16)).all()
    found = compiled(proto, precision)(x)
    assert np.isfinite(found).all()
    assert relative_error(found, reference(proto, x)) <= 2e-2


def test_weights_beyond_float16_become_its_largest_number():
    w = normal(32, 16)
    w[3, 4], w[5, 6] = 1e6, -1e6
    limited = np.clip(w, -65504, 65504)
    x = normal(5, 32)
    found = compiled(linear(5, 32, 16, w), "fp16")(x)
    assert relative_error(found, reference(linear(5, 32, 16, rounded(limited, "fp16")), x)) <= EXACT


@pytest.mark.parametrize("precision", PRECISIONS)
def test_library_holds_the_weights_once_and_narrow(tmp_path, precision):
    proto = linear(8, 512, 1024)
    wide = artifact(proto, tmp_path / "wide", "cpu").library_bytes
    narrow = artifact(proto, tmp_path / "narrow", "cpu", precision=precision)
    assert [t.dtype for t in (*narrow.inputs, *narrow.outputs)] == ["float32", "float32"]
    assert wide - narrow.library_bytes >= 0.9 * 512 * 1024 * 2


def test_targets_without_bfloat16_are_told_so(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(linear(8, 32, 16), path)
    without = "precision bf16 is for x86 CPUs and CUDA; target {} has fp32 and fp16"
    older = "precision bf16 is for CUDA from sm_80 on; target {} begins with sm_75"
    for target, sentence in [
        ("arm:cortex-a76", without),
        ("metal", without),
        ("cuda:sm_75", older),
        ("cuda:all", older),
    ]:
        with pytest.raises(UserError, match=sentence.format(target)):
            compile_model(path, parse_target(target), tmp_path, precision="bf16")
    old = parse_target("cpu", '{"mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}')
    with pytest.raises(UserError, match=r"precision bf16 needs an x86 CPU with AVX512-BF16"):
        compile_model(path, old, tmp_path, precision="bf16")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("target", "tvm_target", "precision", "instruction"),
    [
        ("cpu", '{"mtriple": "x86_64-linux-gnu", "mcpu": "znver4"}', "bf16", "vdpbf16ps"),
        ("cpu", '{"mtriple": "x86_64-linux-gnu", "mcpu": "skylake-avx512"}', "fp16", "vfmadd231ps"),
        ("arm:cortex-a76", None, "fp16", "fmla"),
        ("arm:apple-m1", None, "fp16", "fmla"),
    ],
)
def test_narrow_products_keep_their_sums_in_registers(target, tvm_target, precision, instruction):
    loops = multiply_add_loops(assembly(linear(196, 384, 384), target, tvm_target, precision))
    assert loops
    for loop in loops:
        assert any(instruction in line for line in loop.lines)
        assert not loop.spills
        assert not loop.lane_by_lane
