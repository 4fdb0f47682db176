"""k x k neighbourhood attention in many spellings: one `NeighborhoodSpelling` is one way to write it.

The border is zero: neighbours outside the map are zero vectors that take part in the softmax. Letters: B batch, H/W
height/width, C channels, nH heads, d head_dim, K = prod(kernel_size) neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from attnrewrite.localattention.geometry import PADDING, NeighborhoodGeometry
from tests.models import reference
from tests.models.onnx_builder import Builder
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, Expected

K3 = NeighborhoodGeometry((7, 11), (3, 3), (1, 1))
K5_DILATED = NeighborhoodGeometry((7, 11), (5, 5), (2, 2))
K3_BY_5 = NeighborhoodGeometry((7, 11), (3, 5), (2, 1))

# From a map `[B, C, H, W]` to its neighbours `[B, C, K, H, W]`.
Gathering = Callable[[Builder, str, NeighborhoodGeometry], str]
# From query `[B, nH, d, H*W]`, key and value `[B, nH, d, K, H*W]` to `[B, nH, d, H*W]`.
Attention = Callable[[Builder, str, str, str, "NeighborhoodSpelling"], str]


def taps(geometry: NeighborhoodGeometry) -> Iterable[tuple[int, int]]:
    """Where each neighbour's shifted map starts in the padded map, row-major."""
    return ((int(i), int(j)) for i in _starts(geometry, 0) for j in _starts(geometry, 1))


def _starts(geometry: NeighborhoodGeometry, axis: int) -> np.ndarray:
    offsets = geometry.axis_offsets(axis)
    return offsets - offsets[0]


def reach(geometry: NeighborhoodGeometry) -> list[int]:
    """How far the neighbourhood reaches to one side, per axis."""
    return [-int(geometry.axis_offsets(axis)[0]) for axis in (0, 1)]


