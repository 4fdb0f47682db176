"""How the tensor-core kernel of SlideAttention divides its work, and what it takes.

A warp has 2 x 8 queries of one head, two rows of eight neighbours. Its keys are a slice of the key map: a box that
holds the neighbourhoods of all of them. Along an axis with a dilation, pixels a dilation apart are neighbours: queries
of one residue have dense neighbourhoods among the pixels of one residue, so a tile is of one residue, and everything is
counted in steps of the dilation.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.target import Target

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.localattention.geometry import NeighborhoodGeometry
from attnrewrite.lowering.kernels.gpu_builder import Expr, Limits, TileShape, ceil_div
from attnrewrite.lowering.kernels.slide_gpu_plan import Reach
from attnrewrite.lowering.kernels.tensor_core import COLUMNS, ELEMENT_BYTES, STEP, WARP, has_tensor_cores

# Queries of a warp, per axis.
WARP_QUERIES = (2, 8)

MAX_WARPS = 8
# The result of a value this wide takes half as many registers of a thread, the query as many again.
MAX_HEAD_DIM = 128
# Tiles of 8 keys at a time: their logits take four times as many registers.
MAX_KEY_TILES = 10

# With less than this, `slide_gpu` needs fewer instructions for 16 queries on sm_90, or as many: 3 x 3 neighbours of 8
# and 16 channels take it 290 and 560, and this kernel 520 and 530; 5 x 5 neighbours of 8 channels 600 and 760; but
# 7 x 7 of 8 channels 970 and 800.
MIN_CHANNELS, MIN_PRODUCTS = 16, 450

OPERANDS = frozenset({"query", "key", "value", "bias", "key_padding", "value_padding"})

# Instructions of a warp, as disassembled for sm_90: once; for several tiles of 8 keys together, and for each channel of
# the value there; for a tile, and for each 16 channels of query or value; for a copy by each of its threads.
PER_WARP, PER_CHUNK, PER_CHANNEL, PER_TILE, PER_STEP, PER_COPY = 200, 50, 0.25, 22, 2, 4
# ... and in the time that a byte takes from the L2 cache (5.5 TB/s) on one of 132 cores that issues four of them a
# cycle at 1.7 GHz.
PER_BYTE = 0.16
SECTOR_BYTES = 32


@dataclass(frozen=True)
class Axis:
    """One axis: the queries of a tile and of its warps, and the steps of the key map that are staged for them.

    reach: with the tile of queries, all of one residue, and the pixels of one copy. queries: of a warp. unit: the slice
    of a warp begins at a multiple of so many steps; grain: its length is one. taken: that length. staged: of a tile.
    lowest, highest: a step of a slice minus the first step of a neighbourhood lies in [lowest, highest). busy: warps
    that have queries, of all tiles. read: pixels on the map that are staged, of all tiles.
    """

    reach: Reach
    queries: int
    unit: int
    taken: int
    staged: int
    lowest: int
    highest: int
    busy: int
    read: int

    @classmethod
    def of(cls, reach: Reach, first: np.ndarray, queries: int, unit: int, grain: int) -> Axis:
        """first: int64 [extent], where slot 0 of each query stands."""
        slices, starts = [], []
        step, classes = reach.dilation, min(reach.dilation, reach.extent)
        for residue, tile_start in itertools.product(
            range(classes), range(0, ceil_div(reach.extent, step), reach.tile)
        ):
            own = first[residue::step]
            start = _start(reach, residue + tile_start * step, int(own[min(tile_start, len(own) - 1)]))
            starts.append(start)
            for index in range(tile_start, tile_start + reach.tile, queries):
                columns = (own[index : index + queries] - start) // step
                if len(columns):
                    slices.append((int(columns[0]), int(columns[-1])))
        begin, last = (np.array(ends) for ends in zip(*slices, strict=True))
        end, begin_at = last + reach.kernel, begin // unit * unit
        taken = ceil_div(int((end - begin_at).max()), grain) * grain
        staged = max(ceil_div(int(end.max()), unit) * unit, taken)
        begin_at = np.minimum(begin_at, staged - taken)
        lowest, highest = int((begin_at - last).min()), int((begin_at - begin).max()) + taken
        pixels = np.array(starts)[:, None] + np.arange(staged) * step
        read = int(((pixels >= 0) & (pixels < reach.key_extent)).sum())
        return cls(reach, queries, unit, taken, staged, lowest, highest, len(slices), read)

    @property
    def warps(self) -> int:
        return self.reach.tile // self.queries

    @property
    def residues(self) -> int:
        return min(self.reach.dilation, self.reach.extent)

    @property
    def tiles(self) -> int:
        """Of all residues."""
        return self.residues * ceil_div(ceil_div(self.reach.extent, self.reach.dilation), self.reach.tile)

    @property
    def idle(self) -> bool:
        """Whether some warp has no query."""
        return self.busy < self.tiles * self.warps

    # Index arithmetic, for the tile `tile` of all. Queries of its residue are counted from 0 on.

    def first_query(self, tile: Expr) -> Expr:
        return tile // self.residues * self.reach.tile

    def pixel(self, tile: Expr, query: Expr) -> Expr:
        """Of a query; past the last one on the map, that of the last."""
        residue = tile % self.residues
        members = (self.reach.extent - residue + self.reach.dilation - 1) // self.reach.dilation
        return residue + tirx.min(query, members - 1) * self.reach.dilation

    def is_query(self, tile: Expr, query: Expr) -> Expr | bool:
        """Whether a query is on the map; True if all are."""
        if self.reach.extent % (self.residues * self.reach.tile) == 0:
            return True
        return tile % self.residues + query * self.reach.dilation < self.reach.extent

    def start(self, tile: Expr) -> Expr:
        """The pixel of the key map at which staging begins."""
        first = self.first_query(tile)
        plain = tile % self.residues + first * self.reach.dilation
        return _start(self.reach, plain, self.reach.first_neighbour(self.pixel(tile, first)))

    def slice(self, first_step: Expr) -> Expr:
        """The step, among those staged, at which the slice of a warp begins whose first query's neighbourhood begins
        at `first_step`.
        """
        begin = first_step if self.unit == 1 else first_step // self.unit * self.unit
        return tirx.min(begin, self.staged - self.taken)


def _start(reach: Reach, first_query: Any, first_neighbour: Any) -> Any:
    """Where staging begins, of numbers and of expressions: at a multiple of a copy."""
    plain = first_query * reach.stride + (reach.offset - reach.front)
    if reach.border != "inward":
        return plain
    lesser = min if isinstance(first_neighbour, int) else tirx.min
    return lesser(plain, first_neighbour // reach.lanes * reach.lanes)


@dataclass(frozen=True)
class Work:
    """The op a tiling is for. instances: heads times images, as far as known. in_vectors: whether neighbouring pixels
    of a row may be copied at once.
    """

    geometry: NeighborhoodGeometry
    head_dim: int
    value_dim: int
    instances: int
    in_vectors: bool

    @classmethod
    def of(cls, spec: SlideAttention, shapes: Mapping[str, Sequence[Any]]) -> Work:
        head_dim, value_dim = (int(shapes[operand][1]) // spec.num_heads for operand in ("query", "value"))
        batch = shapes["query"][0]
        instances = spec.num_heads * (batch if isinstance(batch, int) else 1)
        plain = spec.geometry.borders[-1] in ("zero", "exclude", "inward") and spec.geometry.dilation[-1] == 1
        padded = not {"key_padding", "value_padding"}.isdisjoint(shapes)
        return cls(spec.geometry, head_dim, value_dim, instances, plain and not padded)


@dataclass(frozen=True)
class SlideTensorTiling:
    """rows, columns: the two axes. chunk: rows of keys whose logits a warp has at a time. band: rows of keys that are
    staged at a time; all, or a multiple of a chunk.
    """

    work: Work
    rows: Axis
    columns: Axis
    chunk: int
    band: int

    @property
    def warps(self) -> int:
        return self.rows.warps * self.columns.warps

    @property
    def threads(self) -> tuple[int, int]:
        return WARP, self.warps

    @property
    def lanes(self) -> int:
        """Pixels of one copy."""
        return self.columns.reach.lanes

    @property
    def bands(self) -> int:
        return ceil_div(self.rows.staged, self.band)

    @property
    def chunks(self) -> int:
        """Of all rows that a warp goes through."""
        return self.rows.taken // self.chunk

    @property
    def key_tiles(self) -> int:
        """Of 8 keys, in a chunk."""
        return self.chunk * self.columns.taken // COLUMNS

    @property
    def head_steps(self) -> int:
        return ceil_div(self.work.head_dim, STEP)

    @property
    def value_steps(self) -> int:
        return ceil_div(self.work.value_dim, STEP)

    @property
    def key_tile(self) -> TileShape:
        """A row for each channel of the key, and one of zeros for those that fill up a step."""
        zeros = self.work.head_dim % STEP > 0
        return TileShape(self.work.head_dim + zeros, self.band * self.columns.staged, "float16")

    @property
    def value_tile(self) -> TileShape:
        return TileShape(self.work.value_dim, self.band * self.columns.staged, "float16")

    @property
    def table_columns(self) -> int:
        """Of the bias by relative position: an even number."""
        return ceil_div(self.columns.highest - self.columns.lowest, 2) * 2

    @property
    def table_floats(self) -> int:
        """Of one of its two copies: an odd multiple of 16, so that they begin at different banks."""
        return (ceil_div((self.rows.highest - self.rows.lowest) * self.table_columns, 16) | 1) * 16

    @property
    def shared_bytes(self) -> int:
        return self.key_tile.size_bytes + self.value_tile.size_bytes + 2 * self.table_floats * 4

    @property
    def positions(self) -> int:
        """Copies of one channel of a band."""
        return self.band * self.columns.staged // self.lanes

    @property
    def channels_at_once(self) -> int:
        """Channels that all threads copy together; a divisor of head_dim and value_dim."""
        together = math.gcd(self.work.head_dim, self.work.value_dim)
        most = min(self.warps * WARP // self.positions, together)
        return next((d for d in range(most, 0, -1) if together % d == 0), 1)

    def estimate(self, limits: Limits) -> float:
        """Time of all heads and images, in instructions of warps."""
        work = self.work
        per_tile = PER_TILE + PER_STEP * (self.head_steps + self.value_steps)
        per_chunk = PER_CHUNK + PER_CHANNEL * work.value_dim + self.key_tiles * per_tile
        groups, channels = self.rows.tiles * self.columns.tiles, work.head_dim + work.value_dim
        copies = ceil_div(self.positions, self.warps * WARP) * channels // self.channels_at_once * self.bands
        arithmetic = self.rows.busy * self.columns.busy * (PER_WARP + self.chunks * per_chunk)
        copying = groups * self.warps * copies * PER_COPY
        # Of a row, the sectors of 32 bytes that it touches, on average.
        row_bytes = self.columns.read * ELEMENT_BYTES + self.columns.tiles * (SECTOR_BYTES - self.lanes * ELEMENT_BYTES)
        reading = channels * self.rows.read * row_bytes * PER_BYTE
        # The last round of threadgroups, or the only one, takes as long as the others.
        all_groups = groups * work.instances
        rounds = ceil_div(all_groups, limits.in_flight)
        return (arithmetic + copying + reading) / groups * rounds * limits.in_flight


@functools.cache
def choose_tiling(work: Work, limits: Limits) -> SlideTensorTiling | None:
    """The tiling with the least estimated time, of those with four warps if there are any; None where nothing fits."""
    fits = [tiling for tiling in _tilings(work, limits) if tiling.shared_bytes <= limits.shared_bytes]
    fewest = min(MAX_WARPS // 2, max((tiling.warps for tiling in fits), default=0))
    wide = (tiling for tiling in fits if tiling.warps >= fewest)
    return min(wide, key=lambda tiling: tiling.estimate(limits), default=None)


def _tilings(work: Work, limits: Limits) -> Iterator[SlideTensorTiling]:
    sides = [
        range(1, min(ceil_div(ceil_div(extent, dilation), queries), MAX_WARPS) + 1)
        for extent, dilation, queries in zip(
            work.geometry.feature_size, work.geometry.dilation, WARP_QUERIES, strict=True
        )
    ]
    most = min(MAX_WARPS, limits.threads // WARP)
    for high, wide in itertools.product(*sides):
        if high * wide > most:
            continue
        columns = _columns(work, wide)
        tiles = columns.taken // COLUMNS
        for chunk in (c for c in (1, 2, 4, 8) if c * tiles % 2 == 0):
            if chunk * tiles > MAX_KEY_TILES:
                break
            rows = _axis(work.geometry, 0, high, 1, 1, chunk)
            whole = SlideTensorTiling(work, rows, columns, chunk, rows.staged)
            if whole.shared_bytes <= limits.shared_bytes:
                yield whole
                continue
            rows = _axis(work.geometry, 0, high, 1, chunk, chunk)
            bands = (SlideTensorTiling(work, rows, columns, chunk, b) for b in range(chunk, rows.staged, chunk))
            fits = [tiling for tiling in bands if tiling.shared_bytes <= limits.shared_bytes]
            yield from fits[-1:]


def _columns(work: Work, warps: int) -> Axis:
    """The narrowest slices, then the widest copies. Of slices beyond what a chunk of two rows may have, an even number
    of tiles.
    """
    most = math.gcd(work.geometry.key_size[-1], COLUMNS) if work.in_vectors else 1
    found = [_axis(work.geometry, 1, warps, lanes, COLUMNS, COLUMNS) for lanes in (8, 4, 2, 1) if most % lanes == 0]
    best = min(found, key=lambda axis: (axis.taken, -axis.reach.lanes))
    if best.taken // COLUMNS % 2 == 0 or best.taken // COLUMNS * 2 <= MAX_KEY_TILES:
        return best
    return _axis(work.geometry, 1, warps, best.reach.lanes, COLUMNS, STEP)


@functools.cache
def _axis(geometry: NeighborhoodGeometry, axis: int, warps: int, lanes: int, unit: int, grain: int) -> Axis:
    kernel, dilation, stride = (s[axis] for s in (geometry.kernel_size, geometry.dilation, geometry.stride))
    border, offset, extent = geometry.borders[axis], geometry.offset[axis], geometry.feature_size[axis]
    tile = warps * WARP_QUERIES[axis]
    reach = Reach(extent, kernel, dilation, stride, offset, border, geometry.key_size[axis], tile, lanes)
    positions = geometry.axis_table(axis) if border == "inward" else geometry.axis_positions(axis)
    return Axis.of(reach, positions[:, 0], WARP_QUERIES[axis], unit, grain)


def takes(spec: SlideAttention, shapes: Mapping[str, Sequence[Any]], dtype: str, target: Target) -> bool:
    """Whether the tensor-core kernel computes this op; else `slide_gpu` does.

    It does for float16 from sm_75 on, and bfloat16 from sm_80 on; two axes, along none of which there is a stride as
    well as a dilation; heads of at most 128 channels; a bias that all queries share; and no learned kernels.
    """
    geometry = spec.geometry
    if spec.predicted or not (OPERANDS.issuperset(shapes) and has_tensor_cores(target, dtype)):
        return False
    if len(geometry.feature_size) != 2 or len(shapes.get("bias", (1, 1))) != 2:
        return False
    if any(stride > 1 and dilation > 1 for stride, dilation in zip(geometry.stride, geometry.dilation, strict=True)):
        return False
    work = Work.of(spec, shapes)
    channels = work.head_dim + work.value_dim
    if max(work.head_dim, work.value_dim) > MAX_HEAD_DIM or channels < MIN_CHANNELS:
        return False
    if geometry.keys_per_query * channels < MIN_PRODUCTS:
        return False
    return choose_tiling(work, Limits.of(target)) is not None
