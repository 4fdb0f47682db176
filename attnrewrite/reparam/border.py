"""Values with a constant per channel around them, whatever wrote it: the padding that a BatchNorm would have given.

DBB pads a branch after its BatchNorm, and writes into the border what that gives for zeros. Exporters write this as
scatters, or as slices and concatenations. They all only move elements, so two runs of them on numbers of which no two
are alike show where every element comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnrewrite.dims import elements, is_static, static
from attnrewrite.floats import is_float
from attnrewrite.frontend.evaluate import NUMPY_OPS, Arrays
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value, ancestors

# Nodes that write a border are few, and the maps that are looked at are of this many elements at most.
MOST_NODES = 64
MOST_ELEMENTS = 1 << 26


@dataclass(frozen=True, eq=False)
class Border:
    """inner [B, C, *size] with begin elements before and end after each spatial axis, all numbers[c] in channel c."""

    inner: Value
    begin: tuple[int, ...]
    end: tuple[int, ...]
    numbers: np.ndarray
    nodes: frozenset[Node]


def read_border(value: Value) -> Border | None:
    """What a value is made of, if it is another one with a constant border."""
    found = _source(value)
    if found is None:
        return None
    inner, nodes = found
    if value.shape is None or inner.shape is None or not (is_static(value.shape) and is_static(inner.shape)):
        return None
    if len(value.shape) != len(inner.shape) or len(inner.shape) < 3 or value.shape[:2] != inner.shape[:2]:
        return None
    if value.shape == inner.shape or elements(value.shape) > MOST_ELEMENTS:
        return None
    count = np.arange(1.0, elements(inner.shape) + 1).reshape([static(e) for e in inner.shape])
    first, second = (_run(value, inner, sign * count) for sign in (1, -1))
    if first is None or second is None:
        return None
    constant = first == second
    at = np.argwhere(~constant)
    if not len(at) or not constant.any():
        return None
    begin, stop = at.min(axis=0)[2:], at.max(axis=0)[2:] + 1
    inside: tuple[Any, ...] = (..., *(slice(b, s) for b, s in zip(begin, stop, strict=True)))
    if first[inside].shape != count.shape or not np.array_equal(first[inside], count):
        return None
    numbers = np.array([channel[around][0] for channel, around in zip(first[0], constant[0], strict=True)])
    spread = numbers.reshape(-1, *[1] * len(begin))
    if not np.array_equal(np.where(constant, spread, first), first):
        return None
    end = tuple(int(e - s) for e, s in zip(first.shape[2:], stop, strict=True))
    return Border(inner, tuple(map(int, begin)), end, numbers, nodes)


def _source(value: Value) -> tuple[Value, frozenset[Node]] | None:
    """The one tensor that a value is moved from, and the nodes that move it."""
    before = ancestors([value], stop=lambda v: v.is_constant or not moves(v.producer))
    nodes = frozenset(v.producer for v in before if v.producer is not None)
    read = {v for n in nodes for v in n.reads() if not v.is_constant and v not in before}
    found = len(read) == 1 and len(nodes) <= MOST_NODES and any(map(_holds_numbers, nodes))
    return (read.pop(), nodes) if found else None


def _holds_numbers(node: Node) -> bool:
    """Whether a node brings in numbers of the model's own, which a border is made of; a circular one has none."""
    if node.op == "Pad":
        return node.attributes.get("mode", "constant") in ("constant", b"constant")
    constants = (v for v in node.inputs if v is not None and v.is_constant)
    return any(v.dtype is not None and is_float(v.dtype) for v in constants)


def moves(node: Node | None) -> bool:
    """Whether a node may be one of those that write a border."""
    return node is not None and node.domain == STANDARD_DOMAIN and node.op in _MOVES and len(node.outputs) == 1


def _run(value: Value, inner: Value, numbers: np.ndarray) -> np.ndarray | None:
    """The value where the inner one holds these numbers, float64; None where a node is none of those known."""
    known: dict[Value, np.ndarray] = {inner: numbers}
    pending = [value]
    while pending:
        wanted = pending[-1]
        if wanted in known:
            pending.pop()
        elif wanted.is_constant:
            known[wanted] = wanted.constant
        else:
            node = wanted.producer
            assert node is not None
            missing = [v for v in node.reads() if v not in known]
            pending += missing
            if not missing:
                result = _MOVES[node.op](node, [None if v is None else known[v] for v in node.inputs])
                if result is None:
                    return None
                known[wanted] = result
    return known[value]


def _scatter(node: Node, inputs: Arrays) -> np.ndarray | None:
    data, indices, updates = inputs
    assert data is not None and indices is not None and updates is not None
    if node.attributes.get("reduction", "none") not in ("none", b"none"):
        return None
    result = data.copy()
    result[tuple(np.moveaxis(indices, -1, 0))] = updates
    return result


def _pad(node: Node, inputs: Arrays) -> np.ndarray | None:
    data, pads, fill, *axes = (*inputs, None)[:4] if len(inputs) > 2 else (*inputs, None)
    assert data is not None and pads is not None
    if node.attributes.get("mode", "constant") not in ("constant", b"constant") or any(a is not None for a in axes):
        return None
    if (pads < 0).any():
        return None
    around = list(zip(pads[: data.ndim].tolist(), pads[data.ndim :].tolist(), strict=True))
    return np.pad(data, around, constant_values=0.0 if fill is None else float(fill.reshape(-1)[0]))


_MOVES: dict[str, Callable[[Node, Arrays], np.ndarray | None]] = {
    **{op: NUMPY_OPS[op] for op in ("Slice", "Concat", "Transpose", "Identity")},
    "ScatterND": _scatter,
    "Pad": _pad,
}
