"""How the GPU kernel of FlashWindowAttention divides its work: tiles of a window, and windows of a threadgroup.

Letters: N query tokens and M key tokens per window, nW windows, nH heads, d and dv head_dim of query/key and of value.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import DataType

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.lowering.kernels.gpu_builder import Expr, Limits, TileShape, between, ceil_div
from attnrewrite.lowering.kernels.window_gpu_relative import QUERIES, STEP, RelativeAxis, relative_axes

# Multiply-adds that a GPU does in the time it moves one byte: 18 on an M2, 10 to 20 on CUDA's larger chips.
PER_BYTE = 16

# How much of a window's own traffic reading bias and mask again may cost before windows share them.
SHARED_READS = 0.1


@dataclass(frozen=True)
class Sizes:
    """Of one head of one window, extra tokens included; bytes are those of an element of the operands.

    relative: the axes of relative positions.
    """

    queries: int
    keys: int
    head_dim: int
    value_dim: int
    bytes: int
    relative: tuple[RelativeAxis, ...] = ()

    @classmethod
    def of(cls, spec: FlashWindowAttention, shapes: Mapping[str, Sequence[Any]], dtype: str) -> Sizes:
        geometry, heads = spec.geometry, spec.num_heads
        extra = {name: int(shapes[f"extra_{name}"][2]) if f"extra_{name}" in shapes else 0 for name in ("query", "key")}
        tokens = geometry.tokens_per_window + extra["query"], geometry.keys_per_window + extra["key"]
        head_dim, value_dim = (int(shapes[name][-1]) // heads for name in ("query", "value"))
        axes = relative_axes(spec, int(shapes["relative_position"][1])) if "relative_position" in shapes else ()
        return cls(*tokens, head_dim, value_dim, DataType(dtype).itemsize, axes)


@dataclass(frozen=True)
class WindowTiling:
    """How one threadgroup divides a window.

    columns, rows: threads along x and y. queries, keys: of the logits tile, per thread. chunk: channels staged at a
    time, of query, key and value alike.
    """

    sizes: Sizes
    columns: int
    rows: int
    queries: int
    keys: int
    chunk: int

    @property
    def tile_queries(self) -> int:
        return self.rows * self.queries

    @property
    def tile_keys(self) -> int:
        return self.columns * self.keys

    @property
    def query_tiles(self) -> int:
        return ceil_div(self.sizes.queries, self.tile_queries)

    @property
    def key_tiles(self) -> int:
        return ceil_div(self.sizes.keys, self.tile_keys)

    @property
    def chunks(self) -> int:
        """Of query and key."""
        return ceil_div(self.sizes.head_dim, self.chunk)

    @property
    def value_chunks(self) -> int:
        return ceil_div(self.sizes.value_dim, self.chunk)

    @property
    def channels(self) -> int:
        """Channels of a value chunk per thread, at least; a multiple of `lanes`."""
        return ceil_div(min(self.chunk, self.sizes.value_dim), self.columns)

    @property
    def lanes(self) -> int:
        """Neighbouring channels of the value that a thread takes at once."""
        return math.gcd(self.channels, STEP)

    @property
    def resident_query(self) -> bool:
        """The query tile stays staged while tiles of keys pass; else its memory is used again as that of the keys."""
        return (self.key_tiles > 1 or self.keeps_products) and self.chunks == 1

    @property
    def keeps_products(self) -> bool:
        """Products with relative positions are computed for a whole tile of queries, not for a logit at a time."""
        return len(self.sizes.relative) > 1 and self.chunks == 1

    def query_tile(self, dtype: str) -> TileShape:
        return TileShape(self.tile_queries, self._staged_channels, dtype)

    def key_tile(self, dtype: str) -> TileShape:
        return TileShape(self.tile_keys, self._staged_channels, dtype)

    def value_tile(self, dtype: str) -> TileShape:
        return TileShape(ceil_div(self.tile_keys, STEP) * STEP, self.channels * self.columns, dtype)

    @property
    def weight_tile(self) -> TileShape:
        return TileShape(self.tile_queries, ceil_div(self.tile_keys, STEP) * STEP)

    @property
    def product_tile(self) -> TileShape:
        """Products with the tables of relative positions."""
        return TileShape(self.tile_queries, sum(axis.length for axis in self.sizes.relative))

    @property
    def _direct_axes(self) -> int:
        """Axes of relative positions whose products are computed with each logit."""
        return 0 if self.keeps_products else len(self.sizes.relative)

    @property
    def _staged_channels(self) -> int:
        return ceil_div(min(self.chunk, self.sizes.head_dim), STEP) * STEP

    def first_bytes(self, dtype: str) -> tuple[int, int, int, int, int]:
        """Where query, key, weights and value begin in the shared memory of theirs, and where it ends.

        The weights take the memory of the keys, and of the query where that is not resident: both are used up by then.
        """
        query, key, value = (t(dtype).size_bytes for t in (self.query_tile, self.key_tile, self.value_tile))
        first_weight = query if self.resident_query else 0
        first_value = max(query + key, first_weight + self.weight_tile.size_bytes)
        return 0, query, first_weight, first_value, first_value + value

    def shared_bytes(self) -> int:
        staged = self.first_bytes("float32" if self.sizes.bytes == 4 else "float16")[-1]
        return staged + (self.product_tile.size_bytes if self.keeps_products else 0)

    def held(self) -> int:
        """Numbers that a thread keeps at once: bias where it may stay; then logits, and results of tiles before, or
        results alone; and the operands of one step.
        """
        logits, one_tile = self.queries * self.keys, self.key_tiles == 1
        results = self.queries * self.channels * self.value_chunks
        of_logits = logits * (1 + min(self._direct_axes, 1)) + (0 if one_tile else results) + STEP * self.keys
        return (logits if one_tile else 0) + STEP * self.queries + max(of_logits, results + STEP * self.lanes)

    def moved_bytes(self) -> int:
        """Bytes of query, key, value, output and tables of one head of one window that it asks device memory for."""
        sizes = self.sizes
        query_reads = 1 if self.chunks == 1 else self.key_tiles
        queries = sizes.queries * (sizes.head_dim * query_reads + sizes.value_dim)
        keys = sizes.keys * (sizes.head_dim + sizes.value_dim) * self.query_tiles
        rows = sizes.queries * sizes.keys * self._direct_axes
        if self.keeps_products:
            rows = sum(axis.items(self.tile_queries, sizes.queries) for axis in sizes.relative) * self.query_tiles
        return sizes.bytes * (queries + keys + rows * sizes.head_dim)

    def estimate(self, limits: Limits) -> float:
        """Time of one window in multiply-adds of one thread.

        Counts multiply-adds and loads from shared memory (a core has a quarter as many load lanes as arithmetic lanes,
        and threads of one row load the left operand together), tiles that stick out of the window included; divides by
        how well the independent operations of the resident threads hide latency; and adds what device memory takes.
        """
        q, k, c = self.queries, self.keys, self.channels
        left = q * limits.together
        keys_of_tile = min(self.tile_keys, ceil_div(self.sizes.keys, STEP) * STEP)
        logits = self.chunks * self._staged_channels * (q * k * (1 + 2 * self._direct_axes) + left + 4 * k)
        values = self.value_chunks * keys_of_tile * (q * c + left + 4 * c)
        barriers = 60 * (self.chunks + self.value_chunks)
        exchange = 8 * q * self.columns.bit_length() + 12 * q * k + barriers  # row maxima, exponentials
        threads = self.columns * self.rows
        resident = min(limits.resident_bytes // self.shared_bytes() * threads, 1024)
        hidden = min(1.0, resident * min(q * k, 16) / 2048)
        arithmetic = self.query_tiles * self.key_tiles * threads * (logits + values + exchange) / hidden
        for axis in self.sizes.relative if self.keeps_products else ():
            rounds = ceil_div(axis.items(self.tile_queries, self.sizes.queries), threads) * threads
            arithmetic += self.query_tiles * rounds * QUERIES * self.sizes.head_dim * 2
        # Bias stays on chip over a run of windows where the logits are one tile of keys.
        bias_bytes = 0 if self.key_tiles == 1 else self.sizes.queries * self.sizes.keys * self.sizes.bytes
        return arithmetic + PER_BYTE * (self.moved_bytes() + bias_bytes)


@functools.cache
def choose_tiling(sizes: Sizes, limits: Limits) -> WindowTiling:
    """Of the tilings that keep to the limits and whose estimated time is the least, or near it (`Limits.near`), the one
    that moves the fewest bytes.

    There always is one: 8 x 4 threads, one logit each, and as few channels at a time as it takes.
    """
    widest = max(sizes.head_dim, sizes.value_dim)
    chunks = [widest] + [c for c in (64, 32, 16, 8) if c < widest]
    candidates: list[tuple[float, WindowTiling]] = []
    for chunk, columns, rows in itertools.product(chunks, (8, 16), range(4, 33, 4)):
        if columns * rows > limits.threads:
            continue
        for queries, keys in itertools.product(range(1, 9), range(1, 9)):
            tiling = WindowTiling(sizes, columns, rows, queries, keys, chunk)
            small = queries == keys == 1 and columns * rows == 32
            if tiling.shared_bytes() <= limits.shared_bytes and (tiling.held() <= limits.held or small):
                candidates.append((tiling.estimate(limits), tiling))
    least = min(time for time, _ in candidates)
    near = [(tiling.moved_bytes(), time, tiling) for time, tiling in candidates if time <= limits.near * least]
    return min(near, key=lambda candidate: candidate[:2])[-1]


@dataclass(frozen=True)
class Run:
    """Windows of one image, and images, that a threadgroup goes through one after the other for one head.

    images: found at run time where the batch is. shared: operands of the logits (bias, mask) that are the same for all
    of them; it holds their sum in registers.
    """

    windows: int
    images: Expr | int
    shared: tuple[str, ...]


def choose_run(
    tiling: WindowTiling,
    num_windows: int,
    heads: int,
    batch: Expr | int,
    same_in_windows: Sequence[str],
    same_in_images: Sequence[str],
    limits: Limits,
) -> Run:
    """As many windows as make reading bias and mask cheap, and no more than leave enough threadgroups in flight.

    same_in_windows: operands of the logits that all windows share, those of other images too. same_in_images: those
    that the images share.
    """
    if not same_in_images or tiling.key_tiles > 1:
        return Run(1, 1, ())
    count = len(same_in_windows or same_in_images)
    shared_bytes = count * tiling.sizes.queries * tiling.sizes.keys * tiling.sizes.bytes
    wanted = math.ceil(shared_bytes / (SHARED_READS * tiling.moved_bytes()))
    threadgroups = num_windows * heads * tiling.query_tiles
    length = between(1, threadgroups * (batch if isinstance(batch, int) else 1) // limits.in_flight, wanted)
    windows = min(length, num_windows) if same_in_windows else 1
    windows = ceil_div(num_windows, ceil_div(num_windows, windows))  # threadgroups of equal length
    if isinstance(batch, int):
        images = min(max(1, length // windows), batch)
        if windows == images == 1:
            return Run(1, 1, ())
    else:
        images = between(1, batch * threadgroups // (windows * limits.in_flight), max(1, wanted // windows))
    return Run(windows, images, tuple(same_in_windows if windows > 1 else same_in_images))
