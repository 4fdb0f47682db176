"""What the GPU kernels share: device limits, the frame of a kernel, and short names for IR builder statements.

The kernels are written with TVM's IR builder rather than TVMScript because their loop nests depend on the number of
spatial axes and on which operands are present: a Python `for` unrolls, `T.serial` makes a loop of the kernel.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import DataType, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from attnrewrite.errors import CompilerError

Expr = Any  # tvm.ir.Expr; its operators are not typed

ACCUMULATOR = "float32"
WORD_BYTES = 16  # the widest access to memory
# Threadgroups for every one that keeps the GPU busy, before each takes on the work of several.
WAVES = 4
INDEXED = 2**31  # a buffer has fewer elements
LOWEST = -3.402823e38  # finite on purpose: GPU compilers in fast-math mode may assume that no infinity is compared


@dataclass(frozen=True)
class Limits:
    """What one threadgroup may use: threads, and bytes of threadgroup (CUDA: static shared) memory.

    resident_bytes: the shared memory of one GPU core, which all its resident threadgroups divide among themselves.
    in_flight: how many threadgroups keep the GPU busy; a threadgroup takes on more work only beyond that many.
    batch: images that a batch of unknown extent is taken for.
    registers: of a core, which its resident threads divide among themselves; 0 where that is not known.
    held: the numbers that a thread may keep in registers, indices and addresses aside. together: multiply-adds in the
    time of a load of four bytes from shared memory where neighbouring threads load the same; it is four where each
    loads its own, and on CUDA, which is not documented to merge loads of 16 bytes. near: of tilings whose estimated
    times differ by less than this factor, the one that moves the fewest bytes is taken; on CUDA a large cache has what
    is read again.
    """

    threads: int
    shared_bytes: int
    resident_bytes: int
    in_flight: int
    batch: int = 1
    registers: int = 0
    held: int = 112
    together: int = 1
    near: float = 1.1

    @classmethod
    def of(cls, target: Target) -> Limits:
        """Limits of a metal or cuda target, by its own attributes where it carries them."""
        defaults = {"metal": (32768, 61440), "cuda": (49152, 102400)}.get(target.kind.name, (16384, 16384))
        shared = min(int(target.attrs.get("max_shared_memory_per_block", defaults[0])), 49152)
        of_chip = (256, shared, max(defaults[1], shared))
        if target.kind.name == "cuda":
            return cls(*of_chip, in_flight=264, batch=16, registers=65536, held=200, together=4, near=1.0)
        return cls(*of_chip, in_flight=32)

    def run(self, threadgroups: Expr | int, most: int) -> Expr | int:
        """Of how many threadgroups one does the work, one after the other, where there would be so many."""
        return between(1, threadgroups // (WAVES * self.in_flight), most)


@dataclass(frozen=True)
class Operands:
    """What a kernel is made for: shapes of its operands by name, in the op's order.

    Batched ones begin with an int or a symbolic variable; one int64 variable of the kernel's own, matched from the
    first operand, then stands for it. dtype: of the outputs, and of all operands but those that `dtypes` names. steps:
    of those of query, key and value that are parts of wider maps, the channels of these. A part is passed as a vector
    of the numbers from its first to its last.
    """

    shapes: Mapping[str, Sequence[Any]]
    dtype: str
    dtypes: Mapping[str, str] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """An open kernel: its operand buffers by name, its outputs, and where it stands in the grid of (x, y, z)."""

    operands: dict[str, tirx.Buffer]
    outputs: tuple[tirx.Buffer, ...]
    x: Expr
    y: Expr
    z: Expr
    thread_x: Expr
    thread_y: Expr
    threads: tuple[int, int]

    @property
    def thread(self) -> Expr:
        """The flat index within the threadgroup; x runs fastest, as in a warp."""
        return self.thread_y * self.threads[0] + self.thread_x

    @property
    def output(self) -> tirx.Buffer:
        """The first, or only, output."""
        return self.outputs[0]

    @property
    def batch(self) -> Expr | int:
        """Extent of the batch: a number where it is known, else of 32 bits as all indices are."""
        extent = self.output.shape[0]
        return int(extent) if isinstance(extent, tirx.IntImm) else tirx.Cast("int32", extent)


Grid = Callable[[Expr], tuple[int, int, Expr]]
"""Extent of the batch -> threadgroups along x, y and z, launched as one row: CUDA has at most 65535 along y and z."""


@contextlib.contextmanager
def _kernel_frame(
    name: str,
    given: Operands,
    output_shapes: Sequence[Sequence[int]],
    grid: Grid,
    threads: tuple[int, int],
    channel_axis: int,
) -> Iterator[Frame]:
    first = next(iter(given.shapes.values()))[0]
    batch = first if isinstance(first, int) else tirx.Var("batch", "int64")
    with T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        operands = {}
        for operand, shape in given.shapes.items():
            own_shape = [extent if isinstance(extent, int) else batch for extent in shape]
            if operand in given.steps:
                own_shape = [tirx.Var(f"{operand}_numbers", "int64")]
            operands[operand] = T.arg(operand, T.buffer(own_shape, given.dtypes.get(operand, given.dtype)))
        outputs = tuple(
            T.arg(f"output_{number}" if number else "output", T.buffer([batch, *shape], given.dtype))
            for number, shape in enumerate(output_shapes)
        )
        for operand, step in given.steps.items():
            part, extents = operands[operand], [batch, *given.shapes[operand][1:]]
            extents[channel_axis] = step
            operands[operand] = T.decl_buffer(extents, part.dtype, data=part.data)
        x, y, z = grid(batch)
        with (
            _indices_fit([*operands.values(), *outputs], batch),
            T.launch_thread("blockIdx.x", z * (x * y)) as block,
            T.launch_thread("threadIdx.y", threads[1]) as thread_y,
            T.launch_thread("threadIdx.x", threads[0]) as thread_x,
        ):
            at_z, at_y, at_x = map(T.bind, unflatten(tirx.Cast("int32", block), (0, y, x)))
            yield Frame(operands, outputs, at_x, at_y, at_z, thread_x, thread_y, threads)


def _indices_fit(buffers: Sequence[tirx.Buffer], batch: Expr) -> contextlib.AbstractContextManager[Any]:
    """A check by the host that 32 bits hold every index. Raises CompilerError where extents that are known say no."""
    known = [math.prod(int(e) for e in buffer.shape if isinstance(e, tirx.IntImm)) for buffer in buffers]
    batched = [any(not isinstance(e, tirx.IntImm) for e in buffer.shape) for buffer in buffers]
    if (largest := max((n for n, varies in zip(known, batched, strict=True) if not varies), default=0)) >= INDEXED:
        raise CompilerError(f"a tensor has {largest} elements; kernels of GPUs take fewer than 2**31")
    if isinstance(batch, int):
        return contextlib.nullcontext()
    most = (INDEXED - 1) // max(n for n, varies in zip(known, batched, strict=True) if varies)
    sentence = f"a batch of more than {most} has tensors of 2**31 elements; kernels of GPUs take fewer"
    return T.Assert(batch <= most, sentence, "ValueError")


class KernelBuilder:
    """Opens a kernel and hands out its PrimFunc once the frame is closed."""

    def __init__(self) -> None:
        self._builder = IRBuilder()

    @contextlib.contextmanager
    def kernel(
        self,
        name: str,
        operands: Operands,
        output_shapes: Sequence[Sequence[int]],
        grid: Grid,
        threads: tuple[int, int],
        *,
        channel_axis: int = -1,
    ) -> Iterator[Frame]:
        """output_shapes: without batch. threads: along x and y. channel_axis: of query, key and value; one of them that
        is part of a wider map is in the frame as if that map began with it.
        """
        with self._builder, _kernel_frame(name, operands, output_shapes, grid, threads, channel_axis) as frame:
            yield frame

    def prim_func(self) -> tirx.PrimFunc:
        return self._builder.get()


def barrier() -> None:
    """All threads of the threadgroup arrive, and see each other's writes to shared memory."""
    T.evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


