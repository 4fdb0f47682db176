"""Window attention in many spellings: one `WindowSpelling` is one way to write it, and what it must be recognised as.

Letters: B batch, H/W feature-map height/width, C channels, N tokens per window, nW windows, nH heads, d head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from attnrewrite.localattention.geometry import WindowGeometry
from tests.models import reference
from tests.models.onnx_builder import Builder
from tests.models.onnx_movement import Movement

HEADS, HEAD_DIM = 3, 5
CHANNELS = HEADS * HEAD_DIM
PLAIN = WindowGeometry((8, 12), (4, 4), (0, 0))
SHIFTED = WindowGeometry((8, 12), (4, 4), (2, 2))


@dataclass(frozen=True)
class Weights:
    """The parameters all spellings of a geometry share: they compute the same function."""

    qkv: np.ndarray  # [C, 3C], the query's columns first
    qkv_bias: np.ndarray  # [3C]
    proj: np.ndarray  # [C, C]
    proj_bias: np.ndarray  # [C]
    table: np.ndarray  # [(2*height-1) * (2*width-1), nH]

    @classmethod
    def of(cls, geometry: WindowGeometry) -> Weights:
        rng = np.random.default_rng(0)
        entries = math.prod(2 * side - 1 for side in geometry.window_size)
        shapes = [(CHANNELS, 3 * CHANNELS), (3 * CHANNELS,), (CHANNELS, CHANNELS), (CHANNELS,), (entries, HEADS)]
        scales = [CHANNELS**-0.5, 0.5, CHANNELS**-0.5, 0.5, 0.7]
        return cls(*(rng.normal(size=s) * scale for s, scale in zip(shapes, scales, strict=True)))

    def part(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias of the query (0), key (1) or value (2)."""
        columns = slice(index * CHANNELS, (index + 1) * CHANNELS)
        return self.qkv[:, columns], self.qkv_bias[columns]


def relative_index(geometry: WindowGeometry) -> np.ndarray:
    """int64 [N, N]: the row of the bias table for each query and key token."""
    rows, columns = geometry.window_size
    token = np.arange(rows * columns)
    down = token[:, None] // columns - token // columns + rows - 1
    return down * (2 * columns - 1) + token[:, None] % columns - token % columns + columns - 1


def bias_of(geometry: WindowGeometry) -> np.ndarray:
    """The relative position bias [1, nH, N, N] that the table of `Weights` holds."""
    return Weights.of(geometry).table[relative_index(geometry)].transpose(2, 0, 1)[None]


Triple = tuple[str, str, str]
Heads = Callable[[Builder, "WindowSpelling", str], Triple]
Logits = Callable[[Builder, str, str, float], str]
OnLogits = Callable[[Builder, str, "WindowSpelling"], str]
Weighting = Callable[[Builder, str, str], str]


@dataclass(frozen=True)
class Expected:
    """What a matcher must say of the one softmax of a spelling; the fields of a Site."""

    kind: Literal["window", "stripe", "halo", "neighborhood"]
    geometry: object
    bias: Literal["none", "constant", "tensor"]
    mask: Literal["none", "shift", "constant", "tensor"]
    num_heads: int = HEADS
    head_dim: int = HEAD_DIM


