"""What exceeds the device is refused when it is compiled, with the kernel, the number and the limit."""

from __future__ import annotations

from typing import Any

import pytest

tvm = pytest.importorskip("tvm")

from tvm.script.ir_builder import IRBuilder  # noqa: E402
from tvm.target import Target  # noqa: E402
from tvm.tirx.script.builder import ir as T  # noqa: E402

from attnrewrite.emulator import metal_target  # noqa: E402
from attnrewrite.errors import CompilerError  # noqa: E402
from attnrewrite.lowering import limits  # noqa: E402
from attnrewrite.lowering.kernels.gpu_builder import barrier, load, store  # noqa: E402


def lowered(target: Target, *, threads: int = 64, shared: int = 64, sources: int = 1) -> Any:
    """A copy through shared memory: so many threads and float32 elements, the sum of so many operands."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("copy")
        operands = [T.arg(f"x{i}", T.buffer((threads,), "float32")) for i in range(sources)]
        output = T.arg("output", T.buffer((threads,), "float32"))
        with T.launch_thread("threadIdx.x", threads) as thread:
            tile = T.alloc_buffer((shared,), "float32", scope="shared")
            store(tile, [thread * (shared // threads)], sum(load(operand, [thread]) for operand in operands))
            barrier()
            store(output, [thread], load(tile, [thread * (shared // threads)]))
    return tvm.tirx.build(tvm.IRModule({"copy": builder.get()}), target=target, pipeline=limits.PIPELINE)


@pytest.mark.parametrize("use", [{}, {"threads": 1024, "shared": 8192}, {"sources": 30}], ids=str)
def test_what_fits_compiles(use: dict[str, int]) -> None:
    assert lowered(metal_target(), **use)


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        ({"threads": 1056, "shared": 1056}, "kernel copy_kernel has 1056 threads in a threadgroup; metal has 1024"),
        ({"shared": 8384}, "kernel copy_kernel takes 33024 bytes of threadgroup memory; metal has 32768"),
        ({"sources": 31}, "kernel copy_kernel takes 32 buffers; metal has 31"),
    ],
    ids=str,
)
def test_what_does_not_is_refused(use: dict[str, int], sentence: str) -> None:
    with pytest.raises(CompilerError, match=sentence):
        lowered(metal_target(), **use)
