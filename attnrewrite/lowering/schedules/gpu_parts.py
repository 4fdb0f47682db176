"""Stages of more tensors than one GPU kernel may take (Metal: 31 buffers), in parts.

concat = x0[...] if c0 else x1[...] if c1 else ... else xn[...]   ->   one kernel for every 30 of the x
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tvm_ffi
from tvm import ir, tirx

from attnrewrite.lowering.schedules.stages import Expr, Stage, loads_of

IF_THEN_ELSE = "prim.if_then_else"


def operands(value: Expr) -> set[tirx.Buffer]:
    """The tensors an expression reads."""
    return {load.source for load in loads_of(value)}


def parts_of_choice(stage: Stage, buffers: int) -> list[tuple[Stage, Expr | None]]:
    """An injective stage as stages that read and write at most `buffers` tensors, and where each of them holds (None:
    everywhere); the stage itself where no part of its value is a choice among tensors to divide.
    """
    if len(operands(stage.value)) < buffers or (choice := _longest_choice(stage.value)) is None:
        return [(stage, None)]
    around = len(operands(stage.value) - operands(choice))
    branches, last = _branches(choice)
    parts: list[tuple[Stage, Expr | None]] = []
    taken: Expr | None = None  # by the parts so far
    while branches or last is not None:
        own: list[tuple[Expr, Expr]] = []
        while branches and len({b for _, v in (*own, branches[0]) for b in operands(v)}) + around < buffers:
            own.append(branches.pop(0))
        if not own and branches:
            return [(stage, None)]  # one branch alone is too much
        if not branches and len({b for v in (*(v for _, v in own), last) for b in operands(v)}) + around < buffers:
            value, here = _chain(own, last), None
            last = None
        elif own:
            value = _chain(own[:-1], own[-1][1])
            here = _any([condition for condition, _ in own])
        else:
            value, here, last = last, None, None
        replaced = tvm_ffi.structural_map(
            stage.value, (ir.Call, lambda call, value=value: value if call.same_as(choice) else call), order="post"
        )
        free = None if taken is None else tirx.Not(taken)
        parts.append(
            (replace(stage, value=replaced), here if free is None else free if here is None else tirx.And(free, here))
        )
        taken = here if taken is None else taken if here is None else tirx.Or(taken, here)
    return parts


def _longest_choice(value: Expr) -> Any:
    """The outermost conditional that reads most tensors."""
    found: list[Any] = []

    def visit(call: Any) -> None:
        if isinstance(call.op, ir.Op) and call.op.name == IF_THEN_ELSE:
            found.append(call)

    tvm_ffi.structural_walk(value, (ir.Call, visit), order="post")
    return max(reversed(found), key=lambda call: len(operands(call)), default=None)


def _branches(choice: Any) -> tuple[list[tuple[Expr, Expr]], Expr | None]:
    """(condition, value) of a chain of conditionals, and what it is where none of them holds."""
    branches: list[tuple[Expr, Expr]] = []
    while isinstance(choice, ir.Call) and isinstance(choice.op, ir.Op) and choice.op.name == IF_THEN_ELSE:
        condition, value, choice = choice.args
        branches.append((condition, value))
    return branches, choice


def _chain(branches: list[tuple[Expr, Expr]], last: Expr) -> Expr:
    for condition, value in reversed(branches):
        last = tirx.if_then_else(condition, value, last)
    return last


def _any(conditions: list[Expr]) -> Expr:
    result = conditions[0]
    for condition in conditions[1:]:
        result = tirx.Or(result, condition)
    return result
