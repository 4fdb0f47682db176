"""Windows whose keys and values come from other windows than their queries: halo and overlap, in many spellings.

A `HaloSpelling` cuts queries into plain windows and keys and values as its `gathering` says; every gathering has the
signature `(g, x, geometry, channels) -> [B*nW, M, C]` on a map `[B, H, W, C]`, or `[B, L, C]` where the geometry has
one axis. Letters: B batch, N queries and M keys per window, nW windows, C channels, nH heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto

from attnrewrite.localattention.geometry import PADDING, KeyWindows, WindowGeometry
from tests.models import reference
from tests.models.onnx_builder import Builder
from tests.models.onnx_movement import Movement
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, PLAIN, Expected, Weights

Gathering = Callable[[Builder, str, WindowGeometry, int], str]


def with_keys(geometry: WindowGeometry, before: int, after: int, border: str = "padding") -> WindowGeometry:
    """The windows with keys that reach `before` and `after` pixels beyond them along every axis."""
    window = tuple(before + w + after for w in geometry.window_size)
    rank = len(window)
    keys = KeyWindows(geometry.feature_size, window, geometry.window_size, (-before,) * rank, (1,) * rank, border)
    return replace(geometry, keys=keys)


HALO = with_keys(PLAIN, 2, 2)
OVERLAP = with_keys(PLAIN, 1, 1)
BLOCKS = with_keys(WindowGeometry((24,), (4,), (0,)), 4, 4)
BACKWARD = with_keys(WindowGeometry((24,), (4,), (0,)), 4, 0)

MODES = {"padding": "constant", "wrap": "wrap", "edge": "edge", "reflect": "reflect"}


def _keys(geometry: WindowGeometry) -> KeyWindows:
    assert geometry.keys is not None
    return geometry.keys


def around(g: Builder, x: str, geometry: WindowGeometry, value: float = 0.0) -> str:
    """The map with its border, as far as the key windows reach."""
    keys = _keys(geometry)
    before = [-o for o in keys.offset]
    reach = [(n - 1) * s + w for n, s, w in zip(geometry.grid, keys.stride, keys.window_size, strict=True)]
    after = [r - b - e for r, b, e in zip(reach, before, keys.feature_size, strict=True)]
    return g.pad(x, [0, *before, 0], [0, *after, 0], value, MODES[keys.border])


def by_im2col(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """F.unfold as the exporters write it: a Gather per axis, here channels last."""
    keys = _keys(geometry)
    x = around(g, x, geometry)
    for axis, (count, stride, window) in enumerate(zip(geometry.grid, keys.stride, keys.window_size, strict=True)):
        x = g.gather(x, np.arange(count)[:, None] * stride + np.arange(window), 1 + 2 * axis)
    x = g.transpose(x, 0, 1, 3, 2, 4, 5)
    return g.reshape(x, -1, geometry.keys_per_window, channels)


def by_im2col_channels_first(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """nn.Unfold on NCHW: [B, C*kh*kw, nW], then to tokens."""
    keys = _keys(geometry)
    x = g.transpose(around(g, x, geometry), 0, 3, 1, 2)
    for axis, (count, stride, window) in enumerate(zip(geometry.grid, keys.stride, keys.window_size, strict=True)):
        x = g.gather(x, np.arange(window)[:, None] + np.arange(count) * stride, 2 + 2 * axis)
    x = g.reshape(g.transpose(x, 0, 1, 2, 4, 3, 5), -1, channels * geometry.keys_per_window, geometry.num_windows)
    x = g.reshape(x, -1, channels, geometry.keys_per_window, geometry.num_windows)
    return g.reshape(g.transpose(x, 0, 3, 2, 1), -1, geometry.keys_per_window, channels)


def by_slices(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """Every key window cut out of the padded map, then all of them stacked."""
    keys = _keys(geometry)
    x = around(g, x, geometry)
    windows = []
    for place in itertools.product(*map(range, geometry.grid)):
        window = x
        for axis, (n, stride, size) in enumerate(zip(place, keys.stride, keys.window_size, strict=True), start=1):
            window = g.slice(window, n * stride, n * stride + size, axis)
        windows.append(g.unsqueeze(window, 1))
    return g.reshape(g.concat(windows, 1), -1, geometry.keys_per_window, channels)


def by_strided_slices(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """Key token j of all windows at once: a slice whose step is the window."""
    keys = _keys(geometry)
    x = around(g, x, geometry)
    tokens = []
    for place in itertools.product(*map(range, keys.window_size)):
        token = x
        for axis, (start, count, stride) in enumerate(zip(place, geometry.grid, keys.stride, strict=True), start=1):
            token = g.slice(token, start, start + (count - 1) * stride + 1, axis, stride)
        tokens.append(g.unsqueeze(token, 1 + len(geometry.grid)))
    return g.reshape(g.concat(tokens, 1 + len(geometry.grid)), -1, geometry.keys_per_window, channels)


def by_flat_gather(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """One Gather on the flattened map, which has a token of zeros behind it."""
    table = geometry.key_pixels()
    pixels = int(np.prod(geometry.key_size))
    x = g.pad(g.reshape(x, -1, pixels, channels), [0, 0, 0], [0, 1, 0])
    x = g.gather(x, np.where(table == PADDING, pixels, table), 1)
    return g.reshape(x, -1, geometry.keys_per_window, channels)


def by_one_hot_convolution(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """A strided depthwise convolution with one filter per key token."""
    keys = _keys(geometry)
    slots = geometry.keys_per_window
    kernels = np.tile(np.eye(slots).reshape(slots, 1, *keys.window_size), (channels, 1, 1, 1))
    x = g.transpose(around(g, x, geometry), 0, 3, 1, 2)
    x = g.op("Conv", x, g.constant(kernels), group=channels, strides=list(keys.stride))
    x = g.reshape(x, -1, channels, slots, geometry.num_windows)
    return g.reshape(g.transpose(x, 0, 3, 2, 1), -1, slots, channels)


def by_neighbouring_blocks(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """LongT5: the blocks padded by whole blocks, three slices of the blocks side by side."""
    keys = _keys(geometry)
    (count,), (size,) = geometry.grid, geometry.window_size
    blocks = g.reshape(x, -1, count, size, channels)
    before, parts = -keys.offset[0] // size, keys.window_size[0] // size
    blocks = g.pad(blocks, [0, before, 0, 0], [0, parts - 1 - before, 0, 0])
    x = g.concat([g.slice(blocks, k, k + count, 1) for k in range(parts)], 2)
    return g.reshape(x, -1, parts * size, channels)


def by_gathered_blocks(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """local-attention: the padded blocks gathered per window."""
    keys = _keys(geometry)
    (count,), (size,) = geometry.grid, geometry.window_size
    before, parts = -keys.offset[0] // size, keys.window_size[0] // size
    blocks = g.pad(g.reshape(x, -1, count, size, channels), [0, before, 0, 0], [0, parts - 1 - before, 0, 0])
    return g.reshape(g.gather(blocks, np.arange(count)[:, None] + np.arange(parts), 1), -1, parts * size, channels)


def tokens_by_columns(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """The key tokens of a window run down its columns."""
    size = _keys(geometry).window_size
    x = g.reshape(by_im2col(g, x, geometry, channels), -1, *size, channels)
    return g.reshape(g.transpose(x, 0, 2, 1, 3), -1, geometry.keys_per_window, channels)


@dataclass(frozen=True)
class HaloSpelling:
    """x + proj(attention of windows to their key windows), `[B, *S, C]` to the same.

    project: keys and values are projected before they are gathered ("map": padding is zero) or after ("tokens": padding
    is the projection's bias). values: how the values are gathered, if not like the keys. mask: keys outside the map are
    excluded, or none are; masked_by: what is added to their logits. merge_geometry: of the merge, if it is another.
    """

    gathering: Gathering = by_im2col
    geometry: WindowGeometry = HALO
    project: Literal["tokens", "map"] = "map"
    biased: bool = True
    masked_by: float | None = None
    values: Gathering | None = None
    movement: Movement = field(default_factory=Movement)
    batch: int | str = 2
    opset: int = 19
    element_type: int = TensorProto.FLOAT

    @property
    def expected(self) -> Expected:
        bias, mask = ("constant" if given else "none" for given in (self.biased, self.masked_by is not None))
        return Expected("halo", self.geometry, bias, mask)  # type: ignore[arg-type]

    @property
    def weights(self) -> Weights:
        return Weights.of(PLAIN)

    @property
    def bias(self) -> np.ndarray:
        """Attention bias [1, nH, N, M]."""
        shape = (1, HEADS, self.geometry.tokens_per_window, self.geometry.keys_per_window)
        return np.random.default_rng(1).normal(size=shape)

    @property
    def mask(self) -> np.ndarray | None:
        """float64 [nW, 1, M], added to the logits."""
        if self.masked_by is None:
            return None
        return np.where(self.geometry.key_pixels() == PADDING, self.masked_by, 0.0)[:, None]

    def shape(self, batch: int | str) -> list[int | str]:
        return [batch, *self.geometry.feature_size, CHANNELS]

    def model(self) -> onnx.ModelProto:
        """The ONNX model: input x, output y."""
        g, weights, geometry = Builder(self.opset, self.element_type), self.weights, self.geometry
        x = g.input("x", self.shape(self.batch))
        tokens, keys = geometry.tokens_per_window, geometry.keys_per_window
        one_axis = len(geometry.feature_size) == 1
        cut = (lambda m: g.reshape(m, -1, tokens, CHANNELS)) if one_axis else None
        queries = cut(x) if cut else self.movement.enter(g, x, geometry.queries(), CHANNELS)
        q = self._heads(g, g.linear(queries, *weights.part(0)), tokens)
        k, v = (
            self._heads(g, self._gathered(g, x, part, gathering), keys)
            for part, gathering in ((1, self.gathering), (2, self.values or self.gathering))
        )
        logits = g.op("MatMul", g.mul(q, HEAD_DIM**-0.5), g.transpose(k, 0, 1, 3, 2))
        if self.biased:
            logits = g.add(logits, self.bias)
        if self.mask is not None:
            logits = g.add(g.reshape(logits, -1, geometry.num_windows, HEADS, tokens, keys), self.mask[:, None])
            logits = g.reshape(logits, -1, HEADS, tokens, keys)
        attended = g.transpose(g.op("MatMul", g.op("Softmax", logits, axis=-1), v), 0, 2, 1, 3)
        attended = g.linear(g.reshape(attended, -1, tokens, CHANNELS), weights.proj, weights.proj_bias)
        if one_axis:
            return g.model({"y": g.op("Add", x, g.reshape(attended, -1, *geometry.feature_size, CHANNELS))})
        return g.model({"y": g.op("Add", x, self.movement.leave(g, attended, geometry.queries(), CHANNELS))})

    def _gathered(self, g: Builder, x: str, part: int, gathering: Gathering) -> str:
        """Keys (1) or values (2), [B*nW, M, C]."""
        projection = self.weights.part(part)
        if self.project == "map":
            return gathering(g, g.linear(x, *projection), self.geometry, CHANNELS)
        return g.linear(gathering(g, x, self.geometry, CHANNELS), *projection)

    def _heads(self, g: Builder, x: str, tokens: int) -> str:
        return g.transpose(g.reshape(x, -1, tokens, HEADS, HEAD_DIM), 0, 2, 1, 3)

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        """What the model must compute, in float64, from the geometry's closed form."""
        weights = self.weights
        q, k, v = (x @ w + b for w, b in (weights.part(i) for i in range(3)))
        padding = (
            {}
            if self.project == "map"
            else {
                "key_padding": weights.part(1)[1],
                "value_padding": weights.part(2)[1],
            }
        )
        bias = self.bias if self.biased else None
        attended = reference.window_attention(
            q, k, v, self.geometry, HEADS, HEAD_DIM**-0.5, bias=bias, mask=self.mask, **padding
        )
        return x + attended @ weights.proj + weights.proj_bias


def halo(**changes: object) -> HaloSpelling:
    return replace(HaloSpelling(), **changes)  # type: ignore[arg-type]


HALO_SPELLINGS: dict[str, HaloSpelling] = {
    "im2col": halo(),
    "im2col-before-linear": halo(project="tokens"),
    "im2col-channels-first": halo(gathering=by_im2col_channels_first),
    "im2col-overlap": halo(gathering=by_im2col_channels_first, geometry=OVERLAP),
    "slices": halo(gathering=by_slices),
    "strided-slices": halo(gathering=by_strided_slices),
    "flat-gather": halo(gathering=by_flat_gather),
    "one-hot-convolution": halo(gathering=by_one_hot_convolution, geometry=OVERLAP),
    "keys-one-way-values-another": halo(gathering=by_im2col, values=by_slices),
    "tokens-by-columns": halo(gathering=tokens_by_columns, biased=False),
    "masked": halo(masked_by=-np.inf),
    "masked-by-lowest-float": halo(masked_by=float(np.finfo(np.float32).min), biased=False),
    "masked-before-linear": halo(masked_by=-np.inf, project="tokens"),
    "penalised": halo(masked_by=-100.0),
    "unbiased": halo(biased=False),
    "wrapping": halo(geometry=with_keys(PLAIN, 2, 2, "wrap")),
    "edges": halo(geometry=with_keys(PLAIN, 2, 2, "edge"), gathering=by_slices),
    "reflecting": halo(geometry=with_keys(PLAIN, 1, 1, "reflect"), project="tokens"),
    "before-alone": halo(geometry=with_keys(PLAIN, 2, 0)),
    "blocks": halo(gathering=by_neighbouring_blocks, geometry=BLOCKS),
    "blocks-before-linear": halo(gathering=by_neighbouring_blocks, geometry=BLOCKS, project="tokens"),
    "blocks-gathered": halo(gathering=by_gathered_blocks, geometry=BLOCKS, masked_by=-np.inf),
    "blocks-backward": halo(gathering=by_gathered_blocks, geometry=BACKWARD),
    "batch-symbolic": halo(batch="batch"),
    "batch-symbolic-masked": halo(batch="batch", masked_by=-np.inf),
    "opset-11": halo(opset=11),
    "float16": halo(element_type=TensorProto.FLOAT16),
}


def beginning_off_by_one(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """Key windows of the query's size that begin one row further down."""
    one_down = replace(geometry, keys=replace(_keys(geometry), window_size=geometry.window_size, offset=(0, 0)))
    x = g.pad(g.slice(x, 1, 8, 1), [0, 0, 0, 0], [0, 1, 0, 0])
    return by_slices(g, x, one_down, channels)


def other_stride(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """Key windows 3 columns apart where the query windows are 4 apart."""
    keys = _keys(geometry)
    x = around(g, x, geometry)
    for axis, (count, stride, window) in enumerate(zip(geometry.grid, (4, 3), keys.window_size, strict=True)):
        x = g.gather(x, np.arange(count)[:, None] * stride + np.arange(window), 1 + 2 * axis)
    return g.reshape(g.transpose(x, 0, 1, 3, 2, 4, 5), -1, geometry.keys_per_window, channels)


def windows_by_columns(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """The key windows listed column by column, the query windows row by row."""
    rows, columns = geometry.grid
    x = g.reshape(by_im2col(g, x, geometry, channels), -1, rows, columns, geometry.keys_per_window, channels)
    return g.reshape(g.transpose(x, 0, 2, 1, 3, 4), -1, geometry.keys_per_window, channels)


def one_key_moved(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """In window 2, key token 9 is token 10."""
    table = geometry.key_pixels().copy()
    table[2, 9] = table[2, 10]
    x = g.gather(g.reshape(x, -1, 8 * 12, channels), np.where(table == PADDING, 0, table), 1)
    return g.reshape(x, -1, geometry.keys_per_window, channels)


def other_border(g: Builder, x: str, geometry: WindowGeometry, channels: int) -> str:
    """The edge repeated above and below, the map wrapped around left and right."""
    x = g.pad(x, [0, 2, 0, 0], [0, 2, 0, 0], mode="edge")
    x = g.pad(x, [0, 0, 2, 0], [0, 0, 2, 0], mode="wrap")
    within_map = replace(_keys(geometry), offset=(0, 0), feature_size=(12, 16))
    return by_slices(g, x, replace(geometry, keys=within_map), channels)


# name: (model, what is wrong, what it looks like)
HALO_NEAR_MISSES: dict[str, tuple[HaloSpelling, str, HaloSpelling]] = {
    "halo-of-another-size-off-by-one": (
        halo(gathering=beginning_off_by_one, geometry=with_keys(PLAIN, 0, 0)),
        "the keys lie one row below the queries",
        halo(geometry=with_keys(PLAIN, 0, 0)),
    ),
    "halo-values-shifted-by-one": (
        halo(
            geometry=with_keys(PLAIN, 2, 2),
            values=lambda g, x, geometry, c: by_im2col(
                g, x, replace(geometry, keys=replace(_keys(geometry), offset=(-1, -2))), c
            ),
        ),
        "the values lie one row below the keys",
        halo(),
    ),
    "halo-values-of-another-border": (
        halo(values=lambda g, x, geometry, c: by_im2col(g, x, with_keys(PLAIN, 2, 2, "edge"), c)),
        "the values repeat the edge, the keys are zero",
        halo(),
    ),
    "halo-stride-of-three": (halo(gathering=other_stride), "the key windows drift from the query windows", halo()),
    "halo-windows-by-columns": (halo(gathering=windows_by_columns), "key windows in another order", halo()),
    "halo-one-key-moved": (
        halo(gathering=one_key_moved, geometry=with_keys(PLAIN, 2, 2)),
        "one window reads one key twice",
        halo(),
    ),
    "halo-two-borders": (
        halo(gathering=other_border, geometry=with_keys(PLAIN, 2, 2)),
        "the map is continued in two ways",
        halo(geometry=with_keys(PLAIN, 2, 2, "edge")),
    ),
}
