"""Transformer blocks that run on windows, residual sums included, between one partition and one merge.

Letters: G rows of a group (its tokens attend each other), C channels, nH heads, d head_dim. Every model's input is
`[batch, *SIZE, C]`, or `[batch, C, *SIZE]` where the movement says so; its batch is symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx

from attnrewrite.localattention.geometry import WindowGeometry
from tests.models.onnx_builder import Builder
from tests.models.onnx_movement import (
    merge_by_flat_gather,
    merge_by_reshape,
    merge_by_slices,
    nchw_merge_by_reshape,
    nchw_partition_by_reshape,
    partition_by_flat_gather,
    partition_by_reshape,
    partition_by_slices,
    roll_by_gather,
    roll_by_slices,
)

SIZE, WINDOW, CHANNELS, HEADS = (8, 12), (4, 3), 10, 2
HEAD_DIM = CHANNELS // HEADS
WINDOWS = WindowGeometry(SIZE, WINDOW, (0, 0))
GROUP = WINDOWS.tokens_per_window

Movement = Callable[[Builder, str], str]


@dataclass(frozen=True)
class Around:
    """Movement before and behind a block. kind: what the report calls the site; channels_first: the map's layout."""

    before: Movement
    behind: Movement
    kind: str = "window"
    channels_first: bool = False


def _windows(move: Callable[[Builder, str, WindowGeometry, int], str]) -> Movement:
    return lambda g, x: move(g, x, WINDOWS, CHANNELS)


def _rolled(shift: int, then: Movement) -> Movement:
    return lambda g, x: then(g, roll_by_slices(g, x, (-shift, -shift), (1, 2), SIZE))


def _then_rolled(first: Movement, shift: int) -> Movement:
    return lambda g, x: roll_by_gather(g, first(g, x), (shift, shift), (1, 2), SIZE)


def _permuted(before: tuple[int, ...], perm: tuple[int, ...], after: tuple[int, ...]) -> Movement:
    return lambda g, x: g.reshape(g.transpose(g.reshape(x, *before), *perm), *after)


_GRID_IN = _permuted((-1, 4, 2, 3, 4, CHANNELS), (0, 2, 4, 1, 3, 5), (-1, GROUP, CHANNELS))
_GRID_OUT = _permuted((-1, 2, 4, 4, 3, CHANNELS), (0, 3, 1, 4, 2, 5), (-1, *SIZE, CHANNELS))
# MobileViT: [B, C, H, W] -> [B * 4, H/2 * W/2, C], the tokens at one place of their 2 x 2 patch.
_PATCHES_IN = _permuted((-1, CHANNELS, 4, 2, 6, 2), (0, 3, 5, 2, 4, 1), (-1, 24, CHANNELS))
_PATCHES_OUT = _permuted((-1, 2, 2, 4, 6, CHANNELS), (0, 5, 3, 1, 4, 2), (-1, CHANNELS, *SIZE))

AROUND: dict[str, Around] = {
    "windows": Around(_windows(partition_by_reshape), _windows(merge_by_reshape)),
    "windows by slices": Around(_windows(partition_by_slices), _windows(merge_by_slices)),
    "windows by gather": Around(_windows(partition_by_flat_gather), _windows(merge_by_flat_gather)),
    "channels first": Around(_windows(nchw_partition_by_reshape), _windows(nchw_merge_by_reshape), channels_first=True),
    "shifted": Around(_rolled(2, _windows(partition_by_reshape)), _then_rolled(_windows(merge_by_reshape), 2)),
    "grid": Around(_GRID_IN, _GRID_OUT, kind="grid"),
    "patch positions": Around(_PATCHES_IN, _PATCHES_OUT, kind="grid", channels_first=True),
}