@dataclass(frozen=True)
class WindowSpelling:
    """x + proj(window attention of x), `[B, H, W, C]` (or NCHW) to the same, the parts written as the fields say.

    project: the qkv Linear acts on the tokens of the windows or on the map before they are cut out; it decides the
    value of padded keys. bias, mask: added to the logits `[B*nW, nH, N, N]`, in the order given
    by mask_first. mask_values: what the mask adds, `[nW, N, N]`, for the reference.
    """

    heads: Heads
    logits: Logits
    weighting: Weighting
    bias: OnLogits | None
    mask: OnLogits | None
    softmax: OnLogits
    geometry: WindowGeometry = SHIFTED
    movement: Movement = field(default_factory=Movement)
    project: Literal["tokens", "map"] = "tokens"
    scale: float = HEAD_DIM**-0.5
    mask_first: bool = False
    mask_kind: Literal["shift", "constant", "none"] = "shift"
    mask_values: np.ndarray | None = None
    batch: int | str = 2
    opset: int = 17
    element_type: int = TensorProto.FLOAT

    @property
    def channels_first(self) -> bool:
        return self.movement.axes == (2, 3)

    @property
    def weights(self) -> Weights:
        return Weights.of(self.geometry)

    @property
    def added_mask(self) -> np.ndarray | None:
        """float64 [nW, N, N] that is added to the logits of every head; None where there is no mask."""
        if self.mask is None:
            return None
        if self.mask_values is not None:
            return self.mask_values
        return np.where(self.geometry.crosses_regions(), -100.0, 0.0)

    @property
    def expected(self) -> Expected:
        whole = [w == e for w, e in zip(self.geometry.window_size, self.geometry.feature_size, strict=True)]
        return Expected(
            "stripe" if any(whole) else "window",
            self.geometry,
            "none" if self.bias is None else "constant",
            "none" if self.mask is None else self.mask_kind,
        )

    def shape(self, batch: int | str) -> list[int | str]:
        size = self.geometry.feature_size
        return [batch, CHANNELS, *size] if self.channels_first else [batch, *size, CHANNELS]

    def model(self) -> onnx.ModelProto:
        """The ONNX model: input x, output y."""
        g = Builder(self.opset, self.element_type)
        x = g.input("x", self.shape(self.batch))
        return g.model({"y": self.block(g, x)})

    def block(self, g: Builder, x: str) -> str:
        """Write the block after the map x; returns the value with x + proj(attention)."""
        weights, geometry = self.weights, self.geometry
        if self.project == "tokens":
            tokens = self.movement.enter(g, x, geometry, CHANNELS)
        else:
            tokens = self.movement.enter(g, self.project_map(g, x), geometry, 3 * CHANNELS)
        q, k, v = self.heads(g, self, tokens)
        tokens = self.attend(g, q, k, v)
        tokens = g.linear(tokens, weights.proj, weights.proj_bias)
        return g.op("Add", x, self.movement.leave(g, tokens, geometry, CHANNELS))

    def project_map(self, g: Builder, x: str) -> str:
        """The qkv Linear on the whole map, as a 1 x 1 convolution where channels come first."""
        weights = self.weights
        if not self.channels_first:
            return g.linear(x, weights.qkv, weights.qkv_bias)
        return g.op("Conv", x, g.constant(weights.qkv.T[:, :, None, None]), g.constant(weights.qkv_bias))

    def attend(self, g: Builder, q: str, k: str, v: str) -> str:
        """q, k, v `[B*nW, nH, N, d]` to tokens `[B*nW, N, C]`."""
        logits = self.logits(g, q, k, self.scale)
        steps = (self.mask, self.bias) if self.mask_first else (self.bias, self.mask)
        for step in steps:
            if step is not None:
                logits = step(g, logits, self)
        attended = self.weighting(g, self.softmax(g, logits, self), v)
        return g.reshape(g.transpose(attended, 0, 2, 1, 3), -1, self.geometry.tokens_per_window, CHANNELS)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """What the model must compute, in float64, from the geometry's closed form."""
        weights = self.weights
        maps = np.moveaxis(x, 1, -1) if self.channels_first else x
        q, k, v = (maps @ w + b for w, b in (weights.part(i) for i in range(3)))
        outside = np.full(CHANNELS, self.movement.pad_value) if self.project == "tokens" else None
        attended = reference.window_attention(
            q,
            k,
            v,
            self.geometry,
            HEADS,
            self.scale,
            bias=None if self.bias is None else bias_of(self.geometry),
            mask=self.added_mask,
            key_padding=None if outside is None else outside @ weights.part(1)[0] + weights.part(1)[1],
            value_padding=None if outside is None else outside @ weights.part(2)[0] + weights.part(2)[1],
        )
        y = maps + attended @ weights.proj + weights.proj_bias
        return np.moveaxis(y, -1, 1) if self.channels_first else y
