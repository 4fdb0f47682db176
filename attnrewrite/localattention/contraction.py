"""Sums of products, in whatever form they are written, as maps over one grid.

MatMul, Einsum, Gemm and Mul followed by ReduceSum all say: out[i] = sum_k a[f(i, k)] * b[g(i, k)]. The grid axes of i
are the caller's; the summed position k runs along one more grid axis, flattened if several axes are summed. Two of the
factors may be computed (a product of queries and keys, of weights and values), or one (a product with a constant).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.einsum import einsum_labels
from attnrewrite.indexing.map import Coordinate, Index, IndexingError, constant
from attnrewrite.indexing.rules import Read, broadcast_index, sources


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
        return sum(v is not None and not v.is_constant for v in node.inputs) == 2
    return product_of(node) is not None


def is_weighted_sum(node: Node | None) -> bool:
    """A sum over products of one computed tensor and constants (a Linear, a table of positions)."""
    if node is None or node.domain != STANDARD_DOMAIN:
        return False
    match node.op:
        case "MatMul" | "Einsum":
            return len(node.inputs) > 1 and sum(v is not None and not v.is_constant for v in node.inputs) == 1
        case "Gemm":
            return node.input(2) is None and not node.required(0).is_constant and node.required(1).is_constant
        case "ReduceSum":
            factor = node.required(0).producer
            return (
                factor is not None
                and factor.op == "Mul"
                and any(v is not None and v.is_constant for v in factor.inputs)
            )
    return False


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


REARRANGING = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand"})


def rearranges(node: Node) -> bool:
    """Whether a node passes its numbers on, in another order or type at most."""
    return node.domain == STANDARD_DOMAIN and (node.op in REARRANGING or passes_on(node))


def product_of(node: Node) -> Node | None:
    """The Mul of two computed tensors that a ReduceSum sums, casts and new orders between them aside; None where there
    is none.
    """
    if node.op != "ReduceSum" or node.domain != STANDARD_DOMAIN:
        return None
    factor = node.required(0).producer
    while factor is not None and rearranges(factor):
        factor = factor.required(0).producer
    if factor is None or factor.op != "Mul" or any(v is None or v.is_constant for v in factor.inputs):
        return None
    return factor


def operands(node: Node, index: Index, axis: int) -> tuple[Operand, Operand]:
    """The two computed factors of `node.output[index]`, the summed position along grid axis `axis`.

    Raises IndexingError for a form that has no single summed axis.
    """
    first, second = (f for f in factors(node, index, axis) if not f.value.is_constant)
    return first, second


def factors(node: Node, index: Index, axis: int) -> tuple[Operand, ...]:
    """Every factor of `node.output[index]`, constants included; as `operands`."""
    match node.op:
        case "MatMul":
            return _matmul(node, index, axis)
        case "Gemm":
            return _gemm(node, index, axis)
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
    if len(a.known_shape) < 2 or len(b.known_shape) < 2:
        raise IndexingError(f"{node.label} multiplies a vector")
    (k,) = _summed([_static(a.known_shape[-1], node)], axis, index[0].rank)
    return (
        Operand(a, broadcast_index((*index[:-1], k), a)),
        Operand(b, broadcast_index((*index[:-2], k, index[-1]), b)),
    )


def _gemm(node: Node, index: Index, axis: int) -> tuple[Operand, Operand]:
    a, b = node.required(0), node.required(1)
    if node.attributes.get("alpha", 1.0) != 1.0 or node.attributes.get("transA", 0) or node.input(2) is not None:
        raise IndexingError(f"{node.label} does more than multiply")
    (k,) = _summed([_static(a.known_shape[-1], node)], axis, index[0].rank)
    right = (index[1], k) if node.attributes.get("transB", 0) else (k, index[1])
    return Operand(a, (index[0], k)), Operand(b, right)


def _einsum(node: Node, index: Index, axis: int) -> tuple[Operand, ...]:
    values = [v for v in node.inputs if v is not None]
    terms, output = einsum_labels(node.attributes["equation"], [len(v.known_shape) for v in values])
    if any(len(set(term)) != len(term) for term in (*terms, output)):
        raise IndexingError(f"{node.label} takes a diagonal")
    extents: dict[str, object] = {}
    for term, value in zip(terms, values, strict=True):
        for label, extent in zip(term, value.known_shape, strict=True):
            if extents.get(label, 1) == 1:
                extents[label] = extent
    labels = [x for x in dict.fromkeys(x for term in terms for x in term) if x not in output]
    computed = [t for t, v in zip(terms, values, strict=True) if not v.is_constant]
    if any(x not in term for x in labels for term in (computed if len(computed) > 1 else terms)):
        raise IndexingError(f"{node.label} sums one operand alone")
    rank = index[0].rank
    coordinates = dict(zip(output, index, strict=True))
    coordinates |= dict(zip(labels, _summed([_static(extents[x], node) for x in labels], axis, rank), strict=True))
    found = []
    for term, value in zip(terms, values, strict=True):
        own = [constant(0, rank) if e == 1 else coordinates[x] for x, e in zip(term, value.known_shape, strict=True)]
        found.append(Operand(value, tuple(own)))
    return tuple(found)


def _sum_of_products(node: Node, index: Index, axis: int) -> tuple[Operand, Operand]:
    factor = product_of(node) or node.required(0).producer
    assert factor is not None
    summand = node.required(0)
    shape = summand.known_shape
    rank = len(shape)
    axes = node.constant(1)
    if axes is None:
        raise IndexingError(f"{node.label} sums over every axis")
    summed = sorted(int(a) % rank for a in axes.reshape(-1))
    positions = _summed([_static(shape[a], node) for a in summed], axis, index[0].rank)
    kept = list(index)
    if node.attributes.get("keepdims", 1):
        kept = [c for a, c in enumerate(index) if a not in summed]
    full: list[Coordinate] = []
    for a in range(rank):
        full.append(positions[summed.index(a)] if a in summed else kept.pop(0))
    inside = _through(summand, tuple(full), factor.output)
    a_value, b_value = factor.required(0), factor.required(1)
    return Operand(a_value, broadcast_index(inside, a_value)), Operand(b_value, broadcast_index(inside, b_value))


def _through(value: Value, index: Index, target: Value) -> Index:
    """`value[index]` as positions in `target`, from which it is rearranged."""
    while value is not target:
        node = value.producer
        assert node is not None
        if node.op not in REARRANGING:
            value = node.required(0)
            continue
        found = sources(node, value, index)
        if found is None or len(found) != 1 or not isinstance(found[0], Read):
            raise IndexingError(f"{node.label} rearranges a product in a way that has no indexing rule")
        value, index = found[0].value, found[0].index
    return index
