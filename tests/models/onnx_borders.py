"""Neighbourhood attention with other borders, masks and maps, and dense attention whose mask leaves a neighbourhood.

Letters as in onnx_neighborhoods; P pixels of the query map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import TensorProto

from attnrewrite.localattention.geometry import PADDING, NeighborhoodGeometry
from tests.models import reference
from tests.models.onnx_builder import Builder
from tests.models.onnx_neighborhoods import Gathering, NeighborhoodSpelling, pointwise
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, Expected

Mask = Literal["none", "add", "where", "where-allowed", "lowest", "-100"]


def ends(geometry: NeighborhoodGeometry) -> tuple[list[int], list[int]]:
    """How many pixels a neighbourhood reaches beyond the map before and behind it, per axis."""
    positions = [geometry.axis_positions(a) for a in range(len(geometry.feature_size))]
    before = [max(0, -int(p.min())) for p in positions]
    return before, [max(0, int(p.max()) - e + 1) for p, e in zip(positions, geometry.key_size, strict=True)]


def by_padding(mode: str, value: float = 0.0) -> Gathering:
    """Pad in this mode, then one slice per neighbour and axis, stacked."""

    def write(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
        before, after = ends(geometry)
        x = g.pad(x, [0, 0, *before], [0, 0, *after], value, mode)
        shifted = []
        for slot in np.ndindex(*geometry.kernel_size):
            part = x
            for axis, (t, d) in enumerate(zip(slot, geometry.dilation, strict=True)):
                start = t * d + geometry.offset[axis] + before[axis]
                extent, step = geometry.feature_size[axis], geometry.stride[axis]
                part = g.slice(part, start, start + (extent - 1) * step + 1, 2 + axis, step)
            shifted.append(g.unsqueeze(part, 2))
        return g.concat(shifted, 2)

    return write


def by_wrapping(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """Circular padding as it is written without a mode for it: the ends of the map concatenated around it."""
    before, after = ends(geometry)
    for axis, (b, a) in enumerate(zip(before, after, strict=True)):
        extent = geometry.key_size[axis]
        x = g.concat([g.slice(x, extent - b, extent, 2 + axis), x, g.slice(x, 0, a, 2 + axis)], 2 + axis)
    shifted = []
    for slot in np.ndindex(*geometry.kernel_size):
        part = x
        for axis, (t, d) in enumerate(zip(slot, geometry.dilation, strict=True)):
            part = g.slice(part, t * d, t * d + geometry.feature_size[axis], 2 + axis)
        shifted.append(g.unsqueeze(part, 2))
    return g.concat(shifted, 2)


def by_table(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """One gather of flat pixel numbers; what lies outside reads pixel 0, for a mask to exclude."""
    flat = g.reshape(x, -1, CHANNELS, int(np.prod(geometry.key_size)))
    neighbours = g.gather(flat, np.maximum(geometry.pixels().T, 0), 2)
    return g.reshape(neighbours, -1, CHANNELS, geometry.keys_per_query, *geometry.feature_size)


def by_axis_tables(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """One gather per axis of the positions that each place of the kernel reads there: `(row, place in the kernel)`."""
    x = g.gather(x, geometry.axis_table(0), 2)  # [B, C, H, kh, W]
    x = g.gather(x, geometry.axis_table(1), 4)  # [B, C, H, kh, W, kw]
    x = g.transpose(x, 0, 1, 3, 5, 2, 4)
    return g.reshape(x, -1, CHANNELS, geometry.keys_per_query, *geometry.feature_size)


@dataclass(frozen=True)
class BorderSpelling(NeighborhoodSpelling):
    """gathering: written as the geometry's border needs it. mask: how slots outside the map are excluded. pixel_bias: a
    bias [nH, P, K] on the logits. pad_value: what the maps of key and value hold outside (border "constant").
    """

    mask: Mask = "none"
    pixel_bias: bool = False
    pad_value: float = 0.0

    @property
    def expected(self) -> Expected:
        biased = self.bias or self.pixel_bias or self.mask == "-100"
        masked = self.mask not in ("none", "-100")
        return Expected(
            "neighborhood", self.geometry, "constant" if biased else "none", "constant" if masked else "none"
        )

    def shape(self, batch: int | str) -> list[int | str]:
        return [batch, CHANNELS, *self.geometry.key_size]

    @property
    def outside(self) -> np.ndarray:
        """bool [K, P]."""
        return (self.geometry.pixels() == PADDING).T

    @property
    def pixel_biases(self) -> np.ndarray:
        """float64 [nH, P, K]."""
        pixels, slots = self.geometry.pixels().shape
        return np.random.default_rng(4).normal(size=(HEADS, pixels, slots))

    def block(self, g: Builder, x: str) -> str:
        geometry = self.geometry
        pixels, slots = geometry.pixels().shape
        seen = x
        for axis, stride in enumerate(geometry.stride):
            if stride > 1 or geometry.key_size[axis] != geometry.feature_size[axis]:
                seen = g.slice(seen, 0, (geometry.feature_size[axis] - 1) * stride + 1, 2 + axis, stride)
        query, key, value = self.project(g, seen, 0), self.project(g, x, 1), self.project(g, x, 2)
        q = g.reshape(g.mul(query, self.scale), -1, HEADS, HEAD_DIM, 1, pixels)
        k, v = (g.reshape(self.gathering(g, n, geometry), -1, HEADS, HEAD_DIM, slots, pixels) for n in (key, value))
        logits = g.reduce_sum(g.op("Mul", q, k), 2)
        if self.bias:
            logits = g.add(logits, self.bias_values.reshape(1, HEADS, slots, 1))
        if self.pixel_bias:
            logits = g.add(logits, self.pixel_biases.transpose(0, 2, 1)[None])
        weights = g.op("Softmax", masked(g, logits, self.outside[None, None], self.mask), axis=2)
        attended = g.reduce_sum(g.op("Mul", g.unsqueeze(weights, 2), v), 3)
        return self.project(g, g.reshape(attended, -1, CHANNELS, *geometry.feature_size), 3, back=True)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        geometry = self.geometry
        seen = x
        for axis, stride in enumerate(geometry.stride):
            at = np.arange(geometry.feature_size[axis]) * stride
            seen = seen.take(at, axis=2 + axis)
        q, k, v = (pointwise(m, *self.part(i)) for i, m in enumerate((seen, x, x)))
        bias = np.zeros((HEADS, *geometry.pixels().shape))
        bias = bias + (self.bias_values[:, None] if self.bias else 0.0)
        bias = bias + (self.pixel_biases if self.pixel_bias else 0.0)
        bias = bias + (np.where(self.outside.T, -100.0, 0.0) if self.mask == "-100" else 0.0)
        padding = np.full(CHANNELS, self.pad_value)
        attended = reference.slide_attention(
            q, k, v, geometry, HEADS, self.scale, bias=bias, key_padding=padding, value_padding=padding
        )
        return pointwise(attended, *self.part(3))


def masked(g: Builder, logits: str, outside: np.ndarray, how: Mask) -> str:
    """Logits without those of `outside` (bool, broadcast)."""
    lowest = float(np.finfo(np.float32).min)
    match how:
        case "add":
            return g.add(logits, np.where(outside, -np.inf, 0.0))
        case "lowest":
            return g.add(logits, np.where(outside, lowest, 0.0))
        case "-100":
            return g.add(logits, np.where(outside, -100.0, 0.0))
        case "where":
            return g.op("Where", g.constant(outside), g.constant(np.float64(-np.inf)), logits)
        case "where-allowed":
            return g.op("Where", g.constant(~outside), logits, g.constant(np.float64(lowest)))
    return logits


@dataclass(frozen=True)
class DenseSpelling:
    """x + proj(attention of all P tokens to all P tokens under a constant mask), `[B, P, C]` to the same.

    pixels: int64 [P, K], the tokens each may attend (PADDING: none); bias: of every pair, [nH, P, P].
    """

    expected: Expected
    pixels: np.ndarray
    mask: Mask = "add"
    bias: bool = False
    batch: int | str = 2
    element_type: int = TensorProto.FLOAT
    opset: int = 17

    @property
    def tokens(self) -> int:
        return len(self.pixels)

    @property
    def excluded(self) -> np.ndarray:
        """bool [P, P]."""
        excluded = np.ones((self.tokens, self.tokens + 1), bool)
        np.put_along_axis(excluded, self.pixels, False, 1)  # PADDING goes into the last column
        return excluded[:, :-1]

    @property
    def biases(self) -> np.ndarray:
        """float64 [nH, P, P]."""
        shape = (HEADS, self.tokens, self.tokens)
        return np.random.default_rng(5).normal(size=shape) if self.bias else np.zeros(shape)

    def shape(self, batch: int | str) -> list[int | str]:
        return [batch, self.tokens, CHANNELS]

    def model(self):  # type: ignore[no-untyped-def]
        """The ONNX model: input x, output y."""
        g = Builder(self.opset, self.element_type)
        x = g.input("x", self.shape(self.batch))
        q, k, v = (
            g.transpose(g.reshape(g.linear(x, *_part(i)), -1, self.tokens, HEADS, HEAD_DIM), 0, 2, 1, 3)
            for i in range(3)
        )
        logits = g.mul(g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), HEAD_DIM**-0.5)
        if self.bias:
            logits = g.add(logits, self.biases[None])
        weights = g.op("Softmax", masked(g, logits, self.excluded[None, None], self.mask), axis=-1)
        attended = g.transpose(g.op("MatMul", weights, v), 0, 2, 1, 3)
        out = g.linear(g.reshape(attended, -1, self.tokens, CHANNELS), *_part(3))
        return g.model({"y": g.op("Add", x, out)})

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        q, k, v = (
            (x.astype(np.float64) @ w + b).reshape(len(x), self.tokens, HEADS, HEAD_DIM)
            for w, b in (_part(i) for i in range(3))
        )
        penalty = -100.0 if self.mask == "-100" else -np.inf
        logits = np.einsum("bnhd,bmhd->bhnm", q, k) * HEAD_DIM**-0.5 + self.biases
        logits = logits + np.where(self.excluded, penalty, 0.0)
        attended = np.einsum("bhnm,bmhd->bnhd", reference.softmax(logits), v).reshape(x.shape)
        weight, bias = _part(3)
        return x + attended @ weight + bias


def _part(index: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(30 + index)
    return rng.normal(size=(CHANNELS, CHANNELS)) * CHANNELS**-0.5, rng.normal(size=CHANNELS) * 0.5
