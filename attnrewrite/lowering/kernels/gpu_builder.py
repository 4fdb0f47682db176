"""What the GPU kernels share: device limits, the frame of a kernel, and short names for IR builder statements.

The kernels are written with TVM's IR builder rather than TVMScript because their loop nests depend on the number of
spatial axes and on which operands are present: a Python `for` unrolls, `T.serial` makes a loop of the kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

Expr = Any  # tvm.ir.Expr; its operators are not typed

ACCUMULATOR = "float32"
LOWEST = -3.402823e38  # finite on purpose: GPU compilers in fast-math mode may assume that no infinity is compared


@dataclass(frozen=True)
class Limits:
    """What one threadgroup may use: threads, and bytes of threadgroup (CUDA: static shared) memory.

    resident_bytes: the shared memory of one GPU core, which all its resident threadgroups divide among themselves.
    """

    threads: int
    shared_bytes: int
    resident_bytes: int

    @classmethod
    def of(cls, target: Target) -> Limits:
        """Limits of a metal or cuda target, by its own attributes where it carries them."""
        defaults = {"metal": (32768, 61440), "cuda": (49152, 102400)}.get(target.kind.name, (16384, 16384))
        shared = min(int(target.attrs.get("max_shared_memory_per_block", defaults[0])), 49152)
        return cls(256, shared, max(defaults[1], shared))


@dataclass(frozen=True)
class Frame:
    """An open kernel: its operand buffers by name, its output, and where in the grid it stands."""

    operands: dict[str, tirx.Buffer]
    output: tirx.Buffer
    block: Expr
    head: Expr
    batch: Expr
    thread_x: Expr
    thread_y: Expr
    threads: tuple[int, int]

    @property
    def thread(self) -> Expr:
        """The flat index within the threadgroup; x runs fastest, as in a warp."""
        return self.thread_y * self.threads[0] + self.thread_x


@contextlib.contextmanager
def _kernel_frame(
    name: str,
    present: Sequence[str],
    shapes: Sequence[Sequence[Any]],
    output_shape: Sequence[int],
    dtype: str,
    grid: tuple[int, int],
    threads: tuple[int, int],
) -> Iterator[Frame]:
    batch = shapes[0][0] if isinstance(shapes[0][0], int) else tirx.Var("batch", "int64")
    with T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        operands = {}
        for operand, shape in zip(present, shapes, strict=True):
            own_shape = [extent if isinstance(extent, int) else batch for extent in shape]
            operands[operand] = T.arg(operand, T.buffer(own_shape, dtype))
        output = T.arg("output", T.buffer([batch, *output_shape], dtype))
        with (
            T.launch_thread("blockIdx.z", batch) as block_z,
            T.launch_thread("blockIdx.y", grid[1]) as block_y,
            T.launch_thread("blockIdx.x", grid[0]) as block_x,
            T.launch_thread("threadIdx.y", threads[1]) as thread_y,
            T.launch_thread("threadIdx.x", threads[0]) as thread_x,
        ):
            yield Frame(operands, output, block_x, block_y, block_z, thread_x, thread_y, threads)


class KernelBuilder:
    """Opens a kernel and hands out its PrimFunc once the frame is closed.

    `shapes` are the operands' shapes with an int or a symbolic first extent of the batched ones; every symbolic extent
    becomes the one int64 variable matched from the query's buffer.
    """

    def __init__(self) -> None:
        self._builder = IRBuilder()

    @contextlib.contextmanager
    def kernel(self, *arguments: Any) -> Iterator[Frame]:
        """Arguments: name, present, shapes, output_shape (without batch), dtype, (grid x, grid y), (threads x, y)."""
        with self._builder, _kernel_frame(*arguments) as frame:
            yield frame

    def prim_func(self) -> tirx.PrimFunc:
        return self._builder.get()


def barrier() -> None:
    """All threads of the threadgroup arrive, and see each other's writes to shared memory."""
    T.evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


class SharedTile:
    """A matrix in shared memory whose rows start an odd number of elements apart, hence on different memory banks.

    Flat underneath: TVM trims a two-dimensional buffer to the columns in use, and the odd distance would be lost.
    """

    def __init__(self, rows: int, columns: int, dtype: str = ACCUMULATOR) -> None:
        self.stride = columns | 1
        self.dtype = dtype
        self._buffer = T.alloc_buffer((rows * self.stride,), dtype, scope="shared")

    def load(self, row: Expr, column: Expr) -> Expr:
        return tirx.BufferLoad(self._buffer, [row * self.stride + column])

    def store(self, row: Expr, column: Expr, value: Expr) -> None:
        T.buffer_store(self._buffer, value, [row * self.stride + column])


def registers(count: int, dtype: str = ACCUMULATOR) -> tirx.Buffer:
    """A per-thread array; it stays in registers as long as every index is a Python int."""
    return T.alloc_buffer((count,), dtype, scope="local")


def store(buffer: tirx.Buffer, indices: Sequence[Any], value: Expr) -> None:
    T.buffer_store(buffer, value, list(indices))


def load(buffer: tirx.Buffer, indices: Sequence[Any]) -> Expr:
    return tirx.BufferLoad(buffer, list(indices))


def fill(buffer: tirx.Buffer, count: int, value: float) -> None:
    for index in range(count):
        store(buffer, [index], tirx.const(value, buffer.dtype))


@contextlib.contextmanager
def when(condition: Expr | bool) -> Iterator[None]:
    """Statements under a condition; a condition known to hold leaves no `if`."""
    if condition is True:
        yield
    else:
        with T.If(condition), T.Then():
            yield


def every(conditions: Sequence[Expr | bool]) -> Expr | bool:
    """The conjunction, with those known to hold left out."""
    result: Expr | bool = True
    for condition in conditions:
        if condition is not True:
            result = condition if result is True else tirx.all(result, condition)
    return result


def choose(condition: Expr | bool, value: Expr, otherwise: Expr) -> Expr:
    """`value` where the condition holds; only the chosen side is evaluated, so the other may be out of bounds."""
    return value if condition is True else tirx.if_then_else(condition, value, otherwise)


def unflatten(index: Expr, extents: Sequence[int]) -> list[Expr]:
    """Row-major coordinates of a flat index; the first is not reduced modulo its extent."""
    coordinates: list[Expr] = []
    for extent in reversed(extents[1:]):
        coordinates.append(tirx.const(0, "int32") if extent == 1 else index % extent)
        index = index if extent == 1 else index // extent
    return [index, *reversed(coordinates)]


@contextlib.contextmanager
def spread(frame: Frame, count: int) -> Iterator[Expr]:
    """The indices 0 .. count-1 dealt over all threads of the threadgroup, neighbours to neighbouring threads."""
    total = frame.threads[0] * frame.threads[1]
    with T.serial(-(-count // total)) as step:
        index = T.bind(step * total + frame.thread)
        with when(True if count % total == 0 else index < count):
            yield index


def ceil_div(value: int, step: int) -> int:
    return -(-value // step)
