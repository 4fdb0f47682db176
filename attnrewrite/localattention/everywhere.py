"""A softmax that cannot be read to its end may still be plainly global: its logits alone tell.

Probabilities that are used twice, logits that are read elsewhere or get a computed term: such a site is left in any
case. Where every query of a batch element meets the same keys, saying so tells its owner more than what stopped the
reading.
"""

from __future__ import annotations

from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.map import Index, IndexingError, identity
from attnrewrite.indexing.provenance import provenances
from attnrewrite.indexing.rules import broadcast_index
from attnrewrite.localattention.attention import NOT_OVER_KEYS
from attnrewrite.localattention.contraction import Operand, is_contraction, operands
from attnrewrite.localattention.grid import count
from attnrewrite.localattention.maps import global_attention
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source, reads_alike, sources_of
from attnrewrite.localattention.tokens import candidates, feature_axes
from attnrewrite.ops import POINTWISE

# How many operators between the softmax and the product of queries and keys are looked through.
LIMIT = 12


def or_global(facts: Facts, softmax: Node, decline: Decline) -> Decline:
    """`decline`, or the decline of a global attention with it as the second half of the reason.

    Global is said only where the keys are followed to a map that has the model's own batch (rows of any other number
    may be windows) and the probabilities weigh one sum at most (where they weigh several, it is another computation).
    """
    if decline.kind != "other" or decline.reason == NOT_OVER_KEYS or _sums(facts, softmax) > 1:
        return decline
    if _is_fixed(softmax.required(0)):
        return Decline(f"the logits are the same for every input; {decline.reason}", decline.node)
    try:
        found = _global(facts, softmax)
    except IndexingError:
        return decline
    return decline if found is None else Decline(f"{found.reason}; {decline.reason}", decline.node, found.kind)


def _sums(facts: Facts, softmax: Node) -> int:
    """How many contractions read the probabilities directly."""
    return sum(is_contraction(user) for user in facts.users(softmax.output))


def _is_fixed(value: Value) -> bool:
    """Whether a value depends on no input of the model, the extents of one at most."""
    seen, stack = {value}, [value]
    while stack:
        value = stack.pop()
        node = value.producer
        if node is None:
            if not value.is_constant:
                return False
            continue
        if node.captures:
            return False
        read = [] if node.op == "Shape" else node.inputs[:1] if node.op == "Expand" else node.inputs
        fresh = [v for v in read if v is not None and v not in seen]
        seen.update(fresh)
        stack += fresh
    return True


def _global(facts: Facts, softmax: Node) -> Decline | None:
    shape = softmax.output.shape
    if shape is None or not isinstance(shape[softmax.attributes.get("axis", -1)], int):
        return None
    key_axis = softmax.attributes.get("axis", -1) % len(shape)
    channel_axis = len(shape)  # of the grid [*softmax axes, channels]
    key = _key(facts, softmax.required(0), identity(shape, channel_axis + 1), key_axis, channel_axis)
    if key is None:
        return None
    way = list(candidates(key.value, key.index, channel_axis, facts.positions))
    features = feature_axes(way, frozenset({channel_axis})) - {key_axis}
    keys = sources_of(way, features)
    rows = reads_alike(key_axis, keys)
    if rows is None or not keys or not _has_the_batch_of_the_model(facts, keys[-1]):
        return None
    queries = [count(e) for a, e in enumerate(shape) if a not in features and a not in rows and a != key_axis]
    if len([e for e in queries if e > 1]) > 1:
        return None
    return global_attention(max(queries, default=1), count(shape[key_axis]), softmax.label)


def _key(facts: Facts, value: Value, index: Index, key_axis: int, channel_axis: int) -> Operand | None:
    """The computed operand of the nearest product behind `value[index]` that depends on the key and on no query."""
    for _ in range(LIMIT):
        for last in provenances(value, index, facts.positions):
            value, index = last.value, last.index
        node = value.producer
        if node is None or node.domain != STANDARD_DOMAIN:
            return None
        if is_contraction(node):
            pair = operands(node, index, channel_axis)
            own = [o for o in pair if any(key_axis in c.depends_on() for c in o.index)]
            return own[0] if len(own) == 1 and not own[0].value.is_constant else None
        if node.op not in POINTWISE:
            return None
        computed = [v for v in node.inputs if v is not None and not v.is_constant and v.shape is not None]
        computed = [v for v in computed if v.shape == value.shape] or computed
        if not computed:
            return None
        value, index = computed[0], broadcast_index(index, computed[0])
    return None


def _has_the_batch_of_the_model(facts: Facts, source: Source) -> bool:
    batches = {v.shape[0] for v in facts.graph.inputs if v.shape}
    return source.has_batch and batches == {source.value.known_shape[0]}
