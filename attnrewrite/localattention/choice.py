"""Tokens chosen from data: the operators that read or write at computed indices, and how a decline speaks of them.

No indexing map describes them, so a site that depends on them is left; its owner is told which operator chooses.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value, ancestors
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.tokens import candidates

if TYPE_CHECKING:
    from attnrewrite.localattention.attention import Attention

# The input that holds the indices (of Compress: which elements to keep).
INDEX_INPUT = {
    "Gather": 1,
    "GatherElements": 1,
    "GatherND": 1,
    "ScatterElements": 1,
    "ScatterND": 1,
    "Compress": 1,
}
_CHOOSERS = frozenset({"TopK", "ArgMax", "ArgMin", "NonZero", "Unique", "Multinomial", "Bernoulli"})
_SEARCHED = 64  # operators between the choice and the indices


def run_time_choice(node: Node) -> str | None:
    """How a node depends on indices computed from data: "GatherElements, at indices that TopK computes"; None if it
    does not.
    """
    position = INDEX_INPUT.get(node.op) if node.domain == STANDARD_DOMAIN else None
    index = None if position is None else node.input(position)
    if index is None or index.is_constant or not _comes_from_data(index):
        return None
    origin = _origin(index)
    return f"{node.op}, at indices that {origin} computes" if origin else f"{node.op}, at indices given to the model"


def _comes_from_data(index: Value) -> bool:
    """Whether it takes more than the shapes of tensors to compute it."""
    return any(v.producer is None and not v.is_constant for v in ancestors([index], _is_of_shapes))


def _is_of_shapes(value: Value) -> bool:
    return value.producer is not None and value.producer.op in ("Shape", "Size")


def _origin(index: Value) -> str | None:
    """The operator that chooses: the nearest known to, else the one that returns the indices."""
    queue, seen = deque([index]), {id(index)}
    while queue and len(seen) <= _SEARCHED:
        node = queue.popleft().producer
        if node is None:
            continue
        if node.op in _CHOOSERS:
            return node.op
        for value in node.inputs:
            if value is not None and not value.is_constant and id(value) not in seen:
                seen.add(id(value))
                queue.append(value)
    return None if index.producer is None else index.producer.op


def chosen_at_run_time(facts: Facts, attention: Attention) -> Decline | None:
    """Said of an attention whose keys or values are picked from the tokens by data, its queries not (or otherwise)."""
    ends = {}
    for name, operand in (("query", attention.query), ("key", attention.key), ("value", attention.value)):
        way = list(candidates(operand.value, operand.index, attention.channel_axis, facts.positions))
        ends[name] = way[-1].value.producer if way else None
    for name in ("key", "value", "query"):
        end = ends[name]
        choice = None if end is None else run_time_choice(end)
        others = [ends[other] for other in ends if other != name]
        if end is not None and choice is not None and any(other is not end for other in others):
            return Decline(f"the {name} tokens are chosen from data: they come from {choice}", end.label)
    return None
