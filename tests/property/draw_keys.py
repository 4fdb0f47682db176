"""Random windows whose queries or keys are more, fewer or others than their own tokens: class, register and summary
tokens, queries or keys pooled inside the window, one set of queries for all windows, agents.

Letters: B batch, G = B*nW groups, N queries and M keys per window, T extra tokens, C channels, nH heads, d head_dim.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from attnrewrite.localattention.geometry import WindowGeometry
from tests.models import onnx_parts as plain
from tests.models.onnx_builder import Builder
from tests.models.onnx_windows import CHANNELS, HEAD_DIM, HEADS, Triple, WindowSpelling
from tests.property import parts
from tests.property.draw_blocks import BLOCK, LOGITS, SOFTMAXES, Block, geometry_of, movement_names, moves_of

Tokens = Callable[[Builder, str, Block], str]


def _heads(g: Builder, x: str, count: int) -> str:
    """[G, count, C] -> [G, nH, count, d]."""
    return g.transpose(g.reshape(x, -1, count, HEADS, HEAD_DIM), 0, 2, 1, 3)


def _drawn(r: random.Random, opset: int, kinds: list[str]) -> tuple[Block, list[str]]:
    """A block without bias and mask, as the other draws begin."""
    kind = r.choice(kinds)
    geometry = geometry_of(r, kind)
    geometry = WindowGeometry(geometry.feature_size, geometry.window_size, geometry.shift_size)
    batch = r.choice([1, 2, "batch"])
    moves = moves_of(r, geometry, batch, kind == "grid")
    size = geometry.tokens_per_window
    spelling = replace(
        BLOCK,
        logits=r.choice([f for f in LOGITS if opset >= 12 or f is not plain.logits_einsum]),
        softmax=r.choice(SOFTMAXES),
        geometry=geometry,
        movement=moves,
        batch=batch,
        opset=opset,
        queries=size,
        keys=size,
    )
    names = [f"block/{kind}", f"batch/{batch}", *movement_names(moves, geometry)]
    return spelling, [*names, f"logits/{spelling.logits.__name__}", f"softmax/{spelling.softmax.__name__}"]


def _biased(r: random.Random, spelling: Block, names: list[str]) -> Block:
    """With a constant bias [1, nH, N, M], or without."""
    if r.random() < 0.5:
        return spelling
    names.append("bias/bias_constant")
    values = np.random.default_rng(15).normal(size=(1, HEADS, spelling.queries, spelling.keys))
    return replace(spelling, added=(lambda g, logits, _: g.add(logits, values),))


# Extra tokens [G, T, C].


def registers(count: int) -> Tokens:
    """Learned tokens, the same in every window."""

    def write(g: Builder, tokens: str, block: Block) -> str:
        table = g.constant(np.random.default_rng(16).normal(size=(1, count, CHANNELS)))
        rows = g.slice(g.op("Shape", tokens), 0, 1, 0)
        return g.op("Expand", table, g.concat([rows, g.constant([count, CHANNELS])], 0))

    return write


def of_the_image(g: Builder, tokens: str, block: Block) -> str:
    """The mean of the map, one token in every window of an image."""
    x = block.moves.to_map(g, "x", block.geometry, CHANNELS)
    flat = g.reshape(x, -1, math.prod(block.geometry.feature_size), CHANNELS)
    mean = g.op("Sigmoid", g.reduce("ReduceMean", flat, 1))  # [B, 1, C]
    return _repeated(g, mean, block, 1)


def of_the_window(g: Builder, tokens: str, block: Block) -> str:
    """The mean of the window's tokens, through a layer of its own: a summary token."""
    return g.op("Sigmoid", g.reduce("ReduceMean", tokens, 1))


def an_input(g: Builder, tokens: str, block: Block) -> str:
    """Two class tokens of every image, an input of the model."""
    return _repeated(g, g.input("extra", [block.batch, 2, CHANNELS]), block, 2)


def _repeated(g: Builder, per_image: str, block: Block, count: int) -> str:
    """[B, T, C] -> [G, T, C]."""
    one = g.unsqueeze(per_image, 1)
    windows = block.geometry.num_windows
    spread = g.op("Expand", one, g.constant([1, windows, count, CHANNELS]))
    return g.reshape(spread, -1, count, CHANNELS)


EXTRAS: dict[str, tuple[Tokens, int]] = {
    "registers": (registers(3), 3),
    "register": (registers(1), 1),
    "of-the-image": (of_the_image, 1),
    "of-the-window": (of_the_window, 1),
    "input": (an_input, 2),
}


