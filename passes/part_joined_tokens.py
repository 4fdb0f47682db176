"""Extra tokens joined to the tokens of every window kept apart from them, but for the attention.

Matches
    a Concat of class, register or carrier tokens and the tokens of a window, then per-token operators joined with what
    attentions compute (norms, MLPs, residual sums, any number of layers), then the nodes that part the rows again.
Rewrites to
    the same operators on each part; the parts are joined where an attention reads them, and what it computes is parted
    at once. The passes behind this one make the attention one op on the map, with the extra tokens as operands.
Exact when
    every operator between treats each token alike, and every cut takes tokens of one part.
Declines when
    joining and parting would not be gone in the end (tried on a copy): then nothing changes.
Source
    FasterViT, https://arxiv.org/abs/2306.06189; RegionViT, https://arxiv.org/abs/2106.02689.
"""

from __future__ import annotations

import math

from attnrewrite.dims import Dim
from attnrewrite.facts import Facts
from attnrewrite.graph import Graph, Node, Value
from attnrewrite.localattention.blocks import is_per_token, ways
from attnrewrite.localattention.grid import count
from attnrewrite.localattention.joined_tokens import JoinedRows, connected, find_joined_rows, keep_apart
from attnrewrite.localattention.sources import model_batch
from attnrewrite.passes.fuse_window_attention import fuse_window_attention
from attnrewrite.passes.move_merges import move_merges
from attnrewrite.passes.move_partitions import move_partitions
from attnrewrite.pipeline import Pass, Pipeline
from attnrewrite.subgraph import copy_between

NAME = "part-joined-tokens"


def match_joined_tokens(facts: Facts, node: Node) -> list[JoinedRows] | None:
    """The rows that begin at a Concat, and those that follow from block to block, of which all movement goes away."""
    if not _joins_windows(facts, node):
        return None
    rows, behind = connected(facts, node, lambda other: _joins_windows(facts, other))
    while rows and rows[0].join is node:
        left = _left(facts, rows, behind)
        if not left:
            return rows
        rows = [r for r in rows if r.join not in left]
    return None


def _joins_windows(facts: Facts, node: Node) -> bool:
    """Whether a node joins along more rows than the model has batch elements."""
    batch, shape = model_batch(facts), node.output.shape if node.op == "Concat" else None
    if batch is None or shape is None:
        return False
    before = math.prod(count(e) for e in shape[: node.attributes["axis"] % len(shape)])
    return before > count(batch) and (isinstance(shape[0], Dim) or not isinstance(batch, Dim))


def rewrite_joined_tokens(facts: Facts, rows: list[JoinedRows]) -> None:
    for join in [r.join for r in rows]:
        _keep_apart(facts.graph, join)


def _keep_apart(graph: Graph, join: Node) -> list[Node]:
    """The nodes that move tokens now; the Concat itself where its rows are not parted again."""
    facts = Facts(graph)
    rows = find_joined_rows(facts, join)
    return [join] if rows is None else keep_apart(facts, rows, NAME)


def _left(facts: Facts, rows: list[JoinedRows], behind: list[Value]) -> set[Node]:
    """The Concats of which some movement is left once the attentions are rewritten: tried on a copy."""
    copy, copies = copy_between(facts, [_origin(facts, r) for r in rows], behind)
    joins = {r.join: copies[r.join.output].producer for r in rows}
    if not any(n.op == "Softmax" for n in copy.nodes):
        return set(joins)
    movement = {join: _keep_apart(copy, own) for join, own in joins.items() if own is not None}
    Pipeline([move_partitions, move_merges, fuse_window_attention]).run(copy)
    present = set(copy.nodes)
    return {join for join, nodes in movement.items() if present & set(nodes)}


def _origin(facts: Facts, rows: JoinedRows) -> Value:
    """The map that the largest part of the rows was moved from, also before operators that treat every token alike."""
    value = max(zip(rows.extents, rows.join.reads(), strict=True), key=lambda part: part[0])[1]
    batch = model_batch(facts)
    while True:
        for way in ways(facts, value):
            if not way.value.is_constant:
                value = way.value
        node = value.producer
        if node is None or not is_per_token(node) or value.known_shape[:1] == (batch,):
            return value
        value = min((v for v in node.reads() if not v.is_constant), key=lambda v: facts.positions.get(v, -1))


part_joined_tokens = Pass(NAME, match_joined_tokens, rewrite_joined_tokens)
