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

from attnrewrite.facts import Facts
from attnrewrite.functions import is_local_op
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, Value
from attnrewrite.localattention.hoist import NOT_ON_MAP
from attnrewrite.localattention.pool_on_map import behind, is_made_of, return_outputs, write_pool
from attnrewrite.localattention.pools import Pool, find_pools, reduction
from attnrewrite.passes.fuse_window_attention import fuses_away
from attnrewrite.passes.move_merges import move_merges
from attnrewrite.pipeline import Pass
from attnrewrite.subgraph import copy_between

NAME = "move-pools"


def match_pool(facts: Facts, node: Node) -> Pool | None:
    """The pool at a node, if it is one in windows and its movement goes away in the end."""
    if reduction(node) is None:
        return None
    region = behind(facts, node.output)
    if not any(v.producer is not None and v.producer.op == "Softmax" for v in region):
        return None
    for pool in find_pools(facts, node):
        if not is_made_of(facts, pool):
            continue  # followed past a sum with something that is not of this map
        if pool.in_order:
            return None
        if _cancels(facts, pool, region):
            return pool
    return None


def rewrite_pool(facts: Facts, pool: Pool) -> None:
    on_map, _ = write_pool(facts, pool, NAME)
    return_outputs(Facts(facts.graph), on_map, pool, NAME)


def _cancels(facts: Facts, pool: Pool, region: list[Value]) -> bool:
    """Whether nothing of the movement is left once the attentions are rewritten: tried on a copy of the region."""
    copy, copies = copy_between(facts, [pool.origin], region)
    anchor = copies[pool.node.output].producer
    assert anchor is not None
    trial = Facts(copy)
    for found in find_pools(trial, anchor):
        if found.source.value is not copies[pool.source.value]:
            continue
        try:
            on_map, movement = write_pool(trial, found, NAME)
        except NOT_ON_MAP:
            return False
        movement += return_outputs(Facts(copy), on_map, found, NAME)
        return fuses_away(copy, movement, move_merges) and (found.is_whole or _only_asks(copy, on_map))
    return False


def _only_asks(graph: Graph, value: Value) -> bool:
    """Whether a map becomes nothing but queries of local ops: what stands in cells of padding is then never read."""
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


move_pools = Pass(NAME, match_pool, rewrite_pool)
