"""A pool of tokens inside windows computed on the feature map instead.

Matches
    p = reduce(partition(f(x))) over tokens of one window, where reduce is a maximum, minimum, mean or sum (or a pool
    whose kernels lie side by side), f per-token operators, and partition any movement of the tokens of the map x.
Rewrites to
    p = movement(pool(f(x))): the same operators and a strided pool on the map, and the pooled pixels put into the order
    the model has them in. The passes behind this one make the attentions around it ops between the two maps, and the
    movement is gone.
Exact when
    every element of p reduces one cell of the map, the cells are all congruent and tile the map. A maximum over a cell
    is that over its rows, then over its columns; a mean is equal up to rounding.
Declines when
    the movement would not be gone in the end (tried on a copy): then nothing changes.
Source
    Hiera, https://arxiv.org/abs/2306.00989; Agent Attention, https://arxiv.org/abs/2312.08874.
"""

from __future__ import annotations

from collections.abc import Iterator

from attnrewrite.facts import Facts
from attnrewrite.functions import is_local_op
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, Value
from attnrewrite.localattention.hoist import NOT_ON_MAP
from attnrewrite.localattention.pool_on_map import behind, is_made_of, return_outputs, write_pool
from attnrewrite.localattention.pools import Pool, find_pools, is_reduction
from attnrewrite.passes.fuse_window_attention import fuses_away
from attnrewrite.passes.move_merges import move_merges
from attnrewrite.pipeline import Pass
from attnrewrite.subgraph import copy_between

NAME = "move-pools"


def match_pool(facts: Facts, node: Node) -> tuple[Pool, ...] | None:
    """The pools to move, of which one is at a node, if they are pools in windows whose movement goes away in the end:
    that one alone, or together with others of the same cells (keys and values, pooled each on its own).
    """
    if not is_reduction(node):
        return None
    region = behind(facts, node.output)
    if not any(v.producer is not None and v.producer.op == "Softmax" for v in region):
        return None
    for pool in find_pools(facts, node):
        if not is_made_of(facts, pool):
            continue  # followed past a sum with something that is not of this map
        if pool.in_order:
            return None
        if _cancel(facts, (pool,), region):
            return (pool,)
        more = tuple(_beside(facts, pool, region))
        if more and _cancel(facts, (pool, *more), region):
            return (pool, *more)
    return None


def _beside(facts: Facts, pool: Pool, region: list[Value]) -> Iterator[Pool]:
    """Pools behind a pool in topological order that are not made of it, of the same cells, for the same attentions."""
    own = set(region)
    first, last = facts.positions[pool.node.output], max(facts.positions[v] for v in region)
    for node in facts.graph.nodes[first + 1 : last]:
        if not is_reduction(node) or node.output in own or own.isdisjoint(behind(facts, node.output)):
            continue
        for other in find_pools(facts, node):
            alike = other.cells == pool.cells and other.source.spatial == pool.source.spatial
            if alike and other.source.batch == pool.source.batch and is_made_of(facts, other):
                yield other
                break


def rewrite_pools(facts: Facts, pools: tuple[Pool, ...]) -> None:
    for pool in pools:
        on_map, _ = write_pool(Facts(facts.graph), pool, NAME)
        return_outputs(Facts(facts.graph), on_map, pool, NAME)


def _cancel(facts: Facts, pools: tuple[Pool, ...], region: list[Value]) -> bool:
    """Whether nothing of the movement is left once the attentions are rewritten: tried on a copy of the region."""
    exits = [*region, *(v for pool in pools[1:] for v in behind(facts, pool.node.output))]
    entries = [pool.origin for pool in pools]
    copy, copies = copy_between(facts, entries, exits)
    movement: list[Node] = []
    padded = []
    for pool in pools:
        anchor, trial = copies[pool.node.output].producer, Facts(copy)
        assert anchor is not None
        found = next((f for f in find_pools(trial, anchor) if f.source.value is copies[pool.source.value]), None)
        if found is None:
            return False
        try:
            on_map, moved = write_pool(trial, found, NAME)
        except NOT_ON_MAP:
            return False
        movement += moved + return_outputs(Facts(copy), on_map, found, NAME)
        padded += [] if found.is_whole else [on_map]
    if not movement and fuses_away(copy_between(facts, entries, exits)[0], (), move_merges):
        return False  # the pools are in the map's order as it is, and nothing waits for them
    return fuses_away(copy, movement, move_merges) and all(_only_asks(copy, on_map) for on_map in padded)


def _only_asks(graph: Graph, value: Value) -> bool:
    """Whether a map becomes nothing but queries of local ops: what stands in cells of padding is then never read."""
    while value.producer is not None and value.producer.op == "Reshape":
        value = value.producer.required(0)  # what reads the map may read it in another shape
    users = graph.users()
    pending, seen = [value], {value}
    while pending:
        here = pending.pop()
        if here in graph.outputs:
            return False
        for user in users.get(here, []):
            if is_local_op(user):
                if any(v is here for v in user.inputs[1:]):
                    return False
                continue
            if user.domain != STANDARD_DOMAIN:
                return False
            pending += [o for o in user.outputs if o not in seen]
            seen.update(user.outputs)
    return True


move_pools = Pass(NAME, match_pool, rewrite_pools)
