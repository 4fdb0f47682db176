"""Something else joined to an attention's output before that is merged: found and seen as a block on the map.

An attention inside windows may be added to what the model computes in the same windows by other means (a convolution of
their values, say), and only the sum is merged. The tokens of the output lie where those of the query do, which tells
their order on the map.
"""

from __future__ import annotations

from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import reduced
from attnrewrite.indexing.rules import RULES
from attnrewrite.localattention.attention import read_attention
from attnrewrite.localattention.blocks import REGROUPING, Block, TokenMap, block_behind, is_per_token, token_order
from attnrewrite.localattention.contraction import is_contraction
from attnrewrite.localattention.maps import pixels_asked, read_ways
from attnrewrite.localattention.returns import read_back
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source, tokens_of
from attnrewrite.ops import POINTWISE


def find_merge(facts: Facts, softmax: Node) -> tuple[Block, list[Source]] | None:
    """The block from an attention's output, about to be joined, to the merged sum, and the maps of the attention's
    operands; None where nothing is joined on the way.
    """
    joined = _joined(facts, softmax)
    if joined is None:
        return None
    attention = read_attention(facts, softmax)
    ways = attention if isinstance(attention, Decline) else read_ways(facts, attention)
    if isinstance(attention, Decline) or isinstance(ways, Decline):
        return None
    back = read_back(facts, attention, ways.features, joined)
    if back is None:
        return None
    for query in reversed(ways.sources["query"]):
        asked = pixels_asked(attention, ways.features, query, back)
        if asked is None or reduced(asked).shape[-1] != 1:
            continue
        position = reduced(asked)[..., 0]
        order = token_order(joined, position, frozenset(back.roles.features), tokens_of(query))
        if order is None:
            continue
        block = block_behind(facts, TokenMap(query.value, query.roles, query.batch, query.spatial, order), joined)
        if block is not None:
            return block, [source for sources in ways.sources.values() for source in sources]
    return None


def _joined(facts: Facts, softmax: Node) -> Value | None:
    """The value made of the attention's output alone that is joined to another computed one before tokens move."""
    found: Value | None = None
    value, summed = softmax.output, False
    while users := facts.users(value):
        if found is not None and all(_moves(user) for user in users):
            return found
        node = users[0]
        if len(users) > 1 or len(node.outputs) > 1 or node.domain != STANDARD_DOMAIN:
            return None
        if is_contraction(node) and not is_per_token(node):
            if summed:
                return None
            summed = True
        elif node.op in POINTWISE and sum(v is not None and not v.is_constant for v in node.inputs) > 1:
            found = found or (value if summed else None)
        elif not is_per_token(node) and node.op not in RULES:
            return None
        value = node.output
    return None


def _moves(node: Node) -> bool:
    return node.domain == STANDARD_DOMAIN and node.op in RULES and node.op not in REGROUPING and not is_per_token(node)