def draw_extra(r: random.Random, opset: int) -> tuple[Block, list[str]]:
    """Windows that hold tokens of no map besides their own; these ask too (what they attend is dropped) or only
    answer.
    """
    spelling, names = _drawn(r, opset, ["window", "grid", "stripe", "blocks", "clip"])
    name = r.choice(list(EXTRAS))
    tokens, count = EXTRAS[name]
    behind, asks = r.random() < 0.5, r.random() < 0.3
    own = spelling.geometry.tokens_per_window
    names += [f"extra/{name}", f"extra/{'behind' if behind else 'in-front'}", f"extra/{'asks' if asks else 'answers'}"]

    def heads(g: Builder, block: WindowSpelling, window: str) -> Triple:
        assert isinstance(block, Block)
        pieces = [window, tokens(g, window, block)]
        joined = g.concat(pieces if behind else pieces[::-1], 1)
        weights = block.weights
        q = g.linear(joined if asks else window, *weights.part(0))
        k, v = (g.linear(joined, *weights.part(i)) for i in (1, 2))
        return _heads(g, q, own + count if asks else own), _heads(g, k, own + count), _heads(g, v, own + count)

    def attention(g: Builder, q: str, k: str, v: str, block: Block) -> str:
        attended = parts.written_out(g, q, k, v, block)
        start = 0 if behind else count
        return g.slice(attended, start, start + own, 2) if asks else attended

    spelling = replace(spelling, heads=heads, attention=attention, keys=own + count)
    biased = _biased(r, replace(spelling, queries=own + count if asks else own), names)
    return replace(spelling, added=biased.added), names


# Tokens pooled inside their window: [G, N, C] -> [G, N / cells, C].

Pool = Callable[[Builder, str, Block, tuple[int, ...]], str]


