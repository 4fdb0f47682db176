"""The emulator notices what a GPU would not forgive, counts what a kernel moves, and knows Metal's words."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from attnrewrite.emulator import Launch, metal_device  # noqa: E402
from attnrewrite.emulator.kernels import MetalKernel, compile_kernels  # noqa: E402
from attnrewrite.errors import CompilerError  # noqa: E402

THREADS = 64
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
# Seen by all threads.
COPY = "target_ptr[i] = source_ptr[i]; threadgroup_barrier(mem_flags::mem_device | mem_flags::mem_threadgroup);"


def kernel(body: str, element: str = "float", name: str = "probe") -> MetalKernel:
    """A kernel from `source` to `target` whose threads are `i`, laid out as TVM writes them."""
    source = f"""
#include <metal_stdlib>
using namespace metal;
kernel void {name}(device {element}* source_ptr [[ buffer(0) ]],
  device {element}* target_ptr [[ buffer(1) ]],
  uint blockIdx [[threadgroup_position_in_grid]],
  uint threadIdx [[thread_position_in_threadgroup]]
) {{
  threadgroup {element} tile[64];
  int i = (int)threadIdx;
  {body}
}}"""
    return MetalKernel(name, source, ("handle", "handle"), ("blockIdx.x", "threadIdx.x"))


@dataclass(frozen=True)
class Ran:
    source: np.ndarray
    target: np.ndarray
    findings: tuple[str, ...]
    launch: Launch | None


def run(
    body: str,
    *,
    element: str = "float",
    groups: int = 1,
    threads: int = THREADS,
    recording: bool = True,
    order: int = 0,
) -> Ran:
    dtype = {"float": np.float32, "half": np.float16, "int": np.int32}[element]
    source = np.arange(THREADS).astype(dtype)
    with metal_device(recording=recording, order=order) as device:
        library = tvm.runtime.load_module(str(compile_kernels([kernel(body, element)], instrumented=recording)))
        tensors = [
            tvm.runtime.tensor(source, tvm.metal()),
            tvm.runtime.empty((THREADS,), source.dtype.name, tvm.metal()),
        ]
        library["probe"](*(ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors), groups, threads)
        return Ran(source, tensors[1].numpy(), device.findings, next(iter(device.launches), None))


REVERSE = f"tile[i] = source_ptr[i]; {BARRIER} target_ptr[i] = tile[63 - i];"


@pytest.mark.parametrize("order", [0, 1, 7])
@pytest.mark.parametrize("recording", [False, True])
def test_threads_exchange_through_threadgroup_memory(recording: bool, order: int) -> None:
    ran = run(REVERSE, recording=recording, order=order)
    np.testing.assert_array_equal(ran.target, ran.source[::-1])
    assert ran.findings == ()


AT = "in thread (0, 0, 0) of threadgroup (0, 0, 0), "
# Every fault is in one thread, so that the sentence is known to the letter.
FAULTS = {
    "read-past-the-end": (
        "target_ptr[i] = source_ptr[i == 0 ? 70 : i];",
        f"reads source[70] {AT}outside its 64 elements",
    ),
    "read-before-the-start": (
        "target_ptr[i] = source_ptr[i == 0 ? -1 : i];",
        f"reads source[-1] {AT}outside its 64 elements",
    ),
    "write-past-the-end": (
        "target_ptr[i == 0 ? 64 : i] = source_ptr[i];",
        f"writes target[64] {AT}outside its 64 elements",
    ),
    "vector-past-the-end": (
        "float4 v; if (i == 0) v = *(device float4*)(source_ptr + 62);",
        f"reads source[62] {AT}outside its 64 elements",
    ),
    "vector-not-aligned": (
        "if (i == 0) *(device float4*)(target_ptr + 4) = *(device float4*)(source_ptr + 2);",
        f"reads source[2] {AT}where a vector of 16 bytes is not aligned",
    ),
    "threadgroup-array-outside": (
        "tile[i == 0 ? 64 : i] = source_ptr[i]; target_ptr[i] = source_ptr[i];",
        f"writes tile[64] {AT}outside its 64 elements",
    ),
    "unwritten-device-memory": (
        "if (i == 0) target_ptr[1] = target_ptr[5];",
        f"reads target[5] {AT}which nothing has written",
    ),
    "unwritten-threadgroup-memory": (
        f"if (i != 9) tile[i] = source_ptr[i]; {BARRIER} if (i == 0) target_ptr[i] = tile[9];",
        f"reads tile[9] {AT}which nothing has written",
    ),
    "missing-barrier": (
        "if (i == 40) tile[0] = source_ptr[i]; if (i == 63) target_ptr[i] = tile[0];",
        "reads tile[0] in thread (63, 0, 0) of threadgroup (0, 0, 0), with no barrier since thread (40, 0, 0) wrote it",
    ),
    "missing-barrier-before-reuse": (
        f"tile[i] = source_ptr[i]; {BARRIER} target_ptr[i] = tile[5]; if (i == 0) tile[5] = 1.0f;",
        f"writes tile[5] {AT}with no barrier since other threads read it",
    ),
    "missing-barrier-in-device-memory": (
        "if (i == 3) target_ptr[0] = source_ptr[5]; if (i == 4) target_ptr[1] = target_ptr[0];",
        "reads target[0] in thread (4, 0, 0) of threadgroup (0, 0, 0), with no barrier since thread (3, 0, 0) wrote it",
    ),
    "barrier-of-threadgroup-memory-alone": (
        f"if (i == 3) target_ptr[0] = source_ptr[5]; {BARRIER} if (i == 4) target_ptr[1] = target_ptr[0];",
        "reads target[0] in thread (4, 0, 0) of threadgroup (0, 0, 0), with no barrier that orders device memory since "
        "another thread wrote it",
    ),
    "write-after-reads-and-a-barrier-of-threadgroup-memory-alone": (
        f"{COPY} tile[i] = target_ptr[63 - i]; {BARRIER} target_ptr[i] = tile[i];",
        f"writes target[0] {AT}with no barrier that orders device memory since another thread read it",
    ),
    "write-after-ones-own-read-and-that-of-others": (
        f"{COPY} tile[i] = target_ptr[63]; {BARRIER} if (i == 0) target_ptr[63] = target_ptr[63] + 1.0f;",
        f"writes target[63] {AT}with no barrier that orders device memory since other threads read it",
    ),
    "write-after-write-and-a-barrier-of-threadgroup-memory-alone": (
        f"if (i == 1) target_ptr[0] = 1.0f; {BARRIER} if (i == 0) target_ptr[0] = 2.0f;",
        f"writes target[0] {AT}with no barrier that orders device memory since another thread wrote it",
    ),
    "two-threads-write": (
        f"{BARRIER} if (i == 1) target_ptr[0] = 1.0f; if (i == 0) target_ptr[0] = 2.0f;",
        f"writes target[0] {AT}with no barrier since thread (1, 0, 0) wrote it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name: str) -> None:
    body, sentence = FAULTS[name]
    assert run(body).findings == (f"kernel probe {sentence}",)


def test_threadgroups_are_not_ordered() -> None:
    ran = run("if (i == 0) target_ptr[blockIdx] = target_ptr[0] + 1.0f;", groups=2)
    assert (
        "kernel probe reads target[0] in thread (0, 0, 0) of threadgroup (1, 0, 0), which another threadgroup wrote in "
        "the same launch" in ran.findings
    )


NO_FAULTS = {
    "the-same-value-from-all": f"tile[0] = 3.0f; {BARRIER} target_ptr[i] = tile[0];",
    "simdgroup-barrier-orders-a-simdgroup": (
        "tile[i] = source_ptr[i]; simdgroup_barrier(mem_flags::mem_threadgroup); target_ptr[i] = tile[i ^ 5];"
    ),
    "neighbouring-halves-of-a-float": (
        f"((threadgroup half*)tile)[i] = half(source_ptr[i]); {BARRIER} "
        "target_ptr[i] = float(((threadgroup half*)tile)[i ^ 1]);"
    ),
    "barrier-of-device-memory": (
        f"{COPY} float other = target_ptr[63 - i]; threadgroup_barrier(mem_flags::mem_device); target_ptr[i] = other;"
    ),
    "unchosen-side-of-a-condition": "target_ptr[i] = (i < 0) ? source_ptr[100] : 0.0f;",
}


@pytest.mark.parametrize("name", NO_FAULTS)
def test_what_is_no_fault(name: str) -> None:
    assert run(NO_FAULTS[name]).findings == ()


def test_simdgroup_barrier_does_not_order_a_threadgroup() -> None:
    ran = run("tile[i] = source_ptr[i]; simdgroup_barrier(mem_flags::mem_threadgroup); target_ptr[i] = tile[63 - i];")
    (finding,) = ran.findings
    assert finding.startswith("kernel probe reads tile[") and "with no barrier since thread" in finding


@pytest.mark.parametrize("order", [0, 1, 7])
def test_a_missing_barrier_shows_as_numbers_too(order: int) -> None:
    ran = run(REVERSE.replace(BARRIER, ""), recording=False, order=order)
    assert not np.array_equal(ran.target, ran.source[::-1])


def test_a_wrong_index_shows_as_numbers() -> None:
    assert not np.array_equal(run(REVERSE.replace("63 - i", "62 - i & 63")).target, np.arange(THREADS)[::-1])


def test_threadgroup_memory_starts_as_nan_for_every_threadgroup() -> None:
    body = f"if (blockIdx == 0) tile[i] = 1.0f; {BARRIER} if (blockIdx == 1) target_ptr[i] = tile[i];"
    assert np.isnan(run(body, groups=2, recording=False).target).all()


def test_a_barrier_that_some_threads_miss_is_an_error() -> None:
    with pytest.raises(Exception, match="kernel probe: threads diverge around a barrier"):
        run(f"if (i < 5) {{ {BARRIER} }} target_ptr[i] = source_ptr[i];")


def test_more_threadgroup_memory_than_there_is_is_an_error() -> None:
    with pytest.raises(Exception, match="kernel probe: a threadgroup takes more than 48 KB of memory"):
        run("\nthreadgroup float4 large[3072];\nlarge[i] = float4(0.0f);")


def test_traffic_is_counted() -> None:
    """Two threadgroups: each reads the source by vectors, the first element twice more, and writes its half."""
    body = f"""
    if (i < 16) *(threadgroup float4*)(tile + i * 4) = *(device float4*)(source_ptr + i * 4);
    {BARRIER}
    if (i < 2) tile[i] = source_ptr[0];
    {BARRIER}
    if (i < 32) target_ptr[blockIdx * 32 + i] = tile[i];"""
    launch = run(body, groups=2).launch
    assert launch is not None
    source, target = launch.buffers
    assert (source.name, source.extent, target.name, target.extent) == ("source", 256, "target", 256)
    assert (source.reads.requested, source.reads.per_group, source.reads.distinct) == (2 * (256 + 8), 512, 256)
    assert (target.writes.requested, target.writes.per_group, target.writes.distinct) == (256, 256, 256)
    assert (target.reads.requested, source.writes.requested) == (0, 0)
    assert (launch.groups, launch.threads, launch.barriers) == (2, 64, 2)
    assert (launch.shared_bytes, launch.shared_writes, launch.shared_reads) == (256, 2 * (256 + 8), 256)
    assert launch.requested == 2 * (256 + 8) + 256


SIMD = {
    "simd_shuffle(value, 3)": lambda s: np.repeat(s.reshape(2, 32)[:, 3], 32),
    "simd_shuffle_down(value, 3)": lambda s: np.where(np.arange(64) % 32 < 29, s + 3, s),
    "simd_shuffle_up(value, 3)": lambda s: np.where(np.arange(64) % 32 >= 3, s - 3, s),
    "simd_shuffle_xor(value, 5)": lambda s: np.arange(64) ^ 5,
    "simd_broadcast(value, 31)": lambda s: np.repeat(s.reshape(2, 32)[:, 31], 32),
    "simd_sum(value)": lambda s: np.repeat(s.reshape(2, 32).sum(1), 32),
    "simd_max(value)": lambda s: np.repeat(s.reshape(2, 32).max(1), 32),
    "simd_min(value)": lambda s: np.repeat(s.reshape(2, 32).min(1), 32),
    "float(simd_any(value == 40.0f))": lambda s: np.repeat([0, 1], 32),
    "float(simd_all(value < 40.0f))": lambda s: np.repeat([1, 0], 32),
}


def test_simdgroup_functions() -> None:
    for call, expected in SIMD.items():
        ran = run(f"float value = source_ptr[i]; target_ptr[i] = {call};")
        np.testing.assert_array_equal(ran.target, expected(ran.source), err_msg=call)


MATRIX = f"""
    tile[i] = 2.0f * source_ptr[i];
    {BARRIER}
    simdgroup_float8x8 a[1], b[1], c[1];
    c[0] = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
    simdgroup_load(a[0], source_ptr, 8, 0, false);
    simdgroup_load(b[0], (&(tile[0])), 8, 0, true);
    simdgroup_multiply_accumulate(c[0], a[0], b[0], c[0]);
    if (i < 32) simdgroup_store(c[0], target_ptr, 8, 0, false);"""


@pytest.mark.parametrize("recording", [False, True])
def test_simdgroup_matrices(recording: bool) -> None:
    ran = run(MATRIX, recording=recording)
    a = ran.source.reshape(8, 8)
    np.testing.assert_array_equal(ran.target.reshape(8, 8), a @ (2 * a).T + 1)
    assert ran.findings == ()


def test_a_matrix_operation_of_part_of_a_simdgroup_is_an_error() -> None:
    with pytest.raises(Exception, match="only part of a SIMD group takes part in a matrix operation"):
        run("simdgroup_float8x8 a; if (i < 7) simdgroup_load(a, source_ptr, 8, 0, false);")


@pytest.mark.parametrize("recording", [False, True])
def test_half_vectors(recording: bool) -> None:
    body = """
    if (i < 16) {
      half4 v = *(device half4*)(source_ptr + i * 4);
      float4 wide = float4(v) * float4(2.0f, 3.0f, 4.0f, 5.0f) + 1.0f;
      *(device packed_half4*)(target_ptr + i * 4) = half4(wide);
    }"""
    ran = run(body, element="half", recording=recording)
    expected = ran.source.astype(np.float32) * np.tile([2, 3, 4, 5], 16) + 1
    np.testing.assert_array_equal(ran.target, expected.astype(np.float16))
    assert ran.findings == ()


@pytest.mark.parametrize("recording", [False, True])
def test_words_in_vectors(recording: bool) -> None:
    """As bfloat16 values are widened and rounded."""
    body = """
    if (i < 16) {
      uint4 bits = as_type<uint4>(*(device float4*)(source_ptr + i * 4));
      uint2 ends = uint2(bits[0], bits[3]);
      ushort4 rounded = ushort4((bits + ((bits >> uint4(16)) & uint4(1)) + uint4(0x7fff)) >> uint4(16));
      float4 wide = as_type<float4>((uint4(rounded) << uint4(16)) | (bits ^ bits));
      *(device float4*)(target_ptr + i * 4) = ends[1] == bits[3] ? wide : float4(-1.0f);
    }"""
    ran = run(body, recording=recording)
    np.testing.assert_array_equal(ran.target, ran.source.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert ran.findings == ()


def test_source_that_is_no_metal_is_an_error() -> None:
    with pytest.raises(CompilerError, match=r"the emulator cannot compile the Metal source: .*undeclared"):
        run("target_ptr[i] = no_such_function(i);")


def test_the_device_is_gone_afterwards() -> None:
    with metal_device():
        assert tvm.metal().exist
    assert not tvm.metal().exist
