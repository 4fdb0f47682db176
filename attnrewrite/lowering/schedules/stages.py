"""A PrimFunc as a list of stages: what each buffer holds, as one expression, with no loop order decided yet.

TVM's operators arrive as nests of plain loops around one store each, one nest per tensor, and operator fusion puts
several of them into one function. `parse` reads such a function back into stages, `inline` merges those that only
rename or combine elements, and the modules beside this one write loops for what is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import ir, s_tir, sym, tirx

Expr = Any  # tvm.ir.Expr; its operators are not typed

# An expression of more nodes than this is computed once and stored rather than copied into its readers.
MAX_INLINED_NODES = 400

# Calls that cost more than the memory traffic of keeping their result.
EXPENSIVE = frozenset(
    f"tirx.{name}"
    for name in ("exp", "exp2", "erf", "tanh", "sigmoid", "pow", "log", "sin", "cos", "atan", "sinh", "cosh")
)


@dataclass(frozen=True)
class Axis:
    """One iteration variable; it runs over [0, extent)."""

    var: tirx.Var
    extent: Expr

    @property
    def size(self) -> int | None:
        """The extent where it is a number, None where it is symbolic."""
        return int(self.extent) if isinstance(self.extent, tirx.IntImm) else None


@dataclass(frozen=True)
class Stage:
    """buffer[axes] = value, or, with reduction axes, the combination of value over all of them, starting at init."""

    buffer: tirx.Buffer
    axes: tuple[Axis, ...]
    value: Expr
    reduction: tuple[Axis, ...] = ()
    combine: str = ""  # "sum" | "max" | "min" | "prod"; empty for an injective stage
    init: Expr = None

    @property
    def indices(self) -> list[tirx.Var]:
        return [axis.var for axis in self.axes]


def parse(func: tirx.PrimFunc) -> list[Stage] | None:
    """The stages of a function in the order they run; None where it holds anything else (scans, extern calls ...)."""
    root = func.body
    if not isinstance(root, s_tir.SBlockRealize) or root.iter_values:
        return None
    body = root.block.body
    stages = [_parse_nest(nest) for nest in (body.seq if isinstance(body, tirx.SeqStmt) else [body])]
    written = [stage.buffer for stage in stages if stage is not None]
    if len(written) != len(stages) or len(set(written)) != len(written):
        return None
    return [stage for stage in stages if stage is not None]


def _parse_nest(stmt: Any) -> Stage | None:
    loops: dict[tirx.Var, Expr] = {}
    while isinstance(stmt, tirx.For):
        if stmt.kind != tirx.ForKind.SERIAL or not _is_zero(stmt.min):
            return None
        loops[stmt.loop_var] = stmt.extent
        stmt = stmt.body
    if not isinstance(stmt, s_tir.SBlockRealize):
        return None
    block = stmt.block
    if block.alloc_buffers or block.match_buffers or not isinstance(block.body, tirx.BufferStore):
        return None
    spatial: list[Axis] = []
    reduction: list[Axis] = []
    for iter_var, value in zip(block.iter_vars, stmt.iter_values, strict=True):
        extent = iter_var.dom.extent
        bound_to_loop = value in loops and same(loops[value], extent) and _is_zero(iter_var.dom.min)
        if not bound_to_loop and not (_is_zero(value) and same(extent, 1)):
            return None
        (reduction if iter_var.iter_type == tirx.IterVar.CommReduce else spatial).append(Axis(iter_var.var, extent))
    store = block.body
    if [*store.indices] != [axis.var for axis in spatial] or not _full(store.buffer, spatial):
        return None
    stage = Stage(store.buffer, tuple(spatial), store.value)
    return _parse_update(stage, tuple(reduction), block) if reduction else stage


def _full(buffer: tirx.Buffer, axes: Sequence[Axis]) -> bool:
    return all(same(extent, axis.extent) for extent, axis in zip(buffer.shape, axes, strict=True))


def _parse_update(stage: Stage, reduction: tuple[Axis, ...], block: s_tir.SBlock) -> Stage | None:
    """buffer[axes] = buffer[axes] (+) term, as a reduction."""
    kinds = {tirx.Add: "sum", tirx.Max: "max", tirx.Min: "min", tirx.Mul: "prod"}
    combine = kinds.get(type(stage.value))
    if combine is None or not isinstance(block.init, tirx.BufferStore):
        return None
    for accumulator, term in ((stage.value.a, stage.value.b), (stage.value.b, stage.value.a)):
        if is_load(accumulator) and accumulator.source.same_as(stage.buffer):
            if [*accumulator.indices] != stage.indices or reads(term, stage.buffer):
                return None
            return replace(stage, value=term, reduction=reduction, combine=combine, init=block.init.value)
    return None


def inline(stages: Sequence[Stage], kept: Iterable[tirx.Buffer]) -> list[Stage]:
    """Stages with every cheap or once-read injective intermediate substituted into its readers.

    kept: the function's own operands, which must be stored whatever reads them.
    """
    kept_buffers = set(kept)
    remaining = list(stages)
    for stage in stages:
        if stage.reduction or stage.buffer in kept_buffers:
            continue
        readers = [other for other in remaining if reads(other.value, stage.buffer)]
        if not readers or not _worth_inlining(stage, readers):
            continue
        current = next(s for s in remaining if s.buffer.same_as(stage.buffer))
        remaining = [
            replace(s, value=substitute_loads(s.value, current)) if any(s is r for r in readers) else s
            for s in remaining
            if s is not current
        ]
    return remaining


def _worth_inlining(stage: Stage, readers: Sequence[Stage]) -> bool:
    loads = sum(count_loads(reader.value, stage.buffer) for reader in readers)
    if loads * count_nodes(stage.value) + sum(count_nodes(r.value) for r in readers) > MAX_INLINED_NODES:
        return False
    # A reduction reads its operands many times: only renamings are free there.
    if any(reader.reduction for reader in readers):
        return is_load(stage.value)
    return loads == 1 or not calls(stage.value) & EXPENSIVE


def substitute_loads(value: Expr, stage: Stage) -> Expr:
    """`value` with every read of the stage's buffer replaced by the expression stored there."""

    def replaced(load: Any) -> Any:
        if not load.source.same_as(stage.buffer):
            return load
        return substitute(stage.value, dict(zip(stage.indices, load.indices, strict=True)))

    return tvm_ffi.structural_map(value, (ir.TensorLoad, replaced), order="post")


