"""Sums of moved numbers: elements that are several elements of other tensors added up.

Overlap-add (Col2Im, `fold`) is the reverse of unfold. Where blocks overlap it is no movement: an output element reads
several input elements.
It is read as the sum of one read per place in the block, so that it may be spelled as one operator or as padded maps
added up, and either is compared with a closed form as integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.blocks import block_axes
from attnrewrite.indexing.map import Coordinate, Index, IndexingError, reduced
from attnrewrite.indexing.provenance import provenances
from attnrewrite.indexing.rules import Read, broadcast_index


def is_sum(node: Node | None) -> bool:
    """Whether a node adds up elements that may all be moved from one tensor."""
    return node is not None and node.domain == STANDARD_DOMAIN and node.op in ("Add", "Sum", "Col2Im")


def summands(
    value: Value, index: Index, is_target: Callable[[Value], bool], positions: Mapping[Value, int]
) -> list[Read]:
    """Reads of targets that add up to `value[index]`; a read counts as zero where its `where` is False.

    positions: as for `provenances`. Raises IndexingError where anything else takes part in the sum.
    """
    found: list[Read] = []
    pending = [Read(value, index)]
    while pending:
        read = pending.pop()
        last = None
        for last in provenances(read.value, read.index, positions):
            if is_target(last.value):
                break
        assert last is not None
        if any(f.number for f in last.fills):
            raise IndexingError(f"numbers other than zero are added around {last.value.name}")
        where = _both(read.where, last.domain)
        if where is not None and not where.any():
            continue
        if is_target(last.value):
            found.append(Read(last.value, last.index, where))
            continue
        node = last.value.producer
        if node is None or not is_sum(node):
            raise IndexingError(f"{last.value.name} is added, which comes from elsewhere")
        terms = _overlap_add(node, last.index) if node.op == "Col2Im" else _added(node, last.index)
        pending += [Read(t.value, t.index, _both(where, t.where)) for t in reversed(terms)]
    return found


def _both(a: np.ndarray | None, b: np.ndarray | None) -> np.ndarray | None:
    if a is None or b is None:
        return a if b is None else b
    return a & b


def _added(node: Node, index: Index) -> list[Read]:
    """out[i] = a[i] + b[i]."""
    return [Read(v, broadcast_index(index, v)) for v in node.inputs if v is not None]


def _overlap_add(node: Node, index: Index) -> list[Read]:
    """out[b, c, p] = sum_t in[b, c * K + t, l], over the places t of the block and block positions l with
    l * stride + t * dilation - pad = p along every axis.
    """
    axes = block_axes(node)
    if axes is None:
        raise IndexingError(f"{node.label} has a block that is computed")
    channel = index[1].static("overlap-add")
    positions = [c.static("overlap-add") for c in index[2:]]
    size = math.prod(a.size for a in axes)
    terms = []
    for place, at in enumerate(np.ndindex(*(a.size for a in axes))):
        where: np.ndarray = np.ones((1,) * channel.ndim, bool)
        flat: np.ndarray = np.zeros((1,) * channel.ndim, np.int64)
        for axis, row, position in zip(axes, at, positions, strict=True):
            inside, block = axis.blocks(row, position)
            where, flat = where & inside, flat * axis.count + block
        moved = (index[0], Coordinate(channel * size + place), Coordinate(reduced(flat)))
        terms.append(Read(node.required(0), moved, where))
    return terms
