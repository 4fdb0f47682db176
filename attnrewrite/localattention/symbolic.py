"""Images of any size: where the extents of the map are symbols, no site of it has a geometry that could be compared."""

from __future__ import annotations

from dataclasses import replace

from attnrewrite.dims import Dim
from attnrewrite.facts import Facts
from attnrewrite.graph import Node, Value, ancestors
from attnrewrite.localattention.site import Decline


def or_symbolic(facts: Facts, softmax: Node, decline: Decline) -> Decline:
    """`decline`, or in its place that the extents of a model's input are symbols, where those of the logits depend on
    them. A symbolic batch alone is no reason.
    """
    inputs = facts.graph.inputs
    batches = {symbol for v in inputs for symbol in _symbols(v, range(1))}
    shape = softmax.output.shape
    if shape is not None and _symbols(softmax.output, range(len(shape))) <= batches:
        return decline
    read = ancestors([softmax.output])
    for value in inputs:
        rank = value.rank or 0
        symbols = _symbols(value, range(1, rank))
        if value in read and rank > 2 and symbols:
            names = " and ".join(s for s in dict.fromkeys(map(str, value.known_shape)) if s in symbols)
            extents = "x".join(["1", *map(str, value.known_shape[1:])])
            reason = (
                f"the size of the map is not known: {names or 'extents'} of the input {value.name} are symbolic; "
                f"--input-shape {value.name}={extents}, with numbers for them, specialises the model"
            )
            return replace(decline, reason=reason, node=value.name, kind="other", foreign=False, known={})
    return decline


def _symbols(value: Value, axes: range) -> set[str]:
    shape = value.shape or ()
    return {symbol for a in axes if a < len(shape) and isinstance(e := shape[a], Dim) for symbol, _ in e.terms}
