"""The proof of a predicted aggregation, apart from its match: the body of the emitted node, read as any graph is, must
multiply and add what the original does.

Per output pixel that is a set of triples: (row and key of a weight, pixel of its map, pixel of the value), compared as
integers; channels and heads are compared once, since they do not depend on the pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnrewrite.dims import static
from attnrewrite.facts import Facts
from attnrewrite.functions import body_of, operands_of
from attnrewrite.functions import spec_of as read_spec
from attnrewrite.functions.spec import SlideAttention
from attnrewrite.graph import Graph, Node, Value
from attnrewrite.indexing.map import Index, IndexingError, identity
from attnrewrite.indexing.provenance import Provenance, provenances
from attnrewrite.indexing.rules import broadcast_index
from attnrewrite.indexing.sums import summands
from attnrewrite.localattention.aggregation import Aggregation
from attnrewrite.localattention.geometry import PADDING
from attnrewrite.localattention.grid import count, flat_pixels
from attnrewrite.localattention.proof import NotProved


def prove_aggregation(match: Aggregation, node: Node, opset: int) -> None:
    """Raise NotProved unless the node's body multiplies and adds what the original does."""
    spec = read_spec(node)
    assert isinstance(spec, SlideAttention)
    if spec.predicted != ("weights" if match.softmax is None else "logits"):
        raise NotProved("only one of the two takes a softmax")
    if spec.scale != 1.0 or "bias" in operands_of(node):
        raise NotProved("the replacement scales its logits or adds to them, the original's are as predicted")
    try:
        found = _Body(spec, body_of(node, opset), list(operands_of(node)), match.slots).triples()
    except IndexingError as error:
        raise NotProved(f"the emitted body cannot be read: {error}") from error
    wanted = _original(match)
    if found.shape != wanted.shape:
        raise NotProved(f"{wanted.shape[1]} products are added per pixel in the original, {found.shape[1]} now")
    differs = (found != wanted).any(axis=(1, 2))
    if differs.any():
        raise NotProved(f"output pixel {int(np.argmax(differs))} adds other products than the original")


def _in_order(triples: np.ndarray) -> np.ndarray:
    """int64 [P, S, 3]: the products of every pixel sorted, those with a value outside the map (zero) made alike; as few
    columns as the fullest pixel needs.
    """
    nothing = (triples == PADDING).any(axis=-1)
    triples = np.where(nothing[..., None], PADDING, triples)
    order = np.lexsort((triples[..., 2], triples[..., 1], triples[..., 0]), axis=-1)
    ordered = np.take_along_axis(triples, order[..., None], axis=1)
    most = int((~nothing).sum(axis=1).max(initial=0))
    return ordered[:, ordered.shape[1] - most :]


def _original(match: Aggregation) -> np.ndarray:
    """The products of the original, per place of the returned map."""
    summed, rows = match.sum, match.extent(match.rows)
    shape, tokens, keys = summed.output_shape, list(match.tokens), summed.num_keys
    weights, values = match.weights_source, match.value_source
    weight_pixel = flat_pixels(weights.candidate, weights.roles.tokens, shape, tokens).reshape(-1)
    value_pixel = flat_pixels(values.candidate, values.roles.tokens, shape, tokens, [(summed.key_axis, keys)]).reshape(
        -1, keys
    )
    added = match.result.added
    token, row = np.maximum(added, 0) // rows, np.maximum(added, 0) % rows
    number = row[..., None] * keys + np.arange(keys)
    pixel = np.broadcast_to(weight_pixel[token][..., None], number.shape)
    triples = np.stack([number, pixel, value_pixel[token]], axis=-1)
    triples = np.where((added == PADDING)[..., None, None], PADDING, triples)
    return _in_order(triples.reshape(len(added), -1, 3))


