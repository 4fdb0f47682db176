"""Sums over gathered neighbours that no softmax announces: contractions, and products added one by one.

A long chain w_0 * v_0 + w_1 * v_1 + ... is read as one sum over a position that the graph does not have: the factors
are stacked by nodes that belong to nobody's graph, so that the same maps are asked of every spelling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnrewrite.dims import Shape
from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import Index, identity, reshape
from attnrewrite.indexing.provenance import provenances
from attnrewrite.indexing.rules import RULES, broadcast_index
from attnrewrite.localattention.attention import WeightedSum, split_axes
from attnrewrite.localattention.contraction import Operand, is_contraction, operands, product_of, rearranges
from attnrewrite.localattention.tokens import full_range

# What puts neighbours together, in any spelling.
GATHERING = frozenset({"Gather", "GatherND", "GatherElements", "Concat", "Conv", "Pad"})
# How many operators behind its factors a contraction is searched for one of them.
GATHERING_LIMIT = 64
# A chain of fewer products is no neighbourhood.
FEWEST_TERMS = 3


@dataclass(frozen=True, eq=False)
class GatheredSum:
    """A weighted sum, and the facts by which its factors are followed (stacked factors included)."""

    sum: WeightedSum
    facts: Facts


def is_gathered_sum(facts: Facts, node: Node) -> bool:
    """A quick look: whether a node may sum weighted neighbours."""
    if is_contraction(node):
        return _gathers(node)
    if node.op != "Add" or node.domain != STANDARD_DOMAIN:
        return False
    user = facts.only_user(node.output)
    return user is None or user.op != "Add" or not any(_is_product(v.producer) for v in user.inputs if v is not None)


def read_gathered_sums(facts: Facts, node: Node) -> list[GatheredSum]:
    """The sum at a node, with either factor as the values that lies at places moving with the summed position.

    Raises IndexingError where a map on the way cannot be expressed.
    """
    if node.output.shape is None:
        return []
    if node.op == "Add":
        return read_chain(facts, node)
    output_shape = split_axes(facts, node.output)
    key_axis = len(output_shape)
    index = reshape(identity(output_shape, key_axis + 2), output_shape, node.output.shape)
    return _either_way(facts, node, output_shape, operands(node, index, key_axis), key_axis)


def _either_way(
    facts: Facts, node: Node, shape: Shape, pair: tuple[Operand, Operand], key_axis: int
) -> list[GatheredSum]:
    found = []
    for weights, value in (pair, pair[::-1]):
        if not _moves(facts, value, key_axis) or _comes_from_softmax(weights.value):
            continue
        keys = max(c.values.shape[key_axis] for c in value.index)
        own = tuple(a for a in range(key_axis) if _varies(value.index, a) and not _varies(weights.index, a))
        summed = WeightedSum(node, shape, weights.index, value, key_axis, own, keys, weights.value)
        found.append(GatheredSum(summed, facts))
    return found


def read_chain(facts: Facts, root: Node) -> list[GatheredSum]:
    """Products of two computed tensors added one by one, as a sum; none where `root` adds anything else."""
    terms = _products(facts, root)
    if terms is None or len(terms) < FEWEST_TERMS or root.output.shape is None:
        return []
    sides = _sides(terms)
    if sides is None:
        return []
    virtual: list[Node] = []
    stacks = [_stack(side, root.output.name, virtual) for side in sides]
    key_axis = len(root.output.shape)
    index = identity(root.output.shape, key_axis + 2)
    position = full_range(key_axis, len(terms), key_axis + 2)
    one, other = (
        Operand(stack, (position, *broadcast_index(index, side[0]))) for stack, side in zip(stacks, sides, strict=True)
    )
    return _either_way(facts.with_nodes(virtual), root, root.output.shape, (one, other), key_axis)


def _varies(index: Index, axis: int) -> bool:
    return any(axis in c.depends_on() for c in index)


def _gathers(node: Node) -> bool:
    """Whether a factor of a contraction is put together of pieces of one tensor."""
    pending = [v for v in (product_of(node) or node).inputs if v is not None]
    seen: set[int] = set()
    while pending and len(seen) < GATHERING_LIMIT:
        producer = pending.pop().producer
        if producer is None or id(producer) in seen or producer.op not in RULES or producer.domain != STANDARD_DOMAIN:
            continue
        seen.add(id(producer))
        if producer.op in GATHERING:
            return True
        pending += [v for v in producer.inputs if v is not None and not v.is_constant]
    return False


def _moves(facts: Facts, operand: Operand, key_axis: int) -> bool:
    """Whether a coordinate of what the operand is moved from depends on the summed position and on an output axis."""
    for found in provenances(operand.value, operand.index, facts.positions):
        if any(key_axis in c.depends_on() and len(c.depends_on()) > 1 for c in found.index):
            return True
    return False


def _comes_from_softmax(value: Value) -> bool:
    node = value.producer
    while node is not None and rearranges(node):
        node = node.required(0).producer
    return node is not None and node.op == "Softmax"


def _is_product(node: Node | None) -> bool:
    return (
        node is not None
        and node.op == "Mul"
        and node.domain == STANDARD_DOMAIN
        and not any(v is None or v.is_constant for v in node.inputs)
    )


def _products(facts: Facts, root: Node) -> list[Node] | None:
    """The products that a tree of Adds sums, in order; None where it sums anything else (zeros aside)."""
    found: list[Node] = []
    pending = [root.output]
    while pending:
        value = pending.pop()
        if value.is_constant and not value.constant.any():
            continue
        node = value.producer
        if node is None or value.shape != root.output.shape:
            return None
        if node is not root and facts.only_user(value) is None:
            return None
        if _is_product(node):
            found.append(node)
        elif node.op == "Add" and node.domain == STANDARD_DOMAIN:
            pending += [node.required(1), node.required(0)]
        else:
            return None
    return found


def _sides(terms: list[Node]) -> tuple[list[Value], list[Value]] | None:
    """The two factors of every product, told apart by their shapes; None where they do not match."""
    first, second = terms[0].required(0), terms[0].required(1)
    sides: tuple[list[Value], list[Value]] = ([], [])
    for term in terms:
        one, other = term.required(0), term.required(1)
        if one.shape is None or other.shape is None:
            return None
        if (one.shape, other.shape) != (first.shape, second.shape):
            one, other = other, one
        if (one.shape, other.shape) != (first.shape, second.shape):
            return None
        sides[0].append(one)
        sides[1].append(other)
    return sides


def _stack(values: list[Value], stem: str, virtual: list[Node]) -> Value:
    """[K, *shape]: the values one behind the other, by nodes that are in no graph."""
    parts = []
    for k, value in enumerate(values):
        part = Value(f"{stem}_{k}_apart", (1, *value.known_shape), value.dtype)
        axes = Value(f"{stem}_axes", (1,), np.dtype(np.int64), np.zeros(1, np.int64))
        virtual.append(Node("Unsqueeze", [value, axes], [part]))
        parts.append(part)
    stacked = Value(f"{stem}_stacked", (len(values), *values[0].known_shape), values[0].dtype)
    virtual.append(Node("Concat", parts, [stacked], {"axis": 0}))
    return stacked
