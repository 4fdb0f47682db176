"""GPU schedules: the Metal source of TVM's operators, run on the CPU, against the same loops unscheduled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm import relax, te, tirx  # noqa: E402
from tvm.relax import op  # noqa: E402

from attnrewrite.emulator import metal_target, run_function, run_model  # noqa: E402
from attnrewrite.lowering.schedules.gpu import schedule_function  # noqa: E402

Builder = Callable[..., Any]
BATCH = tirx.Var("batch", "int64")
# Sums of up to 600 products of order 1 in another order than the reference's, relative to the largest.
FLOAT32 = 1e-5
# Rounding to float16 of what lies between operators, relative to the largest result; sums are float32.
FLOAT16 = 4e-3


def gelu(x: Any) -> Any:
    half = relax.const(0.5, "float32")
    return op.multiply(
        op.multiply(x, half), op.add(op.erf(op.divide(x, relax.const(2**0.5, "float32"))), relax.const(1.0))
    )


def layer_norm(x: Any, gamma: Any, beta: Any) -> Any:
    return op.nn.layer_norm(x, gamma, beta, axes=[-1])


# name -> (shapes of the inputs, the computation)
CASES: dict[str, tuple[list[tuple[Any, ...]], Builder]] = {
    "matmul": ([(1, 70, 45), (45, 83)], op.matmul),
    "matmul-symbolic-rows": ([(BATCH, 7, 45), (45, 83)], op.matmul),
    "matmul-transposed": (
        [(2, 3, 49, 32), (2, 3, 49, 32)],
        lambda a, b: op.matmul(a, op.permute_dims(b, [0, 1, 3, 2])),
    ),
    "matmul-one-row": ([(1, 200), (200, 37)], op.matmul),
    "matmul-bias-gelu": ([(1, 50, 33), (33, 40), (40,)], lambda x, w, b: gelu(op.add(op.matmul(x, w), b))),
    "matmul-bias-residual": (
        [(2, 9, 33), (33, 40), (40,), (2, 9, 40)],
        lambda x, w, b, r: op.add(op.add(op.matmul(x, w), b), r),
    ),
    # Four neighbours at a time: along the reduction of one side and along the columns of the other, or of both sides.
    "matmul-in-vectors": (
        [(2, 36, 48), (48, 72), (72,), (2, 36, 72), (36, 1)],
        lambda x, w, b, r, c: op.add(op.sigmoid(op.add(op.multiply(op.matmul(x, w), c), b)), r),
    ),
    "matmul-transposed-in-vectors": (
        [(3, 20, 32), (3, 44, 32)],
        lambda a, b: op.matmul(a, op.permute_dims(b, [0, 2, 1])),
    ),
    "matmul-of-heads": (
        [(2, 12, 3, 16), (2, 12, 3, 16)],
        lambda a, b: op.permute_dims(
            op.matmul(op.permute_dims(a, [0, 2, 1, 3]), op.permute_dims(b, [0, 2, 3, 1])), [0, 2, 1, 3]
        ),
    ),
    "conv-3x3": ([(2, 5, 9, 11), (7, 5, 3, 3)], lambda x, w: op.nn.conv2d(x, w, padding=1)),
    "conv-padded": (
        [(1, 9, 6, 10), (20, 9, 3, 3), (1, 20, 1, 1)],
        lambda x, w, b: op.add(op.nn.conv2d(x, w, padding=1), b),
    ),
    "conv-1x1": ([(2, 24, 6, 6), (16, 24, 1, 1)], op.nn.conv2d),
    "conv-patch-embed": (
        [(1, 3, 16, 24), (20, 3, 4, 4), (1, 20, 1, 1)],
        lambda x, w, b: op.add(op.nn.conv2d(x, w, strides=4), b),
    ),
    "conv-grouped": ([(1, 8, 9, 10), (12, 4, 3, 3)], lambda x, w: op.nn.conv2d(x, w, strides=2, padding=1, groups=2)),
    "conv-depthwise": ([(BATCH, 6, 13, 11), (6, 1, 5, 5)], lambda x, w: op.nn.conv2d(x, w, padding=2, groups=6)),
    "conv-depthwise-strided": (
        [(BATCH, 6, 13, 11), (6, 1, 3, 3), (1, 6, 1, 1)],
        lambda x, w, b: gelu(op.add(op.nn.conv2d(x, w, strides=2, groups=6), b)),
    ),
    "conv-dilated": (
        [(1, 4, 15, 13), (6, 4, 3, 3)],
        lambda x, w: op.nn.relu(op.nn.conv2d(x, w, padding=2, dilation=2)),
    ),
    "softmax": ([(2, 3, 9, 49)], lambda x: op.nn.softmax(x, axis=-1)),
    "softmax-inner-axis": ([(2, 9, 17, 5)], lambda x: op.nn.softmax(x, axis=1)),
    "softmax-long-row": ([(3, 5000)], lambda x: op.nn.softmax(x, axis=-1)),
    "softmax-too-long-for-shared-memory": ([(2, 9000)], lambda x: op.nn.softmax(x, axis=-1)),
    "layer-norm": ([(BATCH, 13, 96), (96,), (96,)], layer_norm),
    # Several rows for each thread, which keeps the parameters.
    "layer-norm-of-many-rows": ([(2075, 24), (24,), (24,)], layer_norm),
    "layer-norm-channels-first": (
        [(2, 24, 5, 7)],
        lambda x: op.divide(
            op.subtract(x, op.mean(x, axis=1, keepdims=True)), op.sqrt(op.variance(x, axis=1, keepdims=True))
        ),
    ),
    "mean-of-pixels": ([(2, 7, 9, 40)], lambda x: op.mean(x, axis=[1, 2])),
    "mean-channels-first": ([(2, 40, 7, 9)], lambda x: op.mean(x, axis=[2, 3])),
    "max-pool": ([(1, 6, 13, 15)], lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), padding=1)),
    "adaptive-pool": ([(1, 6, 14, 14)], lambda x: op.nn.adaptive_avg_pool2d(x, (1, 1))),
    "transpose": ([(2, 9, 33, 5)], lambda x: op.permute_dims(x, [0, 2, 3, 1])),
    "pixel-unshuffle": (
        [(1, 8, 12, 5)],
        lambda x: op.reshape(op.permute_dims(op.reshape(x, (1, 4, 2, 6, 2, 5)), [0, 1, 3, 4, 2, 5]), (1, 4, 6, 20)),
    ),
    "pad-and-concat": (
        [(1, 5, 7), (1, 5, 4)],
        lambda a, b: op.concat([op.nn.pad(a, (0, 0, 1, 2, 0, 0)), op.nn.pad(b, (0, 0, 0, 3, 0, 0))], axis=2),
    ),
    "elementwise": (
        [(BATCH, 7, 5), (5,)],
        lambda x, y: op.tanh(op.add(op.sigmoid(x), op.exp(op.negative(op.multiply(y, y))))),
    ),
    "elementwise-in-vectors": (
        [(BATCH, 8, 12), (12,), (8, 1)],
        lambda x, y, z: op.add(op.sigmoid(op.multiply(x, y)), z),
    ),
    # More tensors than a kernel may take.
    "split-into-49": ([(2, 98, 3)], lambda x: op.split(x, 49, axis=1)),
    "concat-of-49": (
        [(2, 2, 3)] * 49 + [(2, 98, 3)],
        lambda *xs: op.add(op.sigmoid(op.concat(xs[:-1], axis=1)), xs[-1]),
    ),
    "cumsum": ([(2, 7, 11)], lambda x: op.cumsum(x, axis=2)),
}

# TVM's own scan: its SIMD groups exchange values through threadgroup memory as if their threads ran in lockstep.
LOCKSTEP = ("cumsum",)


def relax_module(shapes: list[tuple[Any, ...]], compute: Builder, dtype: str) -> Any:
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, shape in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            output = builder.emit_output(builder.normalize(compute(*inputs)))
        builder.emit_func_output(output)
    return builder.get()


def run(executable: Any, arrays: list[np.ndarray]) -> list[np.ndarray]:
    machine = relax.VirtualMachine(executable, tvm.cpu())
    result = machine["main"](*(tvm.runtime.tensor(array) for array in arrays))
    return [output.numpy() for output in ([result] if hasattr(result, "numpy") else result)]


def compare(name: str, dtype: str, tolerance: float, batch: int = 3) -> None:
    shapes, compute = CASES[name]
    rng = np.random.default_rng(7)
    arrays = [rng.standard_normal([batch if e is BATCH else e for e in shape]).astype(dtype) for shape in shapes]
    unscheduled = relax.build(relax_module(shapes, compute, "float32"), tvm.target.Target("llvm"))
    expected = run(unscheduled, [array.astype(np.float32) for array in arrays])
    found = run_model(relax_module(shapes, compute, dtype), arrays)
    assert all(name in LOCKSTEP and "with no barrier" in finding for finding in found.findings), found.findings
    assert len(found.outputs) == len(expected)
    for output, own in zip(found.outputs, expected, strict=True):
        assert np.abs(output - own).max() <= tolerance * np.abs(own).max()


@pytest.mark.parametrize("name", CASES)
def test_schedule_keeps_the_numbers(name: str) -> None:
    compare(name, "float32", FLOAT32)


HALF = [
    "matmul",
    "matmul-one-row",
    "matmul-bias-residual",
    "matmul-in-vectors",
    "matmul-transposed-in-vectors",
    "conv-3x3",
    "conv-depthwise",
    "softmax",
    "layer-norm-of-many-rows",
    "mean-of-pixels",
    "elementwise",
]


@pytest.mark.parametrize("name", HALF)
def test_half_precision_sums_in_single(name: str) -> None:
    compare(name, "float16", FLOAT16)


def test_a_row_that_is_an_output_is_not_read_back() -> None:
    """Barriers order shared memory alone."""
    x = te.placeholder((9, 64), name="x")
    doubled = te.compute((9, 64), lambda i, j: x[i, j] * 2.0, name="doubled")
    step = te.reduce_axis((0, 64), name="step")
    total = te.compute((9,), lambda i: te.sum(doubled[i, step], axis=step), name="total")
    result = te.compute((9, 64), lambda i, j: doubled[i, 63 - j] - total[i], name="result")
    func = schedule_function(te.create_prim_func([x, doubled, result]), metal_target())
    array = np.random.default_rng(0).standard_normal((9, 64)).astype(np.float32)
    ran = run_function(func.with_attr("global_symbol", "run"), [array], [((9, 64), "float32")] * 2)
    assert ran.findings == ()
    np.testing.assert_array_equal(ran.outputs[0], array * 2)
    expected = array[:, ::-1] * 2 - array.sum(1, keepdims=True) * 2
    np.testing.assert_allclose(ran.outputs[1], expected, atol=FLOAT32 * np.abs(expected).max())


def test_rows_share_their_parameters() -> None:
    """A row is read and written once; the parameters, as large as a row each, once for several rows."""
    shapes, compute = CASES["layer-norm-of-many-rows"]
    arrays = [np.ones(shape, "float32") for shape in shapes]
    ran = run_model(relax_module(shapes, compute, "float32"), arrays)
    (launch,) = ran.launches
    least = sum(array.nbytes for array in (*arrays, *ran.outputs))
    assert launch.requested <= 1.3 * least
