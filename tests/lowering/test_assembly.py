"""The inner loops of matrix products, read in the assembly of every kind of vector unit: sums stay in registers."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

pytest.importorskip("tvm")

from attnrewrite.functions.spec import DOMAIN, FlashWindowAttention
from attnrewrite.localattention.geometry import WindowGeometry
from attnrewrite.lowering import build
from attnrewrite.lowering.kernels.vector_math import VectorUnit
from attnrewrite.lowering.schedules import cpu
from tests.lowering.assembly import Loop, assembly, innermost_loops, multiply_add_loops
from tests.lowering.compiling import model, node, normal

TARGETS = {
    "cortex-a76": ("arm:cortex-a76", None),
    "apple-m1": ("arm:apple-m1", None),
    "neoverse-v1": ("arm:neoverse-v1", None),
    "avx2": ("cpu", '{"mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}'),
    "avx512": ("cpu", '{"mtriple": "x86_64-linux-gnu", "mcpu": "skylake-avx512"}'),
}


def linear(m, k, n):
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "y")]
    return model(nodes, {"x": [1, m, k]}, {"w": normal(k, n), "b": normal(n)})


def linear_gelu(m, k, n):
    nodes = [
        node("MatMul", "x w", "p"),
        node("Add", "p b", "a"),
        node("Div", "a root", "d"),
        node("Erf", "d", "e"),
        node("Add", "e one", "o"),
        node("Mul", "a o", "y"),
    ]
    constants = {"root": np.array(2.0**0.5, np.float32), "one": np.array(1.0, np.float32)}
    return model(nodes, {"x": [1, m, k]}, {"w": normal(k, n), "b": normal(n), **constants})


def linear_residual(m, k, n):
    nodes = [node("MatMul", "x w", "p"), node("Add", "p b", "a"), node("Add", "a r", "y")]
    return model(nodes, {"x": [1, m, k], "r": [1, m, n]}, {"w": normal(k, n), "b": normal(n)})


def batched(b, m, k, n):
    return model([node("MatMul", "x z", "y")], {"x": [1, b, m, k], "z": [1, b, k, n]})


def convolution(channels, size, features, kernel):
    nodes = [node("Conv", "x w b", "y", kernel_shape=[kernel, kernel], pads=[kernel // 2] * 4)]
    weights = {"w": normal(features, channels, kernel, kernel), "b": normal(features)}
    return model(nodes, {"x": [1, channels, size, size]}, weights)


# Layers of Swin-T, then extents that nothing divides.
PRODUCTS = {
    "projection": lambda: linear(3136, 96, 96),
    "merging": lambda: linear(784, 384, 192),
    "gelu": lambda: linear_gelu(196, 384, 1536),
    "residual": lambda: linear_residual(196, 1536, 384),
    "49 rows": lambda: linear(49, 768, 768),
    "odd": lambda: linear(53, 37, 71),
    "odd and wide": lambda: linear(17, 61, 1003),
    "logits": lambda: batched(24, 49, 32, 49),
    "odd batched": lambda: batched(3, 17, 23, 29),
    "1 x 1": lambda: convolution(96, 28, 96, 1),
    "3 x 3": lambda: convolution(60, 28, 60, 3),
    "3 x 3, odd": lambda: convolution(13, 17, 19, 3),
}


def assert_sums_stay_in_registers(loop: Loop) -> None:
    assert not loop.spills
    assert not loop.lane_by_lane


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("target", TARGETS)
def test_inner_loop_of_a_product(target, product):
    loops = multiply_add_loops(assembly(PRODUCTS[product](), *TARGETS[target]))
    assert loops
    for loop in loops:
        assert_sums_stay_in_registers(loop)


@pytest.mark.parametrize("target", ["cortex-a76", "avx2"])
def test_inner_loops_of_window_attention(target):
    spec = FlashWindowAttention(WindowGeometry((56, 56), (7, 7), (3, 3), False), 3, 0.3, -100.0)
    op = helper.make_node(spec.op_type, ["q", "k", "v", "bias"], ["y"], domain=DOMAIN, **spec.attributes())
    proto = model([op], dict.fromkeys("qkv", (1, 56, 56, 96)), {"bias": normal(1, 3, 49, 49)})
    proto.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    loops = multiply_add_loops(assembly(proto, *TARGETS[target]))
    assert len(loops) >= 3  # logits, exponentials, values
    for loop in loops:
        assert_sums_stay_in_registers(loop)


@pytest.mark.parametrize("target", TARGETS)
def test_a_whole_tile_multiplies_more_than_it_loads(target):
    (loop,) = multiply_add_loops(assembly(PRODUCTS["projection"](), *TARGETS[target]))
    assert loop.multiply_adds >= 1.5 * loop.loads
    # Beside those: the counter, two addresses and the branch.
    assert len(loop.lines) <= loop.multiply_adds + loop.loads + 6


@pytest.mark.parametrize("target", ["cortex-a76", "avx2", "avx512"])
def test_a_tile_that_is_too_large_is_seen_to_spill(target, monkeypatch):
    for module in (build, cpu):
        monkeypatch.setattr(module, "vector_unit", lambda chosen: VectorUnit(4 if "arm" in str(chosen) else 8, 48))
    loops = multiply_add_loops(assembly(PRODUCTS["projection"](), *TARGETS[target]))
    assert any(loop.spills for loop in loops)


def test_loops_are_found_and_read():
    text = """
f:
\t.cfi_startproc
\tmov\tx29, sp
.LBB0_1:
\tmov\tx1, x0
.LBB0_2:
\tldp\tq0, q1, [x1]
\tld1\t{ v0.s }[1], [x2]
\tfmla\tv2.4s, v0.4s, v1.s[0]
\tstr\tq3, [sp, #16]
\tldr\tq4, [x29, #-32]
\tldr\tq4, [sp, x3]
\tb.ne\t.LBB0_2
\tcbnz\tx4, .LBB0_1
\t.cfi_startproc
.LBB1_1:
\tvmovups\t8(%rsp), %ymm0
\tvfmadd231ps\t(%rsp,%rax), %ymm1, %ymm0
\tvmovups\t%ymm0, (%rbp)
\tvgatherdps\t%ymm0, (%rax,%ymm1), %ymm2
\tjne\t.LBB1_1
"""
    arm, x86 = innermost_loops(text)
    assert (arm.multiply_adds, arm.loads, arm.frame) == (1, 5, "x29")
    assert arm.spills == ["\tstr\tq3, [sp, #16]", "\tldr\tq4, [x29, #-32]"]
    assert arm.lane_by_lane == ["\tld1\t{ v0.s }[1], [x2]"]
    assert (x86.multiply_adds, x86.frame, x86.spills) == (1, None, ["\tvmovups\t8(%rsp), %ymm0"])
    assert x86.lane_by_lane == ["\tvgatherdps\t%ymm0, (%rax,%ymm1), %ymm2"]
    assert x86.loads == 3