def padded(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    border = [0, 0, *reach(geometry)]
    return g.pad(x, border, border)


def by_slices(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """Pad, then K slices stacked."""
    height, width = geometry.feature_size
    x = padded(g, x, geometry)
    shifted = [g.unsqueeze(g.slice(g.slice(x, i, i + height, 2), j, j + width, 3), 2) for i, j in taps(geometry)]
    return g.concat(shifted, 2)


def by_slices_of_both_axes(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """One Slice of two axes per neighbour, the maps concatenated along the channels and reordered."""
    height, width = geometry.feature_size
    x = padded(g, x, geometry)
    shifted = [
        g.op("Slice", x, g.constant([i, j]), g.constant([i + height, j + width]), g.constant([2, 3]))
        for i, j in taps(geometry)
    ]
    stacked = g.reshape(g.concat(shifted, 1), -1, geometry.keys_per_query, CHANNELS, height, width)
    return g.transpose(stacked, 0, 2, 1, 3, 4)


def by_rows_then_columns(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """The shifted rows stacked, then the shifted columns of those."""
    height, width = geometry.feature_size
    x = padded(g, x, geometry)
    rows = g.concat([g.unsqueeze(g.slice(x, i, i + height, 2), 2) for i in map(int, _starts(geometry, 0))], 2)
    both = g.concat([g.unsqueeze(g.slice(rows, j, j + width, 4), 3) for j in map(int, _starts(geometry, 1))], 3)
    return g.reshape(both, -1, CHANNELS, geometry.keys_per_query, height, width)


def by_shifting_the_map(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """Every neighbour's map cropped on one side and padded on the other."""
    height, width = geometry.feature_size
    shifted = []
    down, right = reach(geometry)
    for i, j in taps(geometry):
        i, j = i - down, j - right
        crop = g.slice(g.slice(x, max(i, 0), height + min(i, 0), 2), max(j, 0), width + min(j, 0), 3)
        before, after = [0, 0, max(-i, 0), max(-j, 0)], [0, 0, max(i, 0), max(j, 0)]
        shifted.append(g.unsqueeze(g.pad(crop, before, after), 2))
    return g.concat(shifted, 2)


def by_unfold(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """F.unfold as the exporters write it: one Gather per axis, indices (place in the kernel, position)."""
    height, width = geometry.feature_size
    x = padded(g, x, geometry)
    x = g.gather(x, _starts(geometry, 0)[:, None] + np.arange(height), 2)  # [B, C, kh, H, W']
    x = g.gather(x, _starts(geometry, 1)[:, None] + np.arange(width), 4)  # [B, C, kh, H, kw, W]
    x = g.reshape(g.transpose(x, 0, 1, 2, 4, 3, 5), -1, CHANNELS * geometry.keys_per_query, height * width)
    return g.reshape(x, -1, CHANNELS, geometry.keys_per_query, height, width)


def by_tensor_unfold(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """Tensor.unfold twice: Gather with indices (position, place in the kernel)."""
    height, width = geometry.feature_size
    x = padded(g, x, geometry)
    x = g.gather(x, np.arange(height)[:, None] + _starts(geometry, 0), 2)  # [B, C, H, kh, W']
    x = g.gather(g.transpose(x, 0, 1, 2, 4, 3), np.arange(width)[:, None] + _starts(geometry, 1), 3)
    x = g.transpose(x, 0, 1, 5, 4, 2, 3)  # [B, C, H, W, kw, kh] -> [B, C, kh, kw, H, W]
    return g.reshape(x, -1, CHANNELS, geometry.keys_per_query, height, width)


def by_flat_gather(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """One gather of flat pixel numbers from the map with one zero pixel appended."""
    height, width = geometry.feature_size
    pixels = geometry.pixels().T
    flat = g.pad(g.reshape(x, -1, CHANNELS, height * width), [0, 0, 0], [0, 0, 1])
    neighbours = g.gather(flat, np.where(pixels == PADDING, height * width, pixels), 2)
    return g.reshape(neighbours, -1, CHANNELS, geometry.keys_per_query, height, width)


def one_hot(geometry: NeighborhoodGeometry, channels: int) -> np.ndarray:
    """Depthwise kernels [channels*K, 1, kh, kw]: output channel c*K + j takes tap j of channel c."""
    slots = geometry.keys_per_query
    return np.tile(np.eye(slots).reshape(slots, 1, *geometry.kernel_size), (channels, 1, 1, 1))


def by_convolution(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """A depthwise convolution with one-hot kernels."""
    weight = g.constant(one_hot(geometry, CHANNELS))
    shifted = depthwise(g, x, weight, geometry, CHANNELS)
    return g.reshape(shifted, -1, CHANNELS, geometry.keys_per_query, *geometry.feature_size)


def by_convolution_per_head(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """The heads folded into the batch, all with the same one-hot kernels."""
    heads = g.reshape(x, -1, HEAD_DIM, *geometry.feature_size)
    shifted = depthwise(g, heads, g.constant(one_hot(geometry, HEAD_DIM)), geometry, HEAD_DIM)
    return g.reshape(shifted, -1, CHANNELS, geometry.keys_per_query, *geometry.feature_size)


def by_patches(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """tf.image.extract_patches: one convolution whose filters take every tap of every channel, channels last."""
    height, width = geometry.feature_size
    slots = geometry.keys_per_query
    taps = np.eye(slots * CHANNELS).reshape(slots * CHANNELS, *geometry.kernel_size, CHANNELS).transpose(0, 3, 1, 2)
    patches = g.op(
        "Conv",
        x,
        g.constant(np.ascontiguousarray(taps)),
        auto_pad="SAME_UPPER",
        dilations=list(geometry.dilation),
        kernel_shape=list(geometry.kernel_size),
    )
    patches = g.reshape(g.transpose(patches, 0, 2, 3, 1), -1, height, width, slots, CHANNELS)
    return g.transpose(patches, 0, 4, 3, 1, 2)


def by_padded_convolution(g: Builder, x: str, geometry: NeighborhoodGeometry) -> str:
    """Pad as a node of its own, then a convolution without padding."""
    weight = g.constant(one_hot(geometry, CHANNELS))
    shifted = g.op("Conv", padded(g, x, geometry), weight, group=CHANNELS, dilations=list(geometry.dilation))
    return g.reshape(shifted, -1, CHANNELS, geometry.keys_per_query, *geometry.feature_size)


def depthwise(
    g: Builder, x: str, weight: str, geometry: NeighborhoodGeometry, channels: int, bias: str | None = None
) -> str:
    """`[B, channels, H, W] -> [B, channels*K, H, W]`."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    return g.op("Conv", *operands, group=channels, dilations=list(geometry.dilation), pads=reach(geometry) * 2)


def _biased(g: Builder, logits: str, spelling: NeighborhoodSpelling, shape: tuple[int, ...]) -> str:
    return g.add(logits, spelling.bias_values.reshape(shape)) if spelling.bias else logits


def attend_by_sums(g: Builder, q: str, k: str, v: str, spelling: NeighborhoodSpelling) -> str:
    """(q * k).sum over d, softmax over K, (weights * v).sum over K."""
    logits = g.reduce_sum(g.op("Mul", g.unsqueeze(q, 3), k), 2)
    weights = g.op("Softmax", _biased(g, logits, spelling, (1, HEADS, -1, 1)), axis=2)
    return g.reduce_sum(g.op("Mul", g.unsqueeze(weights, 2), v), 3)


def attend_keeping_axes(g: Builder, q: str, k: str, v: str, spelling: NeighborhoodSpelling) -> str:
    """The same with keepdim, so that no axis is added: the Slide-Transformer form."""
    logits = g.reduce_sum(g.op("Mul", g.unsqueeze(q, 3), k), 2, keepdims=True)
    weights = g.op("Softmax", _biased(g, logits, spelling, (1, HEADS, 1, -1, 1)), axis=3)
    return g.reduce_sum(g.op("Mul", weights, v), 3)


def attend_by_einsum(g: Builder, q: str, k: str, v: str, spelling: NeighborhoodSpelling) -> str:
    logits = g.op("Einsum", q, k, equation="bhdp,bhdjp->bhjp")
    weights = g.op("Softmax", _biased(g, logits, spelling, (1, HEADS, -1, 1)), axis=2)
    return g.op("Einsum", weights, v, equation="bhjp,bhdjp->bhdp")


def attend_by_matmul(g: Builder, q: str, k: str, v: str, spelling: NeighborhoodSpelling) -> str:
    """q `[B, nH, H*W, 1, d]` times K `[B, nH, H*W, d, K]`."""
    query = g.unsqueeze(g.transpose(q, 0, 1, 3, 2), 3)
    logits = g.op("MatMul", query, g.transpose(k, 0, 1, 4, 2, 3))
    weights = g.op("Softmax", _biased(g, logits, spelling, (1, HEADS, 1, 1, -1)), axis=-1)
    attended = g.op("MatMul", weights, g.transpose(v, 0, 1, 4, 3, 2))
    return g.transpose(g.squeeze(attended, 3), 0, 1, 3, 2)


def attend_pixels_in_batch(g: Builder, q: str, k: str, v: str, spelling: NeighborhoodSpelling) -> str:
    """Batch and pixels folded into one axis: `[B*H*W, nH, 1, d]` times `[B*H*W, nH, d, K]`."""
    pixels, slots = int(np.prod(spelling.geometry.feature_size)), spelling.geometry.keys_per_query
    query = g.reshape(g.transpose(q, 0, 3, 1, 2), -1, HEADS, 1, HEAD_DIM)
    key = g.reshape(g.transpose(k, 0, 4, 1, 2, 3), -1, HEADS, HEAD_DIM, slots)
    value = g.reshape(g.transpose(v, 0, 4, 1, 3, 2), -1, HEADS, slots, HEAD_DIM)
    logits = _biased(g, g.op("MatMul", query, key), spelling, (1, HEADS, 1, -1))
    attended = g.op("MatMul", g.op("Softmax", logits, axis=3), value)
    return g.transpose(g.reshape(attended, -1, pixels, HEADS, HEAD_DIM), 0, 2, 3, 1)


@dataclass(frozen=True)
class NeighborhoodSpelling:
    """proj(neighbourhood attention of x), `[B, C, H, W]` to the same, with 1 x 1 convolutions for q, k, v and proj.

    scaled: where the scale is multiplied in. key_bias: a position bias [nH, K] added to the gathered key, every
    component of it alike. learned: key and value are gathered by one-hot plus learned depthwise kernels, biases
    included, over the d channels of a head (Slide-Transformer's deformed shifting); `gathering` is not
    used then.
    """

    gathering: Gathering = by_slices
    attention: Attention = attend_by_sums
    geometry: NeighborhoodGeometry = K3
    scaled: Literal["query", "key", "none"] = "query"
    bias: bool = False
    key_bias: bool = False
    learned: Literal["no", "two-convolutions", "one-convolution"] = "no"
    channels_last: bool = False
    batch: int | str = 2
    opset: int = 17
    element_type: int = TensorProto.FLOAT

    @property
    def scale(self) -> float:
        return 1.0 if self.scaled == "none" else HEAD_DIM**-0.5

    @property
    def bias_values(self) -> np.ndarray:
        """float64 [nH, K]."""
        return np.random.default_rng(3).normal(size=(HEADS, self.geometry.keys_per_query))

    @property
    def expected(self) -> Expected:
        """The biases of learned kernels count: they reach the logits through the key."""
        biased = self.bias or self.key_bias or self.learned != "no"
        return Expected("neighborhood", self.geometry, "constant" if biased else "none", "none")

    def shape(self, batch: int | str) -> list[int | str]:
        size = self.geometry.feature_size
        return [batch, *size, CHANNELS] if self.channels_last else [batch, CHANNELS, *size]

    def part(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Weight [C, C] (in, out) and bias [C] of query, key, value (0, 1, 2) and the projection (3)."""
        rng = np.random.default_rng(10 + index)
        return rng.normal(size=(CHANNELS, CHANNELS)) * CHANNELS**-0.5, rng.normal(size=CHANNELS) * 0.5

    def shift_kernel(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the key (1) or value (2): learned kernels [d*K, 1, kh, kw], their biases, and those of the fixed shift."""
        rng = np.random.default_rng(20 + index)
        rows = HEAD_DIM * self.geometry.keys_per_query
        return rng.normal(size=(rows, 1, *self.geometry.kernel_size)) / 3, rng.normal(size=rows), rng.normal(size=rows)

    def model(self) -> onnx.ModelProto:
        """The ONNX model: input x, output y."""
        g = Builder(self.opset, self.element_type)
        x = g.input("x", self.shape(self.batch))
        return g.model({"y": self.block(g, x)})

    def block(self, g: Builder, x: str) -> str:
        geometry = self.geometry
        pixels, slots = int(np.prod(geometry.feature_size)), geometry.keys_per_query
        query, key, value = (self.project(g, x, i) for i in range(3))
        if self.scaled == "query":
            query = g.mul(query, self.scale)
        if self.scaled == "key":
            key = g.mul(key, self.scale)
        q = g.reshape(query, -1, HEADS, HEAD_DIM, pixels)
        keys, values = self.gather(g, key, 1), self.gather(g, value, 2)
        k, v = (g.reshape(n, -1, HEADS, HEAD_DIM, slots, pixels) for n in (keys, values))
        if self.key_bias:
            k = g.add(k, self.bias_values.reshape(1, HEADS, 1, slots, 1))
        attended = self.attention(g, q, k, v, self)
        return self.project(g, g.reshape(attended, -1, CHANNELS, *geometry.feature_size), 3, back=True)

    def gather(self, g: Builder, x: str, index: int) -> str:
        """The neighbours `[B, C, K, H, W]` of the key (1) or the value (2)."""
        geometry = self.geometry
        if self.learned == "no":
            return self.gathering(g, x, geometry)
        learned, learned_bias, shift_bias = self.shift_kernel(index)
        heads = g.reshape(x, -1, HEAD_DIM, *geometry.feature_size)
        fixed = one_hot(geometry, HEAD_DIM)
        if self.learned == "one-convolution":
            branches = [(fixed + learned, learned_bias + shift_bias)]
        else:
            branches = [(fixed, shift_bias), (learned, learned_bias)]
        maps = [depthwise(g, heads, g.constant(w), geometry, HEAD_DIM, g.constant(b)) for w, b in branches]
        summed = maps[0] if len(maps) == 1 else g.op("Add", *maps)
        return g.reshape(summed, -1, CHANNELS, geometry.keys_per_query, *geometry.feature_size)

    def project(self, g: Builder, x: str, index: int, back: bool = False) -> str:
        """1 x 1 convolution, or a Linear where channels come last; between them the map is `[B, C, H, W]`."""
        weight, bias = self.part(index)
        if not self.channels_last:
            return g.op(
                "Conv",
                x,
                g.constant(weight.T.reshape(CHANNELS, CHANNELS, *[1] * len(self.geometry.feature_size))),
                g.constant(bias),
            )
        if back:
            return g.linear(g.transpose(x, 0, 2, 3, 1), weight, bias)
        return g.transpose(g.linear(x, weight, bias), 0, 3, 1, 2)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """What the model must compute, in float64, from the geometry's closed form."""
        maps = np.moveaxis(x, -1, 1) if self.channels_last else x
        q, k, v = (pointwise(maps, *self.part(i)) for i in range(3))
        slots = self.geometry.keys_per_query
        kernels: dict[str, np.ndarray] = {}
        if self.learned != "no":
            for name, index in (("key", 1), ("value", 2)):
                learned, learned_bias, shift_bias = self.shift_kernel(index)
                kernel = learned + one_hot(self.geometry, HEAD_DIM)
                kernels[f"{name}_kernel"] = kernel.reshape(HEAD_DIM, slots, *self.geometry.kernel_size)
                kernels[f"{name}_bias"] = np.tile((learned_bias + shift_bias).reshape(HEAD_DIM, slots), (HEADS, 1))
        if self.key_bias:
            by_channel = np.repeat(self.bias_values, HEAD_DIM, axis=0)
            # key_bias is added after the scale where the scale is on the key, so it is divided out here.
            by_channel = by_channel / self.scale if self.scaled == "key" else by_channel
            kernels["key_bias"] = kernels.get("key_bias", 0.0) + by_channel
        bias = self.bias_values if self.bias else None
        attended = reference.slide_attention(q, k, v, self.geometry, HEADS, self.scale, bias=bias, **kernels)
        y = pointwise(attended, *self.part(3))
        return np.moveaxis(y, 1, -1) if self.channels_last else y


def pointwise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """A 1 x 1 convolution in float64."""
    spread = bias.reshape(-1, *[1] * (x.ndim - 2))
    return np.einsum("bc...,co->bo...", x.astype(np.float64), weight) + spread
