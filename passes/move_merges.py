"""A merge of windows moved before what is joined to the attention inside them.

Matches
    z = merge(f(a + r)), where a is the output of an attention in another order of tokens than the map's, f per-token
    operators, + any pointwise operator, and r computed in the same order by other means.
Rewrites to
    z = f(merge(a) + merge(r)). The pass behind this one makes the attention, with its merge, one op on the map.
Exact when
    r lays out its tokens as a does. Pointwise operators commute with movement.
Declines when
    the attention would not become one op (tried on a copy): then nothing changes.
Source
    locally enhanced positional encoding of CSWin, https://arxiv.org/abs/2107.00652.
"""

from __future__ import annotations

from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node
from attnrewrite.localattention.blocks import Block
from attnrewrite.localattention.merges import find_merge
from attnrewrite.localattention.relocate import relocate
from attnrewrite.passes.fuse_window_attention import fuses_away
from attnrewrite.pipeline import Pass
from attnrewrite.subgraph import copy_between

NAME = "move-merges"


def match_merge(facts: Facts, node: Node) -> Block | None:
    """The block between an attention and the merge of what it is joined to, if the attention becomes one op by that."""
    if node.op != "Softmax" or node.domain != STANDARD_DOMAIN:
        return None
    found = find_merge(facts, node)
    if found is None:
        return None
    block, sources = found
    copy, copies = copy_between(facts, [source.value for source in sources], block.exits)
    anchor = copies[node.output].producer
    assert anchor is not None
    trial = Facts(copy)
    again = find_merge(trial, anchor)
    if again is None:
        return None
    put_back = relocate(trial, again[0], NAME)[:1]
    return block if fuses_away(copy, put_back) else None


def rewrite_merge(facts: Facts, block: Block) -> None:
    relocate(facts, block, NAME)


move_merges = Pass(NAME, match_merge, rewrite_merge)