class Layers:
    """Per-token layers and attention with weights of their own, on tokens `[rows, G, C]`."""

    def __init__(self, g: Builder, group: int) -> None:
        self.g, self.group, self.random = g, group, np.random.default_rng(0)

    def weights(self, *shape: int) -> np.ndarray:
        return self.random.normal(0, 0.4, shape)

    def norm(self, x: str) -> str:
        """LayerNorm written out."""
        g = self.g
        centred = g.op("Sub", x, g.op("ReduceMean", x, axes=[-1], keepdims=1))
        variance = g.op("ReduceMean", g.op("Mul", centred, centred), axes=[-1], keepdims=1)
        scaled = g.op("Div", centred, g.op("Sqrt", g.add(variance, 1e-3)))
        return g.add(g.mul(scaled, 1 + self.weights(CHANNELS)), self.weights(CHANNELS))

    def linear(self, x: str, into: int, out: int) -> str:
        return self.g.linear(x, self.weights(into, out), self.weights(out))

    def attention(self, x: str) -> str:
        g = self.g
        qkv = g.reshape(self.linear(x, CHANNELS, 3 * CHANNELS), -1, self.group, 3, HEADS, HEAD_DIM)
        q, k, v = (g.squeeze(part, 0) for part in g.split(g.transpose(qkv, 2, 0, 3, 1, 4), [1, 1, 1], 0))
        logits = g.mul(g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), HEAD_DIM**-0.5)
        biased = g.add(logits, self.weights(HEADS, self.group, self.group))
        out = g.transpose(g.op("MatMul", g.op("Softmax", biased, axis=-1), v), 0, 2, 1, 3)
        return self.linear(g.reshape(out, -1, self.group, CHANNELS), CHANNELS, CHANNELS)

    def mlp(self, x: str) -> str:
        return self.linear(self.g.op("Relu", self.linear(x, CHANNELS, 2 * CHANNELS)), 2 * CHANNELS, CHANNELS)

    def block(self, x: str) -> str:
        """Pre-norm: x + attention(norm(x)), then + mlp(norm(.))."""
        x = self.g.op("Add", x, self.attention(self.norm(x)))
        return self.g.op("Add", x, self.mlp(self.norm(x)))


def open_model(around: Around, batch: int | str = "batch") -> tuple[Builder, str, Layers]:
    """A builder, the map behind one Linear (channels last) or as it is, and layers for its groups."""
    g = Builder()
    shape = (CHANNELS, *SIZE) if around.channels_first else (*SIZE, CHANNELS)
    x = g.op("Tanh", g.input("x", [batch, *shape]))
    return g, x, Layers(g, 24 if around is AROUND["patch positions"] else GROUP)


def moved_block(around: Around, blocks: int = 1, batch: int | str = "batch", position: bool = False) -> onnx.ModelProto:
    """blocks: how many run on the windows before they are merged. position: a constant per token is added first."""
    g, x, layers = open_model(around, batch)
    tokens = around.before(g, x)
    if position:
        tokens = g.add(tokens, layers.weights(1, layers.group, CHANNELS))
    for _ in range(blocks):
        tokens = layers.block(tokens)
    return g.model({"y": g.op("Sigmoid", around.behind(g, tokens))})


# Near misses: each differs from a movable block in one thing, so that the partition has to stay where it is.


def two_orders() -> onnx.ModelProto:
    """A second map joins the block in grid order: its tokens are not those of the windows it is added to."""
    g, x, layers = open_model(AROUND["windows"])
    tokens = g.op("Add", AROUND["windows"].before(g, x), AROUND["grid"].before(g, g.op("Relu", x)))
    return g.model({"y": AROUND["windows"].behind(g, layers.block(tokens))})


def convolution_inside() -> onnx.ModelProto:
    """A convolution along the tokens of each window."""
    g, x, layers = open_model(AROUND["windows"])
    tokens = layers.block(AROUND["windows"].before(g, x))
    rows = g.transpose(tokens, 0, 2, 1)
    mixed = g.op("Conv", rows, g.constant(layers.weights(CHANNELS, 1, 3)), group=CHANNELS, pads=[1, 1])
    tokens = g.op("Add", tokens, g.transpose(mixed, 0, 2, 1))
    return g.model({"y": AROUND["windows"].behind(g, layers.mlp(tokens))})