def _split(block: Block, cell: tuple[int, ...]) -> list[int]:
    return [e for w, c in zip(block.geometry.window_size, cell, strict=True) for e in (w // c, c)]


def pooled_by_reduction(op: str, keepdims: bool) -> Pool:
    def write(g: Builder, tokens: str, block: Block, cell: tuple[int, ...]) -> str:
        x = g.reshape(tokens, -1, *_split(block, cell), CHANNELS)
        for axis in reversed(range(len(cell))):
            x = g.reduce(op, x, 2 + 2 * axis, keepdims)
        return g.reshape(x, -1, block.geometry.tokens_per_window // math.prod(cell), CHANNELS)

    write.__name__ = f"pooled_by_{op}"
    return write


def pooled_by_pool(op: str) -> Pool:
    """A pool of the window as a channels-first map."""

    def write(g: Builder, tokens: str, block: Block, cell: tuple[int, ...]) -> str:
        x = g.reshape(g.transpose(tokens, 0, 2, 1), -1, CHANNELS, *block.geometry.window_size)
        x = g.op(op, x, kernel_shape=list(cell), strides=list(cell))
        x = g.reshape(x, -1, CHANNELS, block.geometry.tokens_per_window // math.prod(cell))
        return g.transpose(x, 0, 2, 1)

    write.__name__ = f"pooled_by_{op}"
    return write


POOLS = [
    pooled_by_reduction("ReduceMean", True),
    pooled_by_reduction("ReduceMax", False),
    pooled_by_pool("AveragePool"),
    pooled_by_pool("MaxPool"),
]


def _cell(r: random.Random, geometry: WindowGeometry) -> tuple[int, ...] | None:
    """Sides that divide map, windows and shift, not all of them one; None without such. A window has several cells."""
    sizes = zip(geometry.feature_size, geometry.window_size, geometry.shift_size, strict=True)
    sides = [[c for c in range(1, w + 1) if w % c == e % c == s % c == 0] for e, w, s in sizes]
    cell = tuple(r.choice(s) for s in sides)
    return cell if 1 < math.prod(cell) < geometry.tokens_per_window else None


def draw_pooled(r: random.Random, opset: int) -> tuple[Block, list[str]]:
    """Queries (or keys and values) pooled inside their window: one map is smaller than the other."""
    cell = None
    while cell is None:
        spelling, names = _drawn(r, opset, ["window", "window", "blocks", "clip"])
        cell = _cell(r, spelling.geometry)
    pool, keys = r.choice(POOLS), r.random() < 0.4
    own = spelling.geometry.tokens_per_window
    few = own // math.prod(cell)
    queries, answers = (own, few) if keys else (few, own)

    def heads(g: Builder, block: WindowSpelling, window: str) -> Triple:
        assert isinstance(block, Block)
        q, k, v = (g.linear(window, *block.weights.part(i)) for i in range(3))
        if keys:
            k, v = pool(g, k, block, cell), pool(g, v, block, cell)
        else:
            q = pool(g, q, block, cell)
        return _heads(g, q, queries), _heads(g, k, answers), _heads(g, v, answers)

    geometry = spelling.geometry
    sizes = (geometry.feature_size, geometry.window_size, geometry.shift_size)
    asked = WindowGeometry(*(tuple(s // c for s, c in zip(size, cell, strict=True)) for size in sizes))
    names += [f"pooled/{'keys' if keys else 'queries'}", f"pooled/{pool.__name__}"]
    spelling = replace(spelling, heads=heads, queries=queries, keys=answers)
    spelling = spelling if keys else replace(spelling, asked=asked, residual=False)
    return _biased(r, spelling, names), names


# One set of queries for all windows: [B, N, C] -> [G, N, C].

Spread = Callable[[Builder, str, Block], str]


def spread_by_expand(g: Builder, queries: str, block: Block) -> str:
    return _repeated(g, queries, block, block.queries)


def spread_by_concat(g: Builder, queries: str, block: Block) -> str:
    copies = g.concat([queries] * block.geometry.num_windows, 1)
    return g.reshape(copies, -1, block.queries, CHANNELS)


def spread_by_tile(g: Builder, queries: str, block: Block) -> str:
    copies = g.op("Tile", queries, g.constant([1, block.geometry.num_windows, 1]))
    return g.reshape(copies, -1, block.queries, CHANNELS)


def spread_by_gather(g: Builder, queries: str, block: Block) -> str:
    """repeat_interleave of a fixed batch."""
    return g.gather(queries, np.repeat(np.arange(int(block.batch)), block.geometry.num_windows), 0)


def draw_shared(r: random.Random, opset: int) -> tuple[Block, list[str]]:
    """One set of queries for all windows (GC ViT): an input, or the map pooled to the size of a window."""
    spelling, names = _drawn(r, opset, ["window"])
    while spelling.geometry.is_padded:  # no pool makes a window of such a map
        spelling, names = _drawn(r, opset, ["window"])
    spread = r.choice(
        [spread_by_expand, spread_by_concat, spread_by_tile, *([] if spelling.batch == "batch" else [spread_by_gather])]
    )
    pooled = r.random() < 0.5
    names += [f"shared/{spread.__name__}", f"shared/{'pooled' if pooled else 'input'}"]

    def heads(g: Builder, block: WindowSpelling, window: str) -> Triple:
        assert isinstance(block, Block)
        size, geometry = block.queries, block.geometry
        if pooled:
            x = g.transpose(block.moves.to_map(g, "x", geometry, CHANNELS), 0, 3, 1, 2)
            grid = list(geometry.grid)
            x = g.op("AveragePool", x, kernel_shape=grid, strides=grid)
            asked = g.linear(g.transpose(g.reshape(x, -1, CHANNELS, size), 0, 2, 1), *block.weights.part(0))
        else:
            asked = g.input("asked", [block.batch, size, CHANNELS])
        k, v = (g.linear(window, *block.weights.part(i)) for i in (1, 2))
        return _heads(g, spread(g, asked, block), size), _heads(g, k, size), _heads(g, v, size)

    return _biased(r, replace(spelling, heads=heads), names), names


def draw_agents(r: random.Random, opset: int) -> tuple[Block, list[str]]:
    """Agent attention inside windows: means of the queries ask the window, its queries ask the means."""
    cell = None
    while cell is None:
        spelling, names = _drawn(r, opset, ["window"])
        cell = _cell(r, spelling.geometry)
    own = spelling.geometry.tokens_per_window
    few = own // math.prod(cell)
    pool = r.choice([pooled_by_pool("AveragePool"), pooled_by_reduction("ReduceMean", True)])
    names.append(f"agents/{pool.__name__}")

    def heads(g: Builder, block: WindowSpelling, window: str) -> Triple:
        assert isinstance(block, Block)
        q, k, v = (g.linear(window, *block.weights.part(i)) for i in range(3))
        agents = _heads(g, pool(g, q, block, cell), few)
        gathered = parts.written_out(g, agents, _heads(g, k, own), _heads(g, v, own), block)
        return _heads(g, q, own), agents, gathered

    return replace(spelling, heads=heads, keys=few), names
