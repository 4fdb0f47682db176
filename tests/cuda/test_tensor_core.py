"""Matrix instructions in the emulator: fragments as the PTX ISA has them, and the faults that the rest would hide."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from attnrewrite.emulator import metal_device, metal_target, run_function  # noqa: E402
from attnrewrite.emulator.kernels import MetalKernel, compile_kernels  # noqa: E402
from attnrewrite.lowering.kernels.gpu_builder import (  # noqa: E402
    Flat,
    KernelBuilder,
    Operands,
    TileShape,
    barrier,
    fill,
    load,
    store,
    when,
)
from attnrewrite.lowering.kernels.tensor_core import ELEMENT_TYPES, TensorCore, at  # noqa: E402
from tests.cuda.compiling import cuda_target, resources  # noqa: E402

NUMPY_TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


# The tables of the PTX ISA, in its words: groupID = lane >> 2, threadID_in_group = lane % 4, element i of a lane.
# https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float
def position_of_a(lane: int, i: int) -> tuple[int, int]:
    group_id, thread_id_in_group = lane >> 2, lane % 4
    row = group_id if i in (0, 1, 4, 5) else group_id + 8
    return row, thread_id_in_group * 2 + (i & 1) + (0 if i < 4 else 8)


def position_of_b(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (0 if i < 2 else 8), lane >> 2


def position_of_c(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)


@pytest.mark.parametrize("dtype", ELEMENT_TYPES)
def test_mma_multiplies_fragments_laid_out_as_the_isa_says(dtype: str) -> None:
    rng = np.random.default_rng(0)
    # Integers, so that sums are exact, and different in every place.
    a = rng.permutation(np.arange(-128, 128)).reshape(16, 16).astype(NUMPY_TYPES[dtype])
    b = rng.permutation(np.arange(-64, 64)).reshape(16, 8).astype(NUMPY_TYPES[dtype])
    c = rng.integers(-1000, 1000, (16, 8)).astype(np.float32)
    source = f"""
