"""Short names for the statements schedules are written in, and the clean-up every stored expression goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr as IrExpr

from attnrewrite.lowering.kernels import vector_math
from attnrewrite.lowering.schedules.stages import Axis, Expr, simplify

Stmt = Any  # tvm.tirx.Stmt

# Fewer scalar operations than this are done by one thread: waking the others costs a few microseconds.
SERIAL_BELOW = 1 << 15

# Up to this many iterations a short inner loop is written out.
MAX_UNROLL = 16


def const(value: int) -> Expr:
    return tirx.IntImm("int64", value)


def loop(extent: Expr, body: Callable[[Expr], Stmt], kind: tirx.ForKind = tirx.ForKind.SERIAL, name: str = "i") -> Stmt:
    """A loop over [0, extent); a loop of one iteration is its body."""
    if isinstance(extent, int):
        extent = const(extent)
    if isinstance(extent, tirx.IntImm) and int(extent) == 1:
        return body(const(0))
    var = tirx.Var(name, "int64")
    return tirx.For(var, const(0), extent, kind, body(var))


def parallel(extent: Expr, body: Callable[[Expr], Stmt], work: Expr) -> Stmt:
    """A loop shared among threads, unless `work` (scalar operations in all) is known to be too little."""
    few = isinstance(work, tirx.IntImm) and int(work) < SERIAL_BELOW
    return loop(extent, body, tirx.ForKind.SERIAL if few else tirx.ForKind.PARALLEL, "p")


def vectorized(lanes: int, body: Callable[[Expr], Stmt]) -> Stmt:
    """One vector operation per statement of the body; what it keeps per lane becomes a vector outside the loop."""
    if lanes == 1:
        return body(const(0))
    lane = tirx.Var("lane", "int64")
    inner = body(lane)
    statements = [*inner.seq] if isinstance(inner, tirx.SeqStmt) else [inner]
    kept = [s.buffer for s in statements if isinstance(s, tirx.AllocBuffer)]
    # TVM does not widen allocations inside a vectorised loop.
    wide = {buffer: local([lanes], str(buffer.dtype), buffer.name) for buffer in kept}

    def load(node: Any) -> Any:
        return tirx.BufferLoad(wide[node.source], [lane]) if node.source in wide else node

    def write(node: Any) -> Any:
        return tirx.BufferStore(wide[node.buffer], node.value, [lane]) if node.buffer in wide else node

    rewritten = [
        tvm_ffi.structural_map(s, [(ir.TensorLoad, load), (tirx.BufferStore, write)], order="post") if wide else s
        for s in statements
        if not isinstance(s, tirx.AllocBuffer)
    ]
    vector = tirx.For(lane, const(0), const(lanes), tirx.ForKind.VECTORIZED, seq(*rewritten))
    return seq(*(tirx.AllocBuffer(buffer) for buffer in wide.values()), vector)


def unrolled(extent: int, body: Callable[[Expr], Stmt]) -> Stmt:
    return loop(extent, body, tirx.ForKind.UNROLLED, "u")


def nest(axes: Sequence[Axis], body: Callable[[list[Expr]], Stmt]) -> Stmt:
    """Serial loops over all axes, the last innermost; short ones are unrolled."""

    def inner(depth: int, at: list[Expr]) -> Stmt:
        if depth == len(axes):
            return body(at)
        axis = axes[depth]
        short = axis.size is not None and axis.size <= MAX_UNROLL and depth == len(axes) - 1
        kind = tirx.ForKind.UNROLLED if short else tirx.ForKind.SERIAL
        return loop(axis.extent, lambda i: inner(depth + 1, [*at, i]), kind, axis.var.name)

    return inner(0, [])


def seq(*statements: Stmt) -> Stmt:
    return statements[0] if len(statements) == 1 else tirx.SeqStmt(list(statements))


def guarded(condition: Expr | None, body: Stmt, otherwise: Stmt | None = None) -> Stmt:
    """`if condition`; no condition means always."""
    return body if condition is None else tirx.IfThenElse(condition, body, otherwise)


def local(shape: Sequence[int], dtype: str, name: str) -> tirx.Buffer:
    """A buffer small enough for registers or the stack."""
    return tirx.decl_buffer([const(e) for e in shape], dtype, name, scope="local")


def allocated(buffer: tirx.Buffer, *statements: Stmt) -> Stmt:
    return seq(tirx.AllocBuffer(buffer), *statements)


def unravel(flat: Expr, extents: Sequence[Expr]) -> list[Expr]:
    """Coordinates of a row-major flat index within a box. The first that is not 0 anyway is not reduced modulo its
    extent, which may be symbolic: a division of 64 bits.
    """
    single = [isinstance(extent, tirx.IntImm) and int(extent) == 1 for extent in extents]
    coordinates: list[Expr] = []
    for position in reversed(range(len(extents))):
        if single[position]:
            coordinates.append(const(0))
            continue
        outermost = all(single[:position])
        coordinates.append(flat if outermost else tirx.floormod(flat, extents[position]))
        flat = tirx.floordiv(flat, extents[position])
    return [simplify(c) for c in reversed(coordinates)]


def store(buffer: tirx.Buffer, value: Expr, indices: Sequence[Expr]) -> Stmt:
    """One store: intrinsics become vector arithmetic, and what they use twice is computed once."""
    bindings, value = share(expand_intrinsics(simplify(value)))
    return seq(*bindings, tirx.BufferStore(buffer, value, [simplify(i) for i in indices]))


def expand_intrinsics(value: Expr) -> Expr:
    """Transcendental calls as polynomials in float32, divisions by a constant as products.

    The result is a DAG: pass it to `share`, not to tree walkers.
    """

    def expand(call: Any) -> Any:
        dtype = str(call.ty.dtype) if isinstance(call.ty, ir.PrimType) else ""
        name = call.op.name if isinstance(call.op, ir.Op) else ""
        if name == "tirx.pow":
            return _power(call)
        if name not in _VECTOR_MATH or dtype not in ("float32", "float16"):
            return call
        result = _VECTOR_MATH[name](*(as_dtype(argument, "float32") for argument in call.args))
        return as_dtype(result, dtype)

    def multiply(quotient: Any) -> Any:
        divisor = float(quotient.b.value) if isinstance(quotient.b, tirx.FloatImm) else 0.0
        # The reciprocal of a tiny number overflows.
        if str(quotient.ty.dtype) != "float32" or not 1e-30 < abs(divisor) < 1e30:
            return quotient
        return quotient.a * tirx.FloatImm("float32", 1.0 / divisor)

    return tvm_ffi.structural_map(value, [(ir.Call, expand), (tirx.Div, multiply)], order="post")


def _power(call: Any) -> Any:
    """Small whole exponents, which activations use, as products."""
    base, exponent = call.args
    times = float(exponent.value) if isinstance(exponent, tirx.FloatImm) else 0.0
    if times not in (2.0, 3.0, 4.0):
        return call
    square = base * base
    return {2.0: square, 3.0: square * base, 4.0: square * square}[times]


def as_dtype(value: Expr, dtype: str) -> Expr:
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)


_VECTOR_MATH: dict[str, Callable[..., Expr]] = {
    "tirx.exp": vector_math.exp,
    "tirx.exp2": vector_math.exp2,
    "tirx.erf": vector_math.erf,
    "tirx.sigmoid": vector_math.sigmoid,
    "tirx.tanh": vector_math.tanh,
}


def share(value: Expr) -> tuple[list[Stmt], Expr]:
    """Keep every subexpression object used more than once: (statements that compute them, the value in terms of them).

    Sharing is by object or by Let, so it undoes what building an expression of repeated parts does, and nothing more.
    """
    value = _without_lets(value)
    uses: dict[Any, int] = {}

    def count(node: Any) -> None:
        uses[node] = uses.get(node, 0) + 1
        if uses[node] == 1:
            for operand in _operands(node):
                count(operand)

    count(value)
    if not any(n > 1 and _operands(node) for node, n in uses.items()):
        return [], value
    bindings: list[Stmt] = []
    rebuilt: dict[Any, Expr] = {}

    def rebuild(node: Any) -> Expr:
        if node in rebuilt:
            return rebuilt[node]
        result = _with_operands(node, [rebuild(operand) for operand in _operands(node)])
        if uses[node] > 1 and _operands(node):
            # A buffer, not a bound variable: TVM's simplifier would put the expression back in every place it is used.
            kept = local([1], str(node.ty.dtype), "t")
            bindings.extend([tirx.AllocBuffer(kept), tirx.BufferStore(kept, result, [const(0)])])
            result = tirx.BufferLoad(kept, [const(0)])
        rebuilt[node] = result
        return result

    return bindings, rebuild(value)


def _without_lets(value: Expr) -> Expr:
    """Let-bound variables as the objects they stand for: a DAG. TVM's simplifier would make a tree of the bindings."""
    bound: dict[Any, Expr] = {}
    rebuilt: dict[Any, Expr] = {}

    def rebuild(node: Any) -> Expr:
        if isinstance(node, tirx.Let):
            bound[node.var] = rebuild(node.value)
            return rebuild(node.body)
        if isinstance(node, ir.Var):
            return bound.get(node, node)
        if node not in rebuilt:
            rebuilt[node] = _with_operands(node, [rebuild(operand) for operand in _operands(node)])
        return rebuilt[node]

    return rebuild(value)


