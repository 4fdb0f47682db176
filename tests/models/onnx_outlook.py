"""Sums over neighbourhoods with predicted weights in many spellings, and graphs that look like one.

Letters: B batch, H/W height/width, C channels, nH heads, d channels per head, K neighbours, P = H * W.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from attnrewrite.localattention.geometry import NeighborhoodGeometry
from tests.models.onnx_builder import Builder
from tests.models.onnx_neighborhoods import (
    Gathering,
    by_flat_gather,
    by_rows_then_columns,
    by_shifting_the_map,
    by_slices,
    by_slices_of_both_axes,
    by_tensor_unfold,
    by_unfold,
    taps,
)
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS

SIZE = (7, 11)
K3 = NeighborhoodGeometry(SIZE, (3, 3), (1, 1))
K5_DILATED = NeighborhoodGeometry(SIZE, (5, 5), (2, 2))
STRIDED = NeighborhoodGeometry((4, 5), (3, 3), (1, 1), stride=(2, 2), key_size=(8, 10))

APART = NeighborhoodGeometry((3, 4), (3, 3), (1, 1), stride=(3, 3), key_size=(7, 10), offset=(-1, -1))

# From weights [B, nH, K, P] and values [B, nH, d, K, P] to [B, nH, d, P].
Sum = Callable[[Builder, str, str, int], str]


def by_product(g: Builder, weights: str, values: str, keys: int) -> str:
    return g.reduce_sum(g.op("Mul", g.unsqueeze(weights, 2), values), 3)


def by_einsum(g: Builder, weights: str, values: str, keys: int) -> str:
    return g.op("Einsum", values, weights, equation="bhdkp,bhkp->bhdp")


def by_matmul(g: Builder, weights: str, values: str, keys: int) -> str:
    rows = g.unsqueeze(g.transpose(weights, 0, 1, 3, 2), 3)  # [B, nH, P, 1, K]
    return g.transpose(g.squeeze(g.op("MatMul", rows, g.transpose(values, 0, 1, 4, 3, 2)), 3), 0, 1, 3, 2)


def one_by_one(g: Builder, weights: str, values: str, keys: int) -> str:
    """w_0 * v_0 + w_1 * v_1 + ..., every factor cut out."""
    total = ""
    for k in range(keys):
        weight, value = g.unsqueeze(g.slice(weights, k, k + 1, 2), 2), g.slice(values, k, k + 1, 3)
        part = g.op("Mul", value, weight) if k % 2 else g.op("Mul", weight, value)
        total = g.op("Add", total, part) if total else part
    return g.squeeze(total, 3)


@dataclass(frozen=True)
class Aggregation:
    """One way to write a sum of neighbours; softmax: over the predicted logits, or None for plain weights."""

    geometry: NeighborhoodGeometry = K3
    gathering: Gathering = by_slices
    sum: Sum = by_product
    softmax: bool = True
    tokens: bool = False  # the weights come from a Linear on tokens, keys before heads
    scale: float | None = None
    bias: bool = False
    weights_of: Callable[[Builder, str], str] | None = None  # of which map the weights are predicted, by movement
    batch: int | str = "batch"

    def model(self) -> onnx.ModelProto:
        rng, g = np.random.default_rng(0), Builder()
        x = g.input("x", [self.batch, CHANNELS, *self.geometry.key_size])
        values = g.op("Conv", x, g.constant(rng.normal(size=(CHANNELS, CHANNELS, 1, 1))))
        weights = self._weights(g, x, rng)
        if self.weights_of is not None:
            weights = self.weights_of(g, weights)
        y = self.sum(g, weights, self._values(g, values), self.geometry.keys_per_query)
        y = g.reshape(y, -1, CHANNELS, *self.geometry.feature_size)
        return g.model({"y": g.op("Conv", y, g.constant(rng.normal(size=(CHANNELS, CHANNELS, 1, 1))))})

    def _weights(self, g: Builder, x: str, rng: np.random.Generator) -> str:
        keys, pixels = self.geometry.keys_per_query, int(np.prod(self.geometry.feature_size))
        count = HEADS * keys
        if self.tokens:
            rows = g.transpose(g.reshape(x, -1, CHANNELS, pixels), 0, 2, 1)
            rows = g.linear(rows, rng.normal(size=(CHANNELS, count)), rng.normal(size=count))
            weights = g.transpose(g.reshape(rows, -1, pixels, keys, HEADS), 0, 3, 2, 1)
        else:
            map_ = g.op("Conv", x, g.constant(rng.normal(size=(count, CHANNELS, 1, 1))))
            weights = g.reshape(map_, -1, HEADS, keys, pixels)
        if self.scale is not None:
            weights = g.mul(weights, self.scale)
        if self.bias:
            weights = g.add(weights, rng.normal(size=(1, HEADS, keys, 1)))
        return g.op("Softmax", weights, axis=2) if self.softmax else weights

    def _values(self, g: Builder, values: str) -> str:
        pixels = int(np.prod(self.geometry.feature_size))
        neighbours = self.gathering(g, values, self.geometry)  # [B, C, K, H, W]
        return g.reshape(neighbours, -1, HEADS, HEAD_DIM, self.geometry.keys_per_query, pixels)


def first_neighbour_twice(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """[B, C, K, H, W] whose second slot is the first once more."""
    return g.gather(by_slices(g, x, geometry), np.array([0, 0, *range(2, geometry.keys_per_query)]), 2)


def of_the_next_pixel(g: Builder, weights: str) -> str:
    """[B, nH, K, P] rolled by one pixel."""
    return g.concat([g.slice(weights, 1, int(np.prod(SIZE)), 3), g.slice(weights, 0, 1, 3)], 3)


def of_one_pixel(g: Builder, weights: str) -> str:
    return g.slice(weights, 5, 6, 3)


def wrapped_around(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """[B, C, K, H, W] whose columns outside the map lie in the row above or below: flat shifts of the padded rows."""
    height, width = geometry.feature_size
    flat = g.pad(g.reshape(x, -1, CHANNELS, height * width), [0, 0, width + 1], [0, 0, width + 1])
    cut = [g.unsqueeze(g.slice(flat, s, s + height * width, 2), 2) for s in (i * width + j for i, j in taps(geometry))]
    return g.reshape(g.concat(cut, 2), -1, CHANNELS, geometry.keys_per_query, height, width)


AGGREGATIONS: dict[str, Aggregation] = {
    "slices": Aggregation(),
    "slices-of-both-axes": Aggregation(gathering=by_slices_of_both_axes),
    "rows-then-columns": Aggregation(gathering=by_rows_then_columns, softmax=False),
    "shifted-maps": Aggregation(gathering=by_shifting_the_map),
    "unfold": Aggregation(gathering=by_unfold, sum=by_einsum),
    "tensor-unfold": Aggregation(gathering=by_tensor_unfold, sum=by_matmul),
    "flat-gather": Aggregation(gathering=by_flat_gather, softmax=False),
    "einsum": Aggregation(sum=by_einsum, softmax=False),
    "matmul": Aggregation(sum=by_matmul),
    "matmul-of-weights": Aggregation(sum=by_matmul, softmax=False, tokens=True),
    "one-by-one": Aggregation(sum=one_by_one),
    "weights-one-by-one": Aggregation(sum=one_by_one, softmax=False),
    "token-weights": Aggregation(tokens=True, sum=by_einsum),
    "scale-and-bias": Aggregation(scale=0.25, bias=True),
    "dilated": Aggregation(K5_DILATED, by_unfold),
    "fixed-batch": Aggregation(batch=2, tokens=True),
}


def blocks(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """[B, C, *key_size] -> [B, C, K, P]: strided slices of the padded map, stacked."""
    padded = g.pad(x, [0, 0, 1, 1], [0, 0, 1, 1])
    cut = []
    for i, j in taps(geometry):
        ends = [s + (e - 1) * t + 1 for s, e, t in zip((i, j), geometry.feature_size, geometry.stride, strict=True)]
        bounds = [g.constant(v) for v in ([i, j], ends, [2, 3], list(geometry.stride))]
        cut.append(g.unsqueeze(g.op("Slice", padded, *bounds), 2))
    pixels = int(np.prod(geometry.feature_size))
    return g.reshape(g.concat(cut, 2), -1, CHANNELS, geometry.keys_per_query, pixels)


def fold(g: Builder, x: str, outlook: Outlook) -> str:
    """[B, C * K, P] -> [B, C, *key_size], as Col2Im."""
    geometry = outlook.geometry
    size = outlook.folded_size or geometry.key_size
    return g.op(
        "Col2Im", x, g.constant(list(size)), g.constant(list(geometry.kernel_size)),
        pads=list(outlook.pads), strides=list(outlook.strides or geometry.stride),
    )  # fmt: skip


def added_up(g: Builder, x: str, outlook: Outlook) -> str:
    """The same of stride 1 as padded maps added up."""
    height, width = outlook.geometry.key_size
    parts = g.reshape(x, -1, CHANNELS, outlook.geometry.keys_per_query, height, width)
    total = ""
    for k, (i, j) in enumerate(taps(outlook.geometry)):
        part = g.squeeze(g.slice(parts, k, k + 1, 2), 2)
        grown = g.pad(part, [0, 0, i, j], [0, 0, 2 - i, 2 - j])
        total = g.op("Add", total, grown) if total else grown
    return g.slice(g.slice(total, 1, 1 + height, 2), 1, 1 + width, 3)


@dataclass(frozen=True)
class Outlook:
    """Outlook attention: K x K weights per block, the blocks folded back; the rest says how it goes wrong."""

    geometry: NeighborhoodGeometry = K3
    folding: Callable[[Builder, str, Outlook], str] = fold
    softmax: bool = True
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    strides: tuple[int, int] | None = None
    folded_size: tuple[int, int] | None = None
    softmax_axis: int = 4
    reversed_rows: bool = False
    dilated_values: bool = False
    heads_rolled: bool = False
    extra: str = ""  # what is returned besides: "probabilities" or "blocks"
    batch: int | str = "batch"

    def model(self) -> onnx.ModelProto:
        rng, g, geometry = np.random.default_rng(0), Builder(opset=18), self.geometry
        keys, pixels = geometry.keys_per_query, int(np.prod(geometry.feature_size))
        x = g.input("x", [self.batch, *geometry.key_size, CHANNELS])
        channels_first = g.transpose(x, 0, 3, 1, 2)
        pooled = g.op(
            "AveragePool",
            channels_first,
            kernel_shape=list(geometry.stride),
            strides=list(geometry.stride),
            ceil_mode=1,
        )
        logits = g.linear(
            g.transpose(pooled, 0, 2, 3, 1), rng.normal(size=(CHANNELS, HEADS * keys * keys)), rng.normal(size=1)
        )
        logits = g.transpose(g.reshape(logits, -1, pixels, HEADS, keys, keys), 0, 2, 1, 3, 4)
        logits = g.mul(logits, 0.3)
        weights = g.op("Softmax", logits, axis=self.softmax_axis) if self.softmax else logits
        values = g.transpose(g.matmul(x, rng.normal(size=(CHANNELS, CHANNELS))), 0, 3, 1, 2)
        if self.dilated_values:
            neighbours = g.reshape(
                by_slices(g, values, NeighborhoodGeometry(geometry.key_size, (3, 3), (2, 2))),
                -1,
                CHANNELS,
                keys,
                pixels,
            )
        else:
            neighbours = blocks(g, values, geometry)
        neighbours = g.transpose(g.reshape(neighbours, -1, HEADS, HEAD_DIM, keys, pixels), 0, 1, 4, 3, 2)
        if self.heads_rolled:
            one, rest = g.split(neighbours, [1, HEADS - 1], 1)
            last, before = g.slice(one, pixels - 1, pixels, 2), g.slice(one, 0, pixels - 1, 2)
            neighbours = g.concat([g.concat([last, before], 2), rest], 1)
        y = g.op("MatMul", weights, neighbours)  # [B, nH, P, K, d]
        if self.reversed_rows:
            y = g.gather(y, np.arange(keys)[::-1].copy(), 3)
        flat = g.reshape(g.transpose(y, 0, 1, 4, 3, 2), -1, CHANNELS * keys, pixels)
        folded = g.transpose(self.folding(g, flat, self), 0, 2, 3, 1)
        result = {"y": g.linear(folded, rng.normal(size=(CHANNELS, CHANNELS)), rng.normal(size=CHANNELS))}
        if self.extra:
            result["extra"] = {"probabilities": weights, "blocks": y}[self.extra]
        return g.model(result)


OUTLOOKS: dict[str, Outlook] = {
    "fold": Outlook(),
    "fold-of-weights": Outlook(softmax=False),
    "fold-strided": Outlook(STRIDED),
    "fold-fixed-batch": Outlook(STRIDED, batch=3),
    "fold-of-blocks-apart": Outlook(APART),
    "added-up": Outlook(folding=added_up),
}

# What each is declined for: the reason the report gives.
NEAR_MISSES: dict[str, tuple[Outlook | Aggregation, str]] = {
    "neighbour-twice": (
        Aggregation(gathering=first_neighbour_twice),
        r"values: the keys are no rectangle .* query pixel \(3, 5\) reads \(2, 4\), \(2, 4\), \(2, 6\)",
    ),
    "weights-of-one-pixel": (
        Aggregation(weights_of=of_one_pixel),
        "the probabilities go into Slice, not into a sum over values",
    ),
    "rows-run-into-each-other": (
        Aggregation(gathering=wrapped_around),
        "slot 0 of query pixel 0 reads pixel -1, a 3x3 neighbourhood reads 10",
    ),
    "folded-one-pixel-off": (Outlook(pads=(0, 1, 2, 1)), r"place 0 of the blocks is added to pixel 0 from block"),
    "folded-with-another-stride": (
        Outlook(STRIDED, strides=(1, 1), folded_size=(4, 5)),
        r"the blocks are added up on 20 pixels, the values lie on a 8x10 map",
    ),
    "rows-reversed": (Outlook(reversed_rows=True), r"place 0 of the blocks is added to pixel \d+ from block"),
    "values-dilated": (Outlook(dilated_values=True), r"place 0 of the blocks is added to pixel \d+ from block"),
    "one-head-rolled": (Outlook(heads_rolled=True), r"differ from head to head or channel to channel"),
    "softmax-over-the-rows": (Outlook(softmax_axis=3), r"the softmax does not run over the keys that are summed"),
    "probabilities-returned": (Outlook(extra="probabilities"), r"the attention probabilities"),
    "blocks-returned": (Outlook(extra="blocks"), r"sums per pixel do not return|used in several ways"),
}
