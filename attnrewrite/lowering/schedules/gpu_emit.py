"""What the GPU schedules share: a function rewritten as a sequence of kernel launches, and how stages are stored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import Limits
from attnrewrite.lowering.limits import BUFFERS
from attnrewrite.lowering.schedules.loops import const, share, unravel
from attnrewrite.lowering.schedules.stages import Axis, Expr, product, simplify

UNLIMITED = 1 << 16

_HALVES = ("float16", "bfloat16")

# Intrinsics of such arguments are evaluated in float32: some have no half-precision form, and none is exact enough.
_TRANSCENDENTAL = frozenset(
    f"tirx.{name}" for name in ("exp", "exp2", "erf", "tanh", "sigmoid", "pow", "log", "sin", "cos", "sqrt", "rsqrt")
)


@dataclass(frozen=True)
class Device:
    """What the schedules need to know of a GPU.

    has_erf: its language has erf. buffers: that one kernel may take, besides the one that holds all scalars.
    intrinsics: for which target calls of its matrix instructions are written: of the emulator, where the kernels of a
    CUDA device are to be run there.
    """

    target: Target
    intrinsics: Target

    limits: Limits
    has_erf: bool
    buffers: int

    @property
    def concurrent(self) -> int:
        """How many threadgroups of 256 threads it works on at a time, roughly."""
        return self.limits.in_flight

    @property
    def has_simdgroup_matrix(self) -> bool:
        return bool(self.target.kind.name == "metal")

    @classmethod
    def of(cls, target: Target) -> Device:
        kind = target.kind.name
        return cls(target, target, Limits.of(target), kind == "cuda", BUFFERS.get(kind, UNLIMITED) - 1)


def rebuild(func: tirx.PrimFunc, emit: Callable[[], None]) -> tirx.PrimFunc:
    """A function with the operands and attributes of `func` whose body is what `emit` adds to the open IR builder.

    The IR builder insists on a name; it gives way to the function's own where that has one.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        for param in func.params:
            T.arg(param.name, param)
        emit()
    return builder.get().with_attrs({**func.attrs, "tirx.is_scheduled": True})


@dataclass(frozen=True)
class Thread:
    """Where a thread of an open kernel stands: flat threadgroup index, and position (x, y) of `size` within it."""

    block: Expr
    x: Expr
    y: Expr
    size: tuple[int, int]

    @property
    def index(self) -> Expr:
        return self.y * self.size[0] + self.x


@contextlib.contextmanager
def launch(blocks: Expr, size: tuple[int, int]) -> Iterator[Thread]:
    """One kernel launch: `blocks` threadgroups of size[0] x size[1] threads."""
    with (
        T.launch_thread("blockIdx.x", blocks) as block,
        T.launch_thread("threadIdx.y", size[1]) as y,
        T.launch_thread("threadIdx.x", size[0]) as x,
    ):
        yield Thread(block, x, y, size)


def bind_axes(axes: Sequence[Axis], flat: Expr) -> dict[tirx.Var, Expr]:
    """The axes' variables at a row-major flat position, each in a variable of the kernel."""
    places = unravel(as_type(flat, "int64"), [axis.extent for axis in axes])
    return {axis.var: keep(place) for axis, place in zip(axes, places, strict=True)}


def keep(value: Expr) -> Expr:
    """The value in a variable of its own, unless it is a constant or a variable already."""
    return value if isinstance(value, tirx.IntImm | ir.Var) else T.bind(value)


def put(device: Device, buffer: tirx.Buffer, indices: Sequence[Expr], value: Expr) -> None:
    """buffer[indices] = value, converted to the buffer's type, with intrinsics the device has."""
    bindings, value = share(_device_intrinsics(device, simplify(as_type(value, str(buffer.dtype)))))
    for binding in bindings:
        T.add_to_parent(binding)
    T.buffer_store(buffer, value, [simplify(index) for index in indices])


def _device_intrinsics(device: Device, value: Expr) -> Expr:
    """Nothing is rounded to bfloat16 on the way either. The result may be a DAG: pass it to `share`, not to tree
    walkers.
    """

    def replaced(call: Any) -> Any:
        name = call.op.name if isinstance(call.op, ir.Op) else ""
        dtype = str(call.ty.dtype) if isinstance(call.ty, ir.PrimType) else ""
        if name == "tirx.erf" and not device.has_erf:
            return as_type(_erf(as_type(call.args[0], "float32")), dtype)
        if name in _TRANSCENDENTAL and dtype in _HALVES:
            single = tirx.call_intrin("float32", name, *(as_type(argument, "float32") for argument in call.args))
            return as_type(single, dtype)
        return call

    return tvm_ffi.structural_map(value, [(ir.Call, replaced), (tirx.Cast, _without_return)], order="post")


def _without_return(cast: Any) -> Any:
    """float32(bfloat16(x)) -> x, and bfloat16(float32(x)) -> x, of an x of the type it returns to."""
    there, back = cast.value, str(cast.ty.dtype)
    if not isinstance(there, tirx.Cast) or {back, str(there.ty.dtype)} != {"float32", "bfloat16"}:
        return cast
    return there.value if str(there.value.ty.dtype) == back else cast


# Coefficients of _erf.
_ERF_T = 0.3275911
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def _erf(x: Expr) -> Expr:
    """erf to 1.5e-7 absolute, in operations that fast-math compilers may reorder without harm.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26.
    """
    magnitude = tirx.abs(x)
    t = _f32(1.0) / (_f32(1.0) + _f32(_ERF_T) * magnitude)
    series = _f32(_ERF[0])
    for coefficient in _ERF[1:]:
        series = series * t + _f32(coefficient)
    result = _f32(1.0) - series * t * tirx.exp(_f32(0.0) - magnitude * magnitude)
    return tirx.Select(x < _f32(0.0), _f32(0.0) - result, result)


def _f32(value: float) -> Expr:
    return tirx.const(value, "float32")


def as_type(value: Expr, dtype: str) -> Expr:
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)


def accumulator_type(buffer: tirx.Buffer) -> str:
    """Sums of half-precision numbers are kept in single precision."""
    return "float32" if str(buffer.dtype) in _HALVES else str(buffer.dtype)


def count(axes: Sequence[Axis]) -> Expr:
    """The number of points of a box: a Python int where it is known."""
    points = product(axis.extent for axis in axes)
    return int(points) if isinstance(points, tirx.IntImm) else points


def ceil_div(value: Expr, step: int) -> Expr:
    """Like value // step rounded up: a Python int for an int, an expression for an expression."""
    return -(-value // step) if isinstance(value, int) else simplify(tirx.floordiv(value + (step - 1), const(step)))


def below(value: Expr, bound: Expr, multiple: int) -> Expr | bool:
    """`value < bound`; True where it holds anyway because the bound is a known multiple of what `value` advances by."""
    return True if isinstance(bound, int) and bound % multiple == 0 else value < bound


Bound = Mapping[tirx.Var, Expr]