_BINARY = (
    tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Min, tirx.Max, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE,
    tirx.And, tirx.Or, tirx.LShift, tirx.RShift, tirx.BitwiseAnd, tirx.BitwiseOr, tirx.BitwiseXor,
)  # fmt: skip


def _operands(node: IrExpr) -> list[Any]:
    """The operands of a pure arithmetic node. Everything else (loads, conditionals that guard a load) is a leaf."""
    if isinstance(node, _BINARY):
        return [node.a, node.b]
    if isinstance(node, tirx.Select):
        return [node.condition, node.true_value, node.false_value]
    if isinstance(node, tirx.Cast):
        return [node.value]
    if isinstance(node, ir.Call) and isinstance(node.op, ir.Op) and node.op.name != "prim.if_then_else":
        return [*node.args]
    return []


def _with_operands(node: Any, operands: list[Expr]) -> Expr:
    if all(new.same_as(old) for new, old in zip(operands, _operands(node), strict=True)):
        return node
    if isinstance(node, _BINARY):
        return type(node)(*operands)
    if isinstance(node, tirx.Select):
        return tirx.Select(*operands)
    if isinstance(node, tirx.Cast):
        return tirx.Cast(str(node.ty.dtype), operands[0])
    return ir.Call(node.op, operands, node.attrs, [*node.ty_args], ret_ty=node.ty)