def substitute(value: Expr, mapping: Mapping[tirx.Var, Expr]) -> Expr:
    """`value` with variables replaced."""
    if not mapping:
        return value
    return tvm_ffi.structural_map(value, (ir.Var, lambda var: mapping.get(var, var)), order="post")


def is_load(value: Expr) -> bool:
    return isinstance(value, ir.TensorLoad)


def loads_of(value: Expr) -> list[Any]:
    """Every buffer read in the expression, one entry per occurrence."""
    found: list[Any] = []
    _visit(value, ir.TensorLoad, found.append)
    return found


def reads(value: Expr, buffer: tirx.Buffer) -> bool:
    return any(load.source.same_as(buffer) for load in loads_of(value))


def count_loads(value: Expr, buffer: tirx.Buffer) -> int:
    return sum(load.source.same_as(buffer) for load in loads_of(value))


def count_nodes(value: Expr) -> int:
    count = [0]

    def visit(_: Any) -> None:
        count[0] += 1

    _visit(value, ir.Expr, visit)
    return count[0]


def calls(value: Expr) -> set[str]:
    """Names of the intrinsics called in the expression."""
    found: list[Any] = []
    _visit(value, ir.Call, found.append)
    return {call.op.name for call in found if isinstance(call.op, ir.Op)}


def variables(value: Expr) -> set[tirx.Var]:
    found: list[Any] = []
    _visit(value, ir.Var, found.append)
    return set(found)


def _visit(value: Expr, kind: type, visit: Callable[[Any], None]) -> None:
    def callback(node: Any) -> None:
        visit(node)

    tvm_ffi.structural_walk(value, (kind, callback), order="post")


def simplify(value: Expr) -> Expr:
    return sym.Analyzer().simplify(value)


def same(left: Expr, right: Expr) -> bool:
    """Two extents are provably equal."""
    difference = simplify(left - right) if not isinstance(left, int) or not isinstance(right, int) else left - right
    return _is_zero(difference)


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | tirx.IntImm) and int(value) == 0


def stride(load: Any, var: tirx.Var) -> int | None:
    """By how many elements the address of a load moves when the variable grows by one; None where that varies."""
    offset: Expr = tirx.IntImm("int64", 0)
    for index, extent in zip(load.indices, load.source.shape, strict=True):
        offset = offset * extent + index
    moved = simplify(substitute(offset, {var: var + 1}) - offset)
    return int(moved) if isinstance(moved, tirx.IntImm) else None


def product(extents: Iterable[Expr]) -> Expr:
    """The number of elements of a box, as a number where all its extents are."""
    result: Expr = tirx.IntImm("int64", 1)
    for extent in extents:
        result = result * extent
    return simplify(result)


def static_size(axes: Iterable[Axis]) -> int | None:
    sizes = [axis.size for axis in axes]
    return None if None in sizes else math.prod(s for s in sizes if s is not None)
