"""The emulator notices what a GPU would not forgive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm import tirx  # noqa: E402
from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.tirx.script.builder import ir as T  # noqa: E402

from attnrewrite.lowering.kernels.gpu_builder import barrier, load, store, when  # noqa: E402
from tests.lowering import gpu_emulator  # noqa: E402

THREADS = 64


def emulated(body: Callable[[Any, Any, Any, Any], None], directory: Any, shared_count: int = THREADS) -> Any:
    """A kernel of one threadgroup; body(source, target, shared memory, thread)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("run")
        source = T.arg("source", T.buffer((THREADS,), "float32"))
        target = T.arg("target", T.buffer((THREADS,), "float32"))
        with T.launch_thread("threadIdx.x", THREADS) as thread:
            body(source, target, T.alloc_buffer((shared_count,), "float32", scope="shared"), thread)
    return gpu_emulator.emulate(tvm.IRModule({"run": builder.get()}), directory)["run"]


def call(function: Any) -> tuple[np.ndarray, np.ndarray]:
    source = np.arange(THREADS, dtype=np.float32)
    target = tvm.runtime.tensor(np.zeros(THREADS, np.float32))
    function(tvm.runtime.tensor(source), target)
    return source, target.numpy()


def reverse(source: Any, target: Any, memory: Any, thread: Any) -> None:
    store(memory, [thread], load(source, [thread]))
    barrier()
    store(target, [thread], load(memory, [THREADS - 1 - thread]))


def test_threads_exchange_through_shared_memory(tmp_path: Any) -> None:
    source, target = call(emulated(reverse, tmp_path))
    np.testing.assert_array_equal(target, source[::-1])


def test_shared_memory_nobody_wrote_is_nan(tmp_path: Any) -> None:
    def body(source: Any, target: Any, memory: Any, thread: Any) -> None:
        with when(thread < THREADS // 2):
            store(memory, [thread], load(source, [thread]))
        barrier()
        store(target, [thread], load(memory, [thread]))

    source, target = call(emulated(body, tmp_path))
    np.testing.assert_array_equal(target[: THREADS // 2], source[: THREADS // 2])
    assert np.isnan(target[THREADS // 2 :]).all()


def test_a_barrier_that_some_threads_miss_is_an_error(tmp_path: Any) -> None:
    def body(source: Any, target: Any, memory: Any, thread: Any) -> None:
        store(memory, [thread], load(source, [thread]))
        with when(thread < 5):
            barrier()
        store(target, [thread], load(memory, [thread]))

    with pytest.raises(Exception, match="threads diverge around a barrier"):
        call(emulated(body, tmp_path))


def test_too_much_threadgroup_memory_is_an_error(tmp_path: Any) -> None:
    def body(source: Any, target: Any, memory: Any, thread: Any) -> None:
        store(memory, [thread * 200], load(source, [thread]))
        barrier()
        store(target, [thread], load(memory, [thread * 200]))

    with pytest.raises(AssertionError, match="bytes of threadgroup memory exceed Metal's 32768"):
        emulated(body, tmp_path, shared_count=THREADS * 200)


def test_simd_shuffles(tmp_path: Any) -> None:
    def body(source: Any, target: Any, memory: Any, thread: Any) -> None:
        value = load(source, [thread])
        mask = tirx.const(0xFFFFFFFF, "uint32")
        shuffled = tirx.call_intrin("float32", "tirx.tvm_warp_shuffle_down", mask, value, 3, 32, 32)
        store(target, [thread], shuffled)

    source, target = call(emulated(body, tmp_path))
    lanes = np.arange(THREADS) % 32
    np.testing.assert_array_equal(target, np.where(lanes + 3 < 32, source + 3, source))
