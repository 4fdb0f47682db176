"""A partition around a whole transformer block moved past its operators, until it stands around its attentions alone.

Matches
    z = merge(block(partition(x))), where partition puts the tokens of a feature map in another order, merge puts them
    back exactly, and block is per-token operators joined with what attentions compute in that order: norms, MLPs,
    residual sums, any number of layers.
Rewrites to
    the per-token operators on the map of x; before each attention its input in the block's order, behind it its output
    put back onto the map. The pass behind this one makes each attention, with these two movements, one op on the map.
Exact when
    every value of the block has each token of the map once, in a known order, operands that meet have the same, and the
    order of z is the map's own. A per-token operator on tokens in another order is the same operator on the map.
Declines when
    something would see the order it works in (a convolution, a pooling over tokens, an output of the model), or an
    attention of the block would not become one op: then the block is left as it was, for it would only get more
    movement.
Source
    MaxViT, https://arxiv.org/abs/2204.01697; MobileViT, https://arxiv.org/abs/2110.02178; NesT,
    https://arxiv.org/abs/2105.12723.
"""

from __future__ import annotations

from attnrewrite.facts import Facts
from attnrewrite.graph import Node
from attnrewrite.localattention.blocks import Block, find_block
from attnrewrite.localattention.relocate import relocate
from attnrewrite.passes.fuse_window_attention import fuses_away
from attnrewrite.pipeline import Pass
from attnrewrite.subgraph import copy_between

NAME = "move-partitions"


def match_block(facts: Facts, node: Node) -> Block | None:
    """The block behind a partition, if every movement of it goes away in the end."""
    if not node.outputs:
        return None
    block = find_block(facts, node)
    return block if block is not None and _cancels(facts, node, block) else None


def rewrite_block(facts: Facts, block: Block) -> None:
    relocate(facts, block, NAME)


def _cancels(facts: Facts, node: Node, block: Block) -> bool:
    """Whether nothing of the block's movement is left once its attentions are rewritten: tried on a copy of it."""
    copy, copies = copy_between(facts, [block.entry.value], block.exits)
    anchor = copies[block.first].producer
    assert anchor is not None
    trial = Facts(copy)
    found = find_block(trial, anchor)
    if found is None:
        return False
    movement = relocate(trial, found, NAME)
    copy.remove_dead()
    copy.sort()
    return fuses_away(copy, [*movement, anchor])


move_partitions = Pass(NAME, match_block, rewrite_block)
