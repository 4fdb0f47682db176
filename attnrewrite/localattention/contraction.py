"""Sums of products of two computed tensors, in whatever form they are written, as two maps over one grid.

MatMul, a two-operand Einsum and Mul followed by ReduceSum all say: out[i] = sum_k a[f(i, k)] * b[g(i, k)]. The grid
axes of i are the caller's; the summed position k runs along one more grid axis, flattened if several axes are summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import Coordinate, Index, IndexingError, constant
from attnrewrite.indexing.rules import broadcast_index


@dataclass(frozen=True, eq=False)
class Operand:
    """One factor of a contraction and the map by which it is read."""

    value: Value
    index: Index


def is_contraction(node: Node | None) -> bool:
    """A sum over products of two computed tensors. False does not mean that nothing is summed."""
    if node is None or node.domain != STANDARD_DOMAIN:
        return False
    if node.op in ("MatMul", "Einsum"):
        return len(node.inputs) == 2 and not any(node.required(k).is_constant for k in range(2))
    return product_of(node) is not None


def passes_on(node: Node) -> bool:
    """Whether an Identity, a cast or a Dropout passes its numbers on, rounding aside: not a cast to integers, nor a
    Dropout in training.
    """
    match node.op:
        case "Identity":
            return True
        case "Cast":
            return _is_floating(node.required(0).dtype) and _is_floating(node.output.dtype)
        case "Dropout":
            training = node.constant(2)
            return node.input(2) is None or (training is not None and not training.any())
    return False


def _is_floating(dtype: np.dtype | None) -> bool:
    return dtype is not None and (dtype.kind == "f" or dtype.name == "bfloat16")


def product_of(node: Node) -> Node | None:
    """The Mul of two computed tensors that a ReduceSum sums, casts between them aside; None where there is none."""
    if node.op != "ReduceSum" or node.domain != STANDARD_DOMAIN:
        return None
    factor = node.required(0).producer
    while factor is not None and factor.op == "Cast" and passes_on(factor):
        factor = factor.required(0).producer
    if factor is None or factor.op != "Mul" or any(v is None or v.is_constant for v in factor.inputs):
        return None
    return factor


def operands(node: Node, index: Index, axis: int) -> tuple[Operand, Operand]:
    """The two factors of `node.output[index]`, the summed position along grid axis `axis`.

    Raises IndexingError for a form that has no single summed axis.
    """
    match node.op:
        case "MatMul":
            return _matmul(node, index, axis)
        case "Einsum":
            return _einsum(node, index, axis)
        case _:
            return _sum_of_products(node, index, axis)


def _summed(extents: list[int], axis: int, grid_rank: int) -> list[Coordinate]:
    """Coordinates of the summed axes, row-major along one grid axis."""
    shape = [1] * grid_rank
    shape[axis] = math.prod(extents)
    position = np.arange(shape[axis], dtype=np.int64)
    return [Coordinate(c.reshape(shape)) for c in np.unravel_index(position, extents)] if extents else []


def _static(extent: object, node: Node) -> int:
    if not isinstance(extent, int):
        raise IndexingError(f"{node.label} sums over the symbolic extent {extent}")
    return extent


def _matmul(node: Node, index: Index, axis: int) -> tuple[Operand, Operand]:
    a, b = node.required(0), node.required(1)
    assert a.shape is not None and b.shape is not None
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise IndexingError(f"{node.label} multiplies a vector")
    (k,) = _summed([_static(a.shape[-1], node)], axis, index[0].rank)
    return (
        Operand(a, broadcast_index((*index[:-1], k), a)),
        Operand(b, broadcast_index((*index[:-2], k, index[-1]), b)),
    )


def _einsum(node: Node, index: Index, axis: int) -> tuple[Operand, Operand]:
    equation = node.attributes["equation"].replace(" ", "")
    if "." in equation or "->" not in equation:
        raise IndexingError(f"{node.label} is an Einsum in implicit form")
    inputs, output = equation.split("->")
    left, right = inputs.split(",")
    if any(len(set(term)) != len(term) for term in (left, right, output)):
        raise IndexingError(f"{node.label} takes a diagonal")
    values = (node.required(0), node.required(1))
    extents: dict[str, object] = {}
    for term, value in zip((left, right), values, strict=True):
        assert value.shape is not None
        for label, extent in zip(term, value.shape, strict=True):
            if extents.get(label, 1) == 1:
                extents[label] = extent
    labels = [x for x in dict.fromkeys(left + right) if x not in output]
    if any(x not in left or x not in right for x in labels):
        raise IndexingError(f"{node.label} sums one operand alone")
    rank = index[0].rank
    coordinates = dict(zip(output, index, strict=True))
    coordinates |= dict(zip(labels, _summed([_static(extents[x], node) for x in labels], axis, rank), strict=True))
    found = []
    for term, value in zip((left, right), values, strict=True):
        assert value.shape is not None
        own = [constant(0, rank) if e == 1 else coordinates[x] for x, e in zip(term, value.shape, strict=True)]
        found.append(Operand(value, tuple(own)))
    return found[0], found[1]


def _sum_of_products(node: Node, index: Index, axis: int) -> tuple[Operand, Operand]:
    factor = product_of(node)
    assert factor is not None
    product = factor.output
    assert product.shape is not None
    rank = len(product.shape)
    axes = node.constant(1)
    if axes is None:
        raise IndexingError(f"{node.label} sums over every axis")
    summed = sorted(int(a) % rank for a in axes.reshape(-1))
    positions = _summed([_static(product.shape[a], node) for a in summed], axis, index[0].rank)
    kept = list(index)
    if node.attributes.get("keepdims", 1):
        kept = [c for a, c in enumerate(index) if a not in summed]
    full: list[Coordinate] = []
    for a in range(rank):
        full.append(positions[summed.index(a)] if a in summed else kept.pop(0))
    a_value, b_value = factor.required(0), factor.required(1)
    return (
        Operand(a_value, broadcast_index(tuple(full), a_value)),
        Operand(b_value, broadcast_index(tuple(full), b_value)),
    )
