"""What both local attention passes do once a site is proved: operands onto the feature map, one node, result back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from attnrewrite.dims import Extent
from attnrewrite.facts import Facts
from attnrewrite.frontend.evaluate import evaluate
from attnrewrite.functions.spec import DOMAIN, Spec
from attnrewrite.graph import Node, Value
from attnrewrite.indexing.map import IndexingError, identity
from attnrewrite.localattention.attention import Attention
from attnrewrite.localattention.contraction import Operand
from attnrewrite.localattention.feature_map import FeatureMap
from attnrewrite.localattention.grid import count, grouped, pixels_read, row_major, spread
from attnrewrite.localattention.hoist import NOT_ON_MAP, Anchor, Hoister, NotHoistable
from attnrewrite.localattention.maps import ExtraSource, SiteMaps
from attnrewrite.localattention.proof import NotProved, prove
from attnrewrite.localattention.returns import Return
from attnrewrite.localattention.site import Decline, Site
from attnrewrite.localattention.sources import Source
from attnrewrite.localattention.terms import PlacedTerm
from attnrewrite.localattention.tokens import Roles
from attnrewrite.pipeline import Declined


@dataclass(frozen=True, eq=False)
class Emitted:
    """An operand on the feature map, and what its padded tokens hold (None where nothing is padded, or with zeros)."""

    map: FeatureMap
    padding: np.ndarray | None


class SiteRewriter:
    """Emits one site. Nothing of the graph is edited before `finish`."""

    def __init__(self, facts: Facts, maps: SiteMaps, spatial: tuple[int, ...], pass_name: str) -> None:
        self.facts, self.maps, self.spatial = facts, maps, spatial
        self.hoister = Hoister(facts, spatial, pass_name)
        self.batch = _batch(maps.query)

    def operand(
        self,
        role: str,
        operand: Operand,
        source: Source,
        channel_axis: int,
        channels: int,
        spatial: tuple[int, ...] | None = None,
    ) -> Emitted:
        """`role` (query, key or value) on the feature map, features ordered by head, then channel.

        spatial: the map's extents where they are not those of the site.
        """
        hoister, stem = self.hoister, f"{self.maps.attention.output.name}_{role}"
        parts = [(self.maps, operand, source)]
        if self.maps.groups:
            parts = [(g, getattr(g.attention, role), g.chosen(role)) for g in self.maps.groups]
        try:
            located = [self._located(*part, channel_axis, channels, spatial or self.spatial) for part in parts]
            result = self._side_by_side(located, stem)
            padding = None
            if any(part[2].candidate.fills for part in parts) and role != "query":
                padding = hoister.padding_vector(hoister.laid_out(result, channels_first=False))
                if padding is None:
                    raise NotHoistable(f"what the padding of {operand.value.name} becomes is not known")
        except NOT_ON_MAP as error:
            raise Declined(Decline(str(error), operand.value.name)) from error
        return Emitted(result, padding if padding is not None and padding.any() else None)

    def _located(
        self,
        maps: SiteMaps,
        operand: Operand,
        source: Source,
        channel_axis: int,
        channels: int,
        spatial: tuple[int, ...],
    ) -> tuple[FeatureMap, np.ndarray]:
        """A feature map, and which of its features the operand is (int64 [nH * channels])."""
        candidate, roles, attention = source.candidate, source.roles, maps.attention
        map_ = self.hoister.source_map(source.value, roles, self.batch, spatial)
        pixels = pixels_read(candidate, roles.tokens)
        anchor = Anchor(source.value, source.value.known_shape, candidate.index, roles, roles.features, map_, pixels)
        found, picked = self.hoister.hoist(operand.value, operand.index, attention.channel_axis, maps.features, anchor)
        axes = [(a, count(attention.output_shape[a])) for a in maps.heads] + [(channel_axis, channels)]
        return found, spread(picked, axes).reshape(-1)

    def _side_by_side(self, parts: Sequence[tuple[FeatureMap, np.ndarray]], stem: str) -> FeatureMap:
        """Features of several maps as those of one."""
        hoister, first = self.hoister, parts[0][0]
        if all(map_ is first for map_, _ in parts):
            return hoister.features(first, np.concatenate([picked for _, picked in parts]), stem)
        tensors = [hoister.laid_out(hoister.features(m, p, stem), channels_first=False) for m, p in parts]
        outside = tensors[0].known_shape[:-1]
        total = sum(len(picked) for _, picked in parts)
        return FeatureMap(hoister.emit("Concat", tensors, (*outside, total), stem, axis=len(outside)))

    def extra_operand(
        self,
        role: str,
        operand: Operand,
        source: ExtraSource,
        channel_axis: int,
        channels: int,
        per_head: np.ndarray | None = None,
    ) -> Value:
        """Queries, keys or values that are not on the map, [B or 1, nW or 1, T, nH * channels]; per_head: float64 [nH],
        what each head's are multiplied with.
        """
        maps, candidate, split = self.maps, source.candidate, source.roles
        hoister = Hoister(self.facts, (source.tokens,), self.hoister.made_by, one_token=True)
        map_ = hoister.source_map(candidate.value, split, source.batch, (source.tokens,))
        shape, pixels = candidate.value.known_shape, pixels_read(candidate, split.tokens)
        anchor = Anchor(candidate.value, shape, candidate.index, split, split.features, map_, pixels)
        attention = self.maps.attention
        stem = f"{attention.output.name}_{role}"
        try:
            found, picked = hoister.hoist(operand.value, operand.index, attention.channel_axis, maps.features, anchor)
            axes = [(a, count(attention.output_shape[a])) for a in maps.heads] + [(channel_axis, channels)]
            result = hoister.features(found, spread(picked, axes).reshape(-1), stem)
        except NOT_ON_MAP as error:
            raise Declined(Decline(str(error), operand.value.name)) from error
        tokens, features = hoister.laid_out(result, channels_first=False), maps.num_heads * channels
        windows, extra = source.table.shape
        if not np.array_equal(source.table.reshape(-1), np.arange(source.tokens)):
            index = hoister.constant(source.table.reshape(-1), f"{stem}_index")
            tokens = hoister.emit("Gather", [tokens, index], (source.batch, windows * extra, features), stem, axis=1)
        tokens = hoister.reshape(tokens, (source.batch, windows, extra, features))
        if per_head is not None:
            vector = hoister.constant(np.repeat(per_head, channels).astype(tokens.dtype), f"{stem}_scale")
            tokens = hoister.emit("Mul", [tokens, vector], tokens.known_shape, f"{stem}_scaled")
        self.hoister.nodes.extend(n for n in hoister.nodes if not self._is_known(n))
        return tokens

    def _is_known(self, node: Node) -> bool:
        """Whether a new node has constant operands alone (learned tokens); its output becomes a constant."""
        if not all(v is None or v.is_constant for v in node.inputs):
            return False
        arrays = [None if v is None else v.constant for v in node.inputs]
        node.output.set_constant(evaluate(node, arrays, self.facts.graph.opset)[0])
        return True

    def scaled_query(self, query: FeatureMap, head_dim: int) -> tuple[FeatureMap, float, np.ndarray | None]:
        """The query and the scalar scale; a scale that differs from head to head, float64 [nH], is multiplied into the
        query and returned as well.
        """
        attention, maps = self.maps.attention, self.maps
        scale = attention.scale
        if scale.size == 1:
            return query, float(scale.reshape(-1)[0]), None
        full = scale.reshape(scale.shape + (1,) * (attention.grid_rank - scale.ndim))
        try:
            per_head = grouped(full, [list(maps.heads)], attention).reshape(-1)
        except IndexingError as error:
            raise Declined(
                Decline("the logits are scaled differently from token to token", attention.softmax.label)
            ) from error
        tensor = self.hoister.laid_out(query, channels_first=False)
        assert tensor.dtype is not None
        vector = self.hoister.constant(np.repeat(per_head, head_dim).astype(tensor.dtype), f"{tensor.name}_scale")
        scaled = self.hoister.emit("Mul", [tensor, vector], tensor.known_shape, f"{tensor.name}_scaled")
        return FeatureMap(scaled), 1.0, per_head

    def constant_operand(self, array: np.ndarray | None, stem: str, dtype: np.dtype) -> Value | None:
        """A constant operand; -inf stays -inf in every dtype. None stays None."""
        if array is None:
            return None
        with np.errstate(over="ignore"):
            return self.hoister.constant(np.ascontiguousarray(array).astype(dtype), stem)

    def logit_bias(self, terms: Sequence[PlacedTerm], dtype: np.dtype) -> Value | None:
        """The sum of the computed terms, [B or 1, nW or 1, nH or 1, N or 1, M or 1] in this dtype; None for none."""
        total: Value | None = None
        for term in terms:
            tensor = self._placed(term, dtype)
            if total is None:
                total = tensor
            else:
                shape = tuple(b if a == 1 else a for a, b in zip(total.known_shape, tensor.known_shape, strict=True))
                total = self.hoister.emit("Add", [total, tensor], shape, f"{tensor.name}_sum")
        return total

    def _placed(self, placed: PlacedTerm, dtype: np.dtype) -> Value:
        hoister, term = self.hoister, placed.term
        value, stem = term.value, f"{term.value.name}_logits"
        shape = value.known_shape
        if term.excludes is not None:
            numbers = [hoister.constant(np.array(n, dtype), stem) for n in (term.excludes, 0.0)]
            chosen = numbers[::-1] if term.negated else numbers
            value = hoister.emit("Where", [value, *chosen], shape, stem)
            value.dtype = dtype
        elif value.dtype != dtype:
            value = hoister.emit("Cast", [value], shape, stem, to=int(onnx.helper.np_dtype_to_tensor_dtype(dtype)))
            value.dtype = dtype
        value = hoister.transpose(hoister.reshape(value, placed.split), placed.permutation)
        value = hoister.reshape(value, placed.shape)
        for axis, positions in placed.picks:
            value = hoister.emit(
                "Gather", [value, hoister.constant(positions, stem)], value.known_shape, stem, axis=axis
            )
        if term.excludes is None and not (placed.factor == 1).all():
            factor = hoister.constant(placed.factor.astype(dtype), stem)
            shape = tuple(b if a == 1 else a for a, b in zip(placed.shape, factor.known_shape, strict=True))
            value = hoister.emit("Mul", [value, factor], shape, stem)
        return value

    def finish(self, spec: Spec, operands: list[Value | None], proved: SiteMaps, *, channels_first: bool) -> None:
        """Emit the op, prove it against the site's maps, bring its output to where the model's returns, and use
        that.
        """
        hoister, maps, attention = self.hoister, self.maps, self.maps.attention
        while operands and operands[-1] is None:
            operands.pop()
        value = operands[2]
        assert value is not None
        channels = value.known_shape[1 if channels_first else -1]
        shape = (self.batch, channels, *self.spatial) if channels_first else (self.batch, *self.spatial, channels)
        attributes: dict[str, Any] = spec.attributes()
        output = hoister.emit(spec.op_type, operands, shape, f"{attention.output.name}_local", DOMAIN, **attributes)
        assert output.producer is not None
        returned = self._return(hoister, FeatureMap(output, channels_first), maps.back, attention)
        beside = self._return_extra(output.producer, channels)
        try:
            prove(proved, output.producer, self.facts.graph.opset)
        except NotProved as error:
            reason = f"the replacement could not be proved equal: {error}"
            raise Declined(Decline(reason, attention.softmax.label)) from error
        for old, new in beside:
            self.facts.graph.replace_uses(old, new)
        hoister.replace(maps.back.value, returned)

    def _return_extra(self, node: Node, channels: Extent) -> list[tuple[Value, Value]]:
        """The op's second output, [B, nW, T, C], and the value that takes the place of what its tokens attended."""
        extra = self.maps.extra
        if extra is None or extra.asking is None:
            return []
        asking, hoister = extra.asking, self.hoister
        elements = count(self.batch)
        rows = len(asking.place) // elements
        shape = (self.batch, rows // asking.count, asking.count, channels)
        output = Value(self.facts.graph.fresh_name(f"{node.output.name}_extra"), shape, node.output.dtype)
        output.producer = node
        node.outputs.append(output)
        beside = Hoister(self.facts, (rows,), hoister.made_by)
        tokens = beside.reshape(output, (self.batch, rows, channels))
        if not np.array_equal(asking.place[:rows], np.arange(rows)):
            index = beside.constant(asking.place[:rows], f"{output.name}_index")
            tokens = beside.emit("Gather", [tokens, index], tokens.known_shape, output.name, axis=1)
        returned = self._return(beside, FeatureMap(tokens), asking.back, asking.attention)
        hoister.nodes.extend(beside.nodes)
        return [(asking.back.value, returned)]

    def _return(self, hoister: Hoister, map_: FeatureMap, back: Return, attention: Attention) -> Value:
        """What the op computes, in the place of the value that the model's attention returns to."""
        maps = self.maps
        channel_axis = len(back.value.known_shape)
        order = (*maps.heads, attention.value_axis)
        tokens = tuple(a for a in range(len(attention.output_shape)) if a not in maps.features)
        own = identity(back.value.known_shape, channel_axis + 1)
        pixels = row_major(own, back.roles.tokens, back.value.known_shape)
        index = attention.in_full(back.index)
        anchor = Anchor(attention.output, attention.full_shape, index, Roles(tokens, order), order, map_, pixels)
        features = frozenset(back.roles.features) | {channel_axis}
        try:
            found, picked = hoister.hoist(back.value, own, channel_axis, features, anchor)
            axes = [(a, count(back.value.known_shape[a])) for a in back.roles.features]
            found = hoister.features(found, spread(picked, axes).reshape(-1), back.value.name)
        except NOT_ON_MAP as error:
            raise Declined(Decline(str(error), back.value.name)) from error
        returned = hoister.returned(found, back.value, back.roles)
        if returned is maps.query.value or returned.producer is None:
            raise Declined(Decline("the result is the input itself", back.value.name))
        return returned


def softmax_type(attention: Attention) -> int:
    """ONNX data type of the softmax where it differs from the operands', else 0."""
    if attention.softmax_dtype == attention.query.value.dtype:
        return 0
    return int(onnx.helper.np_dtype_to_tensor_dtype(attention.softmax_dtype))


def declined_site(softmax: Node, decline: Decline) -> Site:
    """The report's row of a site that is left."""
    foreign = decline.foreign
    return Site(
        "", softmax.label, decline.kind, "leave", decline.reason, decline.node, foreign=foreign, **decline.known
    )


def _batch(source: Source) -> Extent:
    return source.batch
