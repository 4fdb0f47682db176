"""One predicted aggregation becomes one SlideAttention: weights and values on their feature maps, one node, its result
where the model's returns.
"""

from __future__ import annotations

import numpy as np
import onnx

from attnrewrite.dims import Extent
from attnrewrite.facts import Facts
from attnrewrite.functions.spec import DOMAIN, SlideAttention
from attnrewrite.graph import Value
from attnrewrite.localattention.aggregation import Aggregation
from attnrewrite.localattention.aggregation_proof import prove_aggregation
from attnrewrite.localattention.contraction import Operand
from attnrewrite.localattention.feature_map import FeatureMap
from attnrewrite.localattention.geometry import Sizes
from attnrewrite.localattention.grid import count, pixels_read, spread
from attnrewrite.localattention.hoist import NOT_ON_MAP, Anchor, Hoister, NotHoistable
from attnrewrite.localattention.proof import NotProved
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.sources import Source
from attnrewrite.pipeline import Declined


class AggregationRewriter:
    """Emits one site. Nothing of the graph is edited before `finish`."""

    def __init__(self, facts: Facts, match: Aggregation, pass_name: str) -> None:
        self.facts, self.match = facts, match
        self.hoister = Hoister(match.facts, match.geometry.key_size, pass_name)

    def weights(self) -> Value:
        """[B, nH*K*R, *feature_size]: overlap_add as (head, row, slot), upsampling as (head, slot, row)."""
        match = self.match
        key = [(match.sum.key_axis, match.sum.num_keys)]
        rows = self._axes(match.rows)
        inner = [*rows, *key] if match.use_of_rows == "overlap" else [*key, *rows]
        return self._operand(
            match.weights,
            match.weights_source,
            match.geometry.feature_size,
            match.weight_features,
            [*self._axes(match.heads), *inner],
            _in_slot_order(match),
        )

    def values(self) -> Value:
        """[B, nH*dv, *key_size]."""
        match = self.match
        axes = [*self._axes(match.heads), *self._axes(match.channels)]
        size = match.geometry.key_size
        return self._operand(match.sum.value, match.value_source, size, match.value_features, axes, None)

    def _axes(self, axes: tuple[int, ...]) -> list[tuple[int, int]]:
        return [(a, count(self.match.sum.output_shape[a])) for a in axes]

    def _operand(
        self,
        operand: Operand,
        source: Source,
        size: Sizes,
        features: frozenset[int],
        axes: list[tuple[int, int]],
        order: np.ndarray | None,
    ) -> Value:
        """An operand [B, F, *size], its features along these grid axes; what lies outside the map must be zero."""
        hoister = self.hoister
        batch: Extent = source.value.known_shape[0] if source.has_batch else 1
        map_ = hoister.source_map(source.value, source.roles, batch, size)
        roles, shape = source.roles, source.value.known_shape
        pixels = pixels_read(source.candidate, roles.tokens)
        anchor = Anchor(source.value, shape, source.candidate.index, roles, roles.features, map_, pixels)
        try:
            found, picked = hoister.hoist(operand.value, operand.index, self.match.sum.channel_axis, features, anchor)
            chosen = spread(picked, axes).reshape(-1)
            laid = hoister.features(found, chosen if order is None else chosen[order], f"{operand.value.name}_features")
            if source.candidate.fills:
                padding = hoister.padding_vector(hoister.laid_out(laid, channels_first=False))
                if padding is None or padding.any():
                    raise NotHoistable("values outside the map are not zero")
            return hoister.laid_out(laid, channels_first=True)
        except NOT_ON_MAP as error:
            raise Declined(Decline(str(error), operand.value.name, "outlook")) from error

    def finish(self, weights: Value, values: Value) -> None:
        """Emit the op, prove it against the site, bring its output to where the model's returns, and use that."""
        match, result, hoister = self.match, self.match.result, self.hoister
        spec = spec_of_match(match, weights, values)
        operands: list[Value | None] = [None] * len(spec.operands)
        operands[spec.operands.index("value")], operands[spec.operands.index("logits")] = values, weights
        shape = (*values.known_shape[:2], *spec.output_size)
        stem = f"{match.sum.output.name}_local"
        output = hoister.emit(spec.op_type, operands, shape, stem, DOMAIN, **spec.attributes())
        node = output.producer
        assert node is not None
        map_ = hoister.features(FeatureMap(output, channels_first=True), result.picked, result.value.name)
        returned = hoister.returned(map_, result.value, result.roles)
        try:
            prove_aggregation(match, node, self.facts.graph.opset)
        except NotProved as error:
            reason = f"the replacement could not be proved equal: {error}"
            raise Declined(Decline(reason, match.anchor.label, "outlook")) from error
        hoister.replace(result.value, returned)


def spec_of_match(match: Aggregation, weights: Value, values: Value) -> SlideAttention:
    """The op's attributes for a site with these operands."""
    softmax_dtype = 0
    if weights.dtype != values.dtype and weights.dtype is not None:
        softmax_dtype = int(onnx.helper.np_dtype_to_tensor_dtype(weights.dtype))
    return SlideAttention(
        match.geometry,
        match.num_heads,
        1.0,
        softmax_dtype,
        "weights" if match.softmax is None else "logits",
        match.use_of_rows == "overlap",
        match.upsampling,
    )


def _in_slot_order(match: Aggregation) -> np.ndarray | None:
    """The features of the weights, taken in the order of the geometry's slots; None where they are in it."""
    slots = match.slots
    if np.array_equal(slots, np.arange(len(slots))):
        return None
    heads, rows = match.num_heads, match.extent(match.rows)
    if match.use_of_rows == "overlap":
        numbers = np.arange(heads * rows * len(slots)).reshape(heads, rows, len(slots))
        return numbers[:, slots][:, :, slots].reshape(-1)
    return np.arange(heads * len(slots) * rows).reshape(heads, len(slots), rows)[:, slots].reshape(-1)