@dataclass(frozen=True, eq=False)
class _Body:
    """The emitted body, and how its slots are numbered by the site's keys."""

    spec: SlideAttention
    graph: Graph
    names: list[str]
    slots: np.ndarray

    @property
    def facts(self) -> Facts:
        return Facts(self.graph)

    def triples(self) -> np.ndarray:
        facts, output = self.facts, self.graph.outputs[0]
        formal = dict(zip(self.names, self.graph.inputs, strict=True))
        logits, value = formal["logits"], formal["value"]
        weights = logits
        if self.spec.predicted == "logits":
            weights = self._softmax(facts, logits)
        found = []
        for read in summands(output, identity(output.known_shape), _is_product, facts.positions):
            product = read.value.producer
            assert product is not None
            factors = [(v, broadcast_index(read.index, v)) for v in (product.required(0), product.required(1))]
            weight = self._reach(facts, *factors[0], weights)
            at = self._reach(facts, *factors[1], value)
            number, weight_pixel = self._weight(facts, weight, weights, logits)
            value_pixel = self._value(at, value)
            where = read.where
            if at.domain is not None:
                where = at.domain if where is None else where & at.domain
            if where is not None:
                value_pixel = np.where(where, value_pixel, PADDING)
            columns = [_per_pixel(c, output) for c in (number, weight_pixel, value_pixel)]
            found.append(np.stack(columns, axis=-1))
        return _in_order(np.stack(found, axis=1))

    def _softmax(self, facts: Facts, logits: Value) -> Value:
        """The body's softmax; it must run over the slots of one row."""
        node = next((n for n in self.graph.nodes if n.op == "Softmax"), None)
        if node is None:
            raise NotProved("the emitted body takes no softmax")
        shape = node.output.known_shape
        axis = node.attributes["axis"] % len(shape)
        if static(shape[axis]) != len(self.slots):
            raise NotProved("the softmax of the emitted body does not run over the slots")
        index = self._through(facts, node.required(0), identity(shape), logits)
        number = index[1].values
        head, row, slot = self._decode(number)
        alike = (head == head.take([0], axis)).all() and (row == row.take([0], axis)).all()
        if (
            not alike
            or not (np.diff(slot, axis=axis) == 1).all()
            or any(axis in c.depends_on() for a, c in enumerate(index) if a != 1)
        ):
            raise NotProved("the softmax of the emitted body does not run over the slots")
        return node.output

    def _through(self, facts: Facts, value: Value, index: Index, target: Value) -> Index:
        """The index at which `target` is read, casts, the scale and the bias aside."""
        while True:
            last = self._last(facts, value, index, target)
            if last.domain is not None:
                raise NotProved("the weights of the emitted body are padded")
            if last.value is target:
                return last.index
            node = last.value.producer
            if node is None or node.op not in ("Cast", "Mul", "Add"):
                raise NotProved("the weights of the emitted body do not come from its operand")
            value, index = node.required(0), last.index

    def _last(self, facts: Facts, value: Value, index: Index, target: Value) -> Provenance:
        last = None
        for last in provenances(value, index, facts.positions):
            if last.value is target:
                break
        assert last is not None
        return last

    def _reach(self, facts: Facts, value: Value, index: Index, target: Value) -> Provenance:
        last = self._last(facts, value, index, target)
        while last.value is not target:
            node = last.value.producer
            if node is None or node.op != "Cast" or last.domain is not None:
                raise NotProved(f"a product of the emitted body does not read {target.name}")
            last = self._last(facts, node.required(0), last.index, target)
        return last

    def _decode(self, number: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Head, row and slot of a feature of the logits operand."""
        slots, rows = len(self.slots), self.spec.rows_per_pixel
        head, rest = number // (slots * rows), number % (slots * rows)
        return (head, rest // slots, rest % slots) if self.spec.overlap_add else (head, rest % rows, rest // rows)

    def _weight(self, facts: Facts, read: Provenance, weights: Value, logits: Value) -> tuple[np.ndarray, np.ndarray]:
        """(row, key) as one number, and the flat pixel, over the output's grid; the head must be the channel's."""
        index = read.index
        if weights is not logits:
            softmax = weights.producer
            assert softmax is not None
            index = self._through(facts, softmax.required(0), index, logits)
        if read.domain is not None:
            raise NotProved("the weights of the emitted body are padded")
        head, row, slot = self._decode(index[1].static("the weights of the emitted body"))
        channels = np.arange(static(self.graph.outputs[0].known_shape[1]))
        expected = (channels // (len(channels) // self.spec.num_heads)).reshape(
            [-1 if a == 1 else 1 for a in range(head.ndim)]
        )
        if not (np.broadcast_to(head, np.broadcast_shapes(head.shape, expected.shape)) == expected).all():
            raise NotProved("a channel of the emitted body uses the weights of another head")
        key = self.slots[slot]
        row = self.slots[row] if self.spec.overlap_add else row
        return row * len(self.slots) + key, _flat_pixel(index, logits)

    def _value(self, read: Provenance, value: Value) -> np.ndarray:
        channels = np.arange(static(value.known_shape[1])).reshape(
            [-1 if a == 1 else 1 for a in range(read.index[1].values.ndim)]
        )
        own = read.index[1].values
        if not (np.broadcast_to(own, np.broadcast_shapes(own.shape, channels.shape)) == channels).all():
            raise NotProved("a channel of the emitted body reads another channel of the values")
        return _flat_pixel(read.index, value)


def _is_product(value: Value) -> bool:
    return value.producer is not None and value.producer.op == "Mul"


def _flat_pixel(index: Index, value: Value) -> np.ndarray:
    """Flat pixel, batch included, of a channels-first map."""
    shape = value.known_shape
    flat = index[0].values
    for coordinate, extent in zip(index[2:], shape[2:], strict=True):
        flat = flat * static(extent) + coordinate.values
    return np.asarray(flat)


def _per_pixel(array: np.ndarray, output: Value) -> np.ndarray:
    """[batch, *S] of an array over the output's grid, flattened; it must not depend on the channel."""
    shape = [count(e) for e in output.known_shape]
    if array.shape[1] != 1:
        if (array != array[:, :1]).any():
            raise NotProved("a product of the emitted body depends on the channel")
        array = array[:, :1]
    shape[1] = 1
    return np.broadcast_to(array, shape).reshape(-1)