def pooled_inside() -> onnx.ModelProto:
    """Each window's mean is added to its tokens."""
    g, x, layers = open_model(AROUND["windows"])
    tokens = layers.block(AROUND["windows"].before(g, x))
    tokens = g.op("Add", tokens, g.op("ReduceMean", tokens, axes=[1], keepdims=1))
    return g.model({"y": AROUND["windows"].behind(g, layers.mlp(tokens))})


def merged_otherwise() -> onnx.ModelProto:
    """The merge is that of the grid, not of the windows."""
    g, x, layers = open_model(AROUND["windows"])
    return g.model({"y": AROUND["grid"].behind(g, layers.block(AROUND["windows"].before(g, x)))})


def rolled_back_wrongly() -> onnx.ModelProto:
    """Shifted by 2 before, and by 2 once more behind."""
    g, x, layers = open_model(AROUND["shifted"])
    tokens = layers.block(AROUND["shifted"].before(g, x))
    return g.model({"y": _then_rolled(_windows(merge_by_reshape), -2)(g, tokens)})


def never_merged() -> onnx.ModelProto:
    """The windows leave the model as they are."""
    g, x, layers = open_model(AROUND["windows"])
    return g.model({"y": layers.block(AROUND["windows"].before(g, x))})


def windows_leave_too() -> onnx.ModelProto:
    """The map returns, and the tokens between two blocks are an output in window order as well."""
    g, x, layers = open_model(AROUND["windows"])
    between = layers.block(AROUND["windows"].before(g, x))
    return g.model({"y": AROUND["windows"].behind(g, layers.block(between)), "windows": between})


def windows_used_elsewhere() -> onnx.ModelProto:
    """Something that is no attention reads the tokens in window order."""
    g, x, layers = open_model(AROUND["windows"])
    between = layers.block(AROUND["windows"].before(g, x))
    summary = g.op("MatMul", g.transpose(between, 0, 2, 1), between)
    return g.model({"y": AROUND["windows"].behind(g, layers.block(between)), "summary": summary})


def keys_elsewhere() -> onnx.ModelProto:
    """The block's attention reads its keys and values from the windows behind its own: it becomes no op."""
    g, x, layers = open_model(AROUND["windows"])
    tokens = AROUND["windows"].before(g, x)
    weights = [(layers.weights(CHANNELS, CHANNELS), layers.weights(CHANNELS)) for _ in range(3)]
    other = g.reshape(
        g.gather(g.reshape(tokens, -1, WINDOWS.num_windows, GROUP, CHANNELS), [1, 2, 3, 4, 5, 6, 0, 7], 1),
        *(-1, GROUP, CHANNELS),
    )
    q, k, v = (g.linear(part, *w) for part, w in zip((tokens, other, other), weights, strict=True))
    weighted = g.op("MatMul", g.op("Softmax", g.op("MatMul", q, g.transpose(k, 0, 2, 1)), axis=-1), v)
    return g.model({"y": AROUND["windows"].behind(g, layers.mlp(g.op("Add", tokens, weighted)))})


NEAR_MISSES: dict[str, Callable[[], onnx.ModelProto]] = {
    f.__name__.replace("_", " "): f
    for f in (
        two_orders,
        convolution_inside,
        pooled_inside,
        merged_otherwise,
        rolled_back_wrongly,
        never_merged,
        windows_leave_too,
        windows_used_elsewhere,
        keys_elsewhere,
    )
}


def rows_of_tokens(batch: int | str = "batch", shared: bool = True) -> onnx.ModelProto:
    """Two blocks on windows that never become a map again: their tokens are summed up window by window.

    shared: the second block's shortcut comes from the windows too; else there is one attention and no shortcut, and the
    partition is its own.
    """
    g, x, layers = open_model(AROUND["windows"], batch)
    tokens = AROUND["windows"].before(g, x)
    tokens = layers.block(layers.block(tokens)) if shared else layers.attention(tokens)
    rows = g.reshape(tokens, -1, WINDOWS.num_windows, GROUP * CHANNELS)
    return g.model({"y": g.op("Softplus", g.matmul(rows, layers.weights(GROUP * CHANNELS, 7)))})