def lanes_of(dtype: str, divisor: int) -> int:
    """The most elements that one access moves where every run of them starts at a multiple of `divisor`."""
    return math.gcd(divisor, WORD_BYTES // DataType(dtype).itemsize)


class Flat:
    """A buffer as one row of elements, `lanes` of them moved at once.

    No GPU language here has a vector of eight halves: those move as words of four 32-bit integers, which keeps the
    bits but cannot be computed with.
    """

    def __init__(self, buffer: tirx.Buffer, lanes: int, dtype: str | None = None, elements: Expr = None) -> None:
        self.lanes, self.dtype = lanes, dtype or str(buffer.dtype)
        as_bits = lanes > 4
        self._ratio = 2 if as_bits else 1
        self._type = "int32" if as_bits else self.dtype
        if elements is None:
            elements = math.prod(buffer.shape[1:], start=tirx.Cast("int32", buffer.shape[0]))
        self._buffer = T.decl_buffer((elements // self._ratio,), self._type, data=buffer.data, scope=buffer.scope())

    def _index(self, first: Expr) -> Expr:
        if self.lanes == 1:
            return first
        return tirx.Ramp(first // self._ratio, 1, self.lanes // self._ratio)

    def load(self, first: Expr) -> Expr:
        """Elements first .. first + lanes."""
        return tirx.BufferLoad(self._buffer, [self._index(first)])

    def store(self, first: Expr, value: Expr) -> None:
        T.buffer_store(self._buffer, value, [self._index(first)])

    def pointer(self, first: Expr) -> Expr:
        """Where an element lies, for functions that take pointers; of a view with one lane."""
        return tirx.address_of(tirx.BufferLoad(self._buffer, [first]))

    @property
    def zero(self) -> Expr:
        single = tirx.const(0, self._type)
        return single if self.lanes == 1 else tirx.Broadcast(single, self.lanes // self._ratio)


class SharedMemory:
    """Threadgroup memory that tiles of several types share, one after the other; aligned to words.

    Some of them must be float32: TVM declares memory that is only ever half precision as such, in the wrong size.
    """

    def __init__(self, size_bytes: int) -> None:
        self.buffer = T.alloc_buffer((ceil_div(size_bytes, WORD_BYTES),), "float32x4", scope="shared")


@dataclass(frozen=True)
class TileShape:
    """A matrix in shared memory whose rows start an odd number of words apart, hence on different memory banks."""

    rows: int
    columns: int
    dtype: str = ACCUMULATOR

    @property
    def stride(self) -> int:
        """Elements from row to row."""
        word = WORD_BYTES // DataType(self.dtype).itemsize
        return (ceil_div(self.columns, word) | 1) * word

    @property
    def size_bytes(self) -> int:
        return self.rows * self.stride * DataType(self.dtype).itemsize


class SharedTile:
    """A tile in memory of its own, or that lies in `memory` from a byte on, a multiple of a word.

    lanes: the widths of the accesses it allows.
    """

    def __init__(
        self,
        shape: TileShape,
        memory: SharedMemory | tirx.Buffer | None = None,
        first_byte: int = 0,
        lanes: Sequence[int] = (1,),
    ) -> None:
        self.shape = shape
        self._first = first_byte // DataType(shape.dtype).itemsize
        last = self._first + shape.rows * shape.stride
        if memory is None:
            memory = T.alloc_buffer((last,), shape.dtype, scope="shared")
        buffer = memory.buffer if isinstance(memory, SharedMemory) else memory
        self._views = {n: Flat(buffer, n, shape.dtype, last) for n in lanes}

    def load(self, row: Expr, column: Expr, lanes: int = 1) -> Expr:
        return self._views[lanes].load(self._at(row, column))

    def store(self, row: Expr, column: Expr, value: Expr, lanes: int = 1) -> None:
        self._views[lanes].store(self._at(row, column), value)

    def _at(self, row: Expr, column: Expr) -> Expr:
        return row * self.shape.stride + column + self._first


def typed(value: Expr, dtype: str, lanes: int) -> Expr:
    """The value, a vector of `lanes` elements, in another element type."""
    target = dtype if lanes == 1 else f"{dtype}x{lanes}"
    return value if str(value.ty.dtype) == target else value.astype(target)


def from_lane(value: Expr, lane: Expr) -> Expr:
    """What `value` is, float32, in a lane of the SIMD group; all 32 of them ask."""
    mask, width = tirx.const(0xFFFFFFFF, "uint32"), tirx.const(32, "int32")
    return tirx.call_intrin(ACCUMULATOR, "tirx.tvm_warp_shuffle", mask, value, lane, width, width)


def combine_lanes(
    frame: Frame,
    value: Expr,
    operation: Callable[[Expr, Expr], Expr],
    target: tirx.Buffer,
    at: int,
    lanes: int | None = None,
) -> None:
    """target[at] = value combined over `lanes` neighbouring threads, in all of them alike.

    lanes: a power of two and at most a SIMD group; None: those of one row of the threadgroup.
    """
    store(target, [at], value)
    reach = (lanes or frame.threads[0]) // 2
    while reach:
        other = from_lane(load(target, [at]), (frame.thread % 32) ^ reach)
        store(target, [at], operation(load(target, [at]), other))
        reach //= 2


def registers(count: int, dtype: str = ACCUMULATOR) -> tirx.Buffer:
    """A per-thread array; it stays in registers as long as every index is a Python int."""
    return T.alloc_buffer((count,), dtype, scope="local")


def held(value: Expr) -> Expr:
    """The value, computed here once. TVM writes out again what `T.bind` names, wherever it is used."""
    register = registers(1, str(value.ty.dtype))
    store(register, [0], value)
    return load(register, [0])


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


def between(least: int, value: Expr | int, most: int) -> Expr | int:
    """The value, or the bound beyond which it lies."""
    return max(least, min(value, most)) if isinstance(value, int) else tirx.max(tirx.min(value, most), least)