#include <metal_stdlib>
using namespace metal;
kernel void multiply(device uint* a_ptr [[ buffer(0) ]], device uint* b_ptr [[ buffer(1) ]],
  device float* c_ptr [[ buffer(2) ]],
  uint blockIdx [[threadgroup_position_in_grid]], uint threadIdx [[thread_position_in_threadgroup]]) {{
  uint a[4], b[2];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = a_ptr[threadIdx * 4 + i];
  for (int i = 0; i < 2; ++i) b[i] = b_ptr[threadIdx * 2 + i];
  for (int i = 0; i < 4; ++i) c[i] = c_ptr[threadIdx * 4 + i];
  attnrewrite_mma_{dtype}(c, a, b);
  for (int i = 0; i < 4; ++i) c_ptr[threadIdx * 4 + i] = c[i];
}}"""
    kernel = MetalKernel("multiply", source, ("handle",) * 3, ("blockIdx.x", "threadIdx.x"))
    fragments = [
        np.array([[matrix[position(lane, i)] for i in range(count)] for lane in range(32)])
        for matrix, position, count in ((a, position_of_a, 8), (b, position_of_b, 4), (c, position_of_c, 4))
    ]
    with metal_device(recording=True) as device:
        library = tvm.runtime.load_module(str(compile_kernels([kernel], instrumented=True)))
        words = [np.ascontiguousarray(f).view(np.uint32) for f in fragments[:2]]
        tensors = [tvm.runtime.tensor(array, tvm.metal()) for array in (*words, fragments[2])]
        library["multiply"](*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), 1, 32)
        result = tensors[2].numpy()
        assert device.findings == ()
    expected = a.astype(np.float32) @ b.astype(np.float32) + c
    for lane in range(32):
        assert [expected[position_of_c(lane, i)] for i in range(4)] == list(result[lane])


def words_of(target: tvm.target.Target, dtype: str) -> tvm.tirx.PrimFunc:
    """Of lane i, from the elements 2 i and 2 i + 1 of each half of the operand as words a and b: their products, their
    first elements, and their second ones.
    """
    builder = KernelBuilder()
    given = Operands({"pairs": (1, 128)}, dtype)
    with builder.kernel("run", given, [(96, 2)], lambda n: (1, 1, n), (32, 1)) as f:
        cores = TensorCore(target, dtype)
        words, output = Flat(f.operands["pairs"], 1, "uint32", 64), Flat(f.output, 1, "uint32", 96)
        a, b = words.load(f.thread_x), words.load(f.thread_x + 32)
        for number, word in enumerate((cores.multiply(a, b), cores.firsts(a, b), cores.seconds(a, b))):
            output.store(f.thread_x + 32 * number, word)
    return builder.prim_func()


@pytest.mark.parametrize("dtype", ELEMENT_TYPES)
def test_words_of_two_elements(dtype: str) -> None:
    pairs = np.random.default_rng(2).standard_normal((2, 32, 2)).astype(NUMPY_TYPES[dtype])
    run = run_function(words_of(metal_target(), dtype), [pairs.reshape(1, 128)], [((1, 96, 2), dtype)])
    products, firsts, seconds = run.outputs[0].reshape(3, 32, 2)
    np.testing.assert_array_equal(products, pairs[0] * pairs[1])
    np.testing.assert_array_equal(firsts, pairs[..., 0].T)
    np.testing.assert_array_equal(seconds, pairs[..., 1].T)
    assert run.findings == ()


FAULTS = ("", "no wait", "no barrier", "rows as columns", "halves of A swapped")


def product(target: tvm.target.Target, dtype: str, fault: str = "") -> tvm.tirx.PrimFunc:
    """output[16, 8] = a[16, 16] b[16, 8] with b once row by row and once column by column, and a in two copies.

    `fault` plants one of FAULTS. The second half of the output is packed, and transposed within quads.
    """
    builder = KernelBuilder()
    shapes = {"a": (1, 16, 16), "rows": (1, 16, 8), "columns": (1, 8, 16)}
    with builder.kernel("run", Operands(shapes, dtype), [(3, 16, 8)], lambda n: (1, 1, n), (32, 1)) as f:
        cores = TensorCore(target, dtype)
        tiles, first = {}, 0
        for name, shape in shapes.items():
            tiles[name] = (TileShape(shape[1], shape[2], dtype), first)
            first += tiles[name][0].size_bytes // 2
        shared, a, b, sums = cores.shared(first), cores.words(4), cores.words(4), cores.sums(8)
        lane = f.thread_x

        def place(name: str, row: object, column: object) -> object:
            shape, start = tiles[name]
            return at(shared, row * shape.stride + column + start)

        for name, (shape, _) in tiles.items():
            source = Flat(f.operands[name], 1)
            width = shape.columns // 8
            row, column = lane // width, lane % width * 8
            with when(True if shape.rows * width == 32 else lane < shape.rows * width):
                cores.copy_async(place(name, row, column), source.pointer(row * shape.columns + column), 16, True)
            cores.commit()
        if fault != "no wait":
            cores.wait(0)
        if fault != "no barrier":
            barrier()
        cores.load_matrices(at(a, 0), place("a", lane % 16, lane // 16 * 8), 4)
        cores.load_matrices(at(b, 0), place("rows", lane % 16, 0), 2, transposed=fault != "rows as columns")
        cores.load_matrices(at(b, 2), place("columns", lane % 8, lane // 8 % 2 * 8), 2)
        fill(sums, 8, 0.0)
        if fault == "halves of A swapped":
            store(a, [3], load(a, [1]))
        for half in range(2):
            cores.mma(at(sums, half * 4), at(a, 0), at(b, half * 2))
        words = cores.words(4)
        for half in range(2):
            for pair in range(2):
                word = cores.pack(sums[half * 4 + pair * 2], sums[half * 4 + pair * 2 + 1])
                store(words, [half * 2 + pair], word)
        output = Flat(f.output, 1)
        row = lane // 4
        for i in range(4):
            value = (cores.low if i % 2 == 0 else cores.high)(words[i // 2])
            output.store((row + i // 2 * 8) * 8 + lane % 4 * 2 + i % 2, value.astype(dtype))
        cores.transpose_quad(at(words, 0))
        # Lane t holds row g (+ 8 for odd t) of the product with `rows` (t < 2) or with `columns`.
        first = 128 + lane % 4 // 2 * 128 + (row + lane % 2 * 8) * 8
        for i in range(8):
            value = (cores.low if i % 2 == 0 else cores.high)(words[i // 2])
            output.store(first + i, value.astype(dtype))
    return builder.prim_func()


def run_product(dtype: str, fault: str = "") -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """What came out, what should have, and findings."""
    rng = np.random.default_rng(1)
    a = rng.integers(-3, 4, (1, 16, 16)).astype(NUMPY_TYPES[dtype])
    b = rng.integers(-3, 4, (1, 16, 8)).astype(NUMPY_TYPES[dtype])
    operands = [a, b, np.ascontiguousarray(b.transpose(0, 2, 1))]
    run = run_function(product(metal_target(), dtype, fault), operands, [((1, 3, 16, 8), dtype)])
    expected = np.broadcast_to(a[0].astype(np.float32) @ b[0].astype(np.float32), (3, 16, 8))
    return run.outputs[0][0].astype(np.float32), expected, run.findings


@pytest.mark.parametrize("dtype", ELEMENT_TYPES)
def test_products_of_staged_matrices(dtype: str) -> None:
    result, expected, findings = run_product(dtype)
    np.testing.assert_array_equal(result, expected)
    assert findings == ()


@pytest.mark.parametrize("fault", FAULTS[1:])
def test_a_planted_fault_shows(fault: str) -> None:
    result, expected, findings = run_product("float16", fault)
    assert findings or not np.array_equal(result, expected)


# The source differs between chips before and from sm_80.
@pytest.mark.parametrize(("dtype", "chips"), [("float16", ("sm_75", "sm_80")), ("bfloat16", ("sm_80",))])
def test_the_functions_compile(dtype: str, chips: tuple[str, ...]) -> None:
    kernels = resources(product(cuda_target(chips[0]), dtype), *chips)
    assert [kernel.arch for kernel in kernels] == list(chips)
    assert not any(kernel.spills for kernel in kernels)
    assert [k.arch for k in resources(words_of(cuda_target(chips[0]), dtype), *chips)] == list(chips)
