"""How the window kernel for CPUs is cut: tiles, register blocks, tasks; and where its tokens lie. No loops here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.localattention.geometry import Sizes, WindowGeometry, ceil_to_multiple
from attnrewrite.lowering.kernels.vector_math import LOG2_E, VectorUnit

# A task is what one thread takes at a time: some windows of one head. A map has to give at least so many tasks, or
# threads would idle; larger tasks than these bring nothing.
_MIN_TASKS = 64
_MAX_WINDOWS_PER_TASK = 4

# Logits of one tile that are computed before they are used up: part of a second-level cache, in bytes.
_LOGIT_BYTES = 128 * 1024
# Windows of no more keys than this are not cut: a second pass over the sums costs more than a logit from further away.
_WHOLE_KEYS = 144


@dataclass(frozen=True)
class WindowPlan:
    """Sizes of one kernel; scale and mask_value carry the factor log2(e).

    A tile is `vectors * lanes` queries of which the kernel has `tiles`, and a narrower one for the queries that remain.
    The register block of the logits is key_rows keys by one tile. The values are weighed with lanes along channels
    (`by_channel`: query_rows queries by value_vectors vectors of value_lanes channels) or along queries (value_rows
    channels by one tile). Keys come in blocks of key_block, between which the sums are scaled anew where there are
    several.
    """

    geometry: WindowGeometry
    num_heads: int
    head_dim: int
    value_dim: int
    scale: float
    mask_value: float | None
    dtype: str
    has_positions: bool
    lanes: int
    accumulators: int
    vectors: int
    key_rows: int
    key_block: int
    by_channel: bool
    value_lanes: int
    value_vectors: int
    query_rows: int
    value_rows: int
    windows_per_task: int
    tiles_per_task: int

    @property
    def tokens(self) -> int:
        return self.geometry.tokens_per_window

    @property
    def keys(self) -> int:
        return self.geometry.keys_per_window

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.key_block)

    @property
    def logit_rows(self) -> int:
        return ceil_to_multiple(self.key_block, self.key_rows)

    @property
    def key_rows_held(self) -> int:
        """Rows of the copied keys: whole register blocks."""
        return ceil_to_multiple(self.keys, self.key_rows)

    @property
    def num_windows(self) -> int:
        return self.geometry.num_windows

    @property
    def window_groups(self) -> int:
        return -(-self.num_windows // self.windows_per_task)

    @property
    def tile(self) -> int:
        return self.lanes * self.vectors

    @property
    def tiles(self) -> int:
        """Tiles of full width; what remains is `rest`."""
        return self.padded_tokens // self.tile

    @property
    def padded_tokens(self) -> int:
        return ceil_to_multiple(self.tokens, self.lanes)

    @property
    def located_tokens(self) -> int:
        """Tokens up to the end of the last tile; those past the window have no pixel."""
        return ceil_to_multiple(self.tokens, self.tile)

    @property
    def tile_groups(self) -> int:
        return -(-self.tiles // self.tiles_per_task)

    @property
    def channel_blocks(self) -> int:
        """Square blocks of lanes that the channels of a query are transposed in."""
        return -(-self.head_dim // self.lanes)

    @property
    def can_transpose(self) -> bool:
        """A pixel has enough channels, those of other heads among them, to be read by whole vectors."""
        return self.num_heads * self.head_dim >= self.lanes

    @property
    def query_rows_held(self) -> int:
        """Rows of the transposed queries: `lanes` in front for channels of the head before, which are ignored."""
        return self.lanes + self.channel_blocks * self.lanes

    @property
    def value_blocks(self) -> int:
        return -(-self.value_dim // (self.value_lanes * self.value_vectors))

    @property
    def padded_value_dim(self) -> int:
        """Channels that a copied value has room for."""
        return self.value_blocks * self.value_vectors * self.value_lanes if self.by_channel else self._whole_value_rows

    @property
    def attended_shape(self) -> tuple[int, int]:
        """Of the sums of one tile: [queries, channels], or transposed."""
        if self.by_channel:
            return self.tile, self.padded_value_dim
        return max(ceil_to_multiple(self.value_dim, self.lanes), self._whole_value_rows), self.tile

    @property
    def _whole_value_rows(self) -> int:
        return ceil_to_multiple(self.value_dim, self.value_rows)

    @property
    def can_cross_regions(self) -> bool:
        return self.mask_value is not None and any(self.geometry.shift_size)

    @property
    def key_window(self) -> Sizes:
        keys = self.geometry.keys
        return self.geometry.window_size if keys is None else keys.window_size

    @property
    def position_lanes(self) -> int:
        """Key coordinates along one axis, padded to whole vectors."""
        return ceil_to_multiple(max(self.key_window), self.lanes)

    def position_rows(self, queries: int) -> int:
        """Register blocks of the products of so many queries with relative positions: rows of queries."""
        # Each row is read through a pointer of its own, and an x86 core has 15 of them.
        return _evenly(queries, max(1, min(8, self.accumulators * self.lanes // self.position_lanes)))

    def rest(self) -> WindowPlan | None:
        """The plan of the last, narrower tile, or None where the tiles of full width are all."""
        vectors = self.padded_tokens // self.lanes - self.tiles * self.vectors
        return replace(self, vectors=vectors) if vectors else None

    def pixel(self, window: Expr, token: Sequence[Expr]) -> Expr:
        """Flat pixel of a token, given by its coordinates: the closed form of `WindowGeometry.pixels`; -1 outside."""
        geometry = self.geometry
        flat, inside = T.int32(0), T.bool(True)
        for axis, position in enumerate(self._positions(window, token)):
            extent, padded, shift = geometry.feature_size[axis], geometry.padded_size[axis], geometry.shift_size[axis]
            wrap = (padded if geometry.shift_padded else extent) - shift
            index = T.Select(position >= wrap, position - wrap, position + shift) if shift else position
            if padded != extent:
                inside = T.And(inside, (index if geometry.shift_padded else position) < extent)
            flat = flat * extent + index
        return T.Select(inside, flat, -1) if geometry.is_padded else flat

    def key_pixel(self, window: Expr, key: Sequence[Expr]) -> Expr:
        """Flat pixel of a key in the key map, the closed form of `WindowGeometry.key_pixels`; -1 for padding."""
        geometry, keys = self.geometry, self.geometry.keys
        assert keys is not None
        flat, inside = T.int32(0), T.bool(True)
        for axis, (index, offset) in enumerate(zip(unravel(window, geometry.grid), key, strict=True)):
            position = index * keys.stride[axis] + keys.offset[axis] + offset * keys.dilation[axis]
            extent, shift = geometry.key_roll(axis)
            within, position = _within(keys.border, position, extent)
            inside = T.And(inside, within)
            if shift:
                position = T.floormod(position + shift, extent)
            if extent != keys.feature_size[axis]:
                inside = T.And(inside, position < keys.feature_size[axis])
            flat = flat * keys.feature_size[axis] + position
        return T.Select(inside, flat, -1)

    def reads_pixel(self, pixel: Expr) -> Expr:
        """Whether a key lies in the map; known to be so without padding."""
        geometry = self.geometry
        always = not geometry.is_padded if geometry.keys is None else bool((geometry.key_pixels() >= 0).all())
        return T.bool(True) if always else pixel >= 0

    def writes_pixel(self, pixel: Expr, step: int) -> Expr:
        """Whether a query lies in the map; known to be so where steps of so many queries end with the window."""
        whole = self.tokens % step == 0
        return T.bool(True) if whole and not self.geometry.is_padded else pixel >= 0

    def valid_key(self, key: Expr) -> Expr:
        """The key, or the last one for those that only fill a register block."""
        return key if self.keys % self.key_rows == 0 else T.min(key, self.keys - 1)

    def key_coordinate(self, key: Expr, axis: int) -> Expr:
        return unravel(key, self.key_window)[axis]

    def token_at(self, axis: int, coordinate: Expr, other: Expr) -> Expr:
        """Flat token with a coordinate along one axis; `other` counts those that share it."""
        inner = math.prod(self.geometry.window_size[axis + 1 :])
        outer = T.floordiv(other, inner) * self.geometry.window_size[axis]
        return (outer + coordinate) * inner + T.floormod(other, inner)

    def region(self, window: Expr, token: Sequence[Expr]) -> Expr:
        """Label of a token's region: the closed form of `WindowGeometry.regions`."""
        label = T.int32(0)
        for axis, position in enumerate(self._positions(window, token)):
            if shift := self.geometry.shift_size[axis]:
                first_wrapped = self.geometry.padded_size[axis] - shift
                label = label * 2 + T.Select(position >= first_wrapped, 1, 0)
        return label

    def has_two_regions(self, window: Expr) -> Expr:
        """The window is the last along a shifted axis: only there do tokens from both sides of the map meet."""
        grid = self.geometry.grid
        last = [index == extent - 1 for index, extent in zip(unravel(window, grid), grid, strict=True)]
        return reduce(T.Or, [is_last for is_last, shift in zip(last, self.geometry.shift_size, strict=True) if shift])

    def _positions(self, window: Expr, token: Sequence[Expr]) -> list[Expr]:
        """Position of a token along each axis of the padded map, before the shift."""
        geometry = self.geometry
        return [
            index * size + offset
            for index, size, offset in zip(unravel(window, geometry.grid), geometry.window_size, token, strict=True)
        ]


def _within(border: str, position: Expr, extent: int) -> tuple[Expr, Expr]:
    """(whether a position reads a pixel, where): `geometry.within` of one axis."""
    match border:
        case "padding":
            return T.And(position >= 0, position < extent), position
        case "wrap":
            return T.bool(True), T.floormod(position, extent)
        case "edge":
            return T.bool(True), T.max(T.min(position, extent - 1), 0)
        case "reflect":
            period = max(2 * (extent - 1), 1)
            folded = T.floormod(position, period)
            return T.bool(True), T.Select(folded < extent, folded, period - folded)
    raise ValueError(f"no border is called {border!r}")


def flat_index(coordinates: Sequence[Expr], sizes: Sequence[int]) -> Expr:
    """Row-major."""
    return reduce(lambda flat, at: flat * at[1] + at[0], zip(coordinates, sizes, strict=True), T.int32(0))


def unravel(flat: Expr, sizes: Sequence[int]) -> list[Expr]:
    """Row-major coordinates of a flat index; the first axis is not reduced, so an index past the end stays past it."""
    coordinates: list[Expr] = []
    for axis, size in enumerate(sizes):
        rest = math.prod(sizes[axis + 1 :])
        index = T.floordiv(flat, rest) if rest > 1 else flat
        coordinates.append(T.floormod(index, size) if axis else index)
    return coordinates


def plan_windows(
    spec: FlashWindowAttention,
    present: Collection[str],
    shapes: Mapping[str, Sequence[Any]],
    dtype: str,
    unit: VectorUnit,
) -> WindowPlan:
    """shapes: those of the operands; only the last axis of query and value is looked at."""
    geometry, heads = spec.geometry, spec.num_heads
    tokens, keys = geometry.tokens_per_window, geometry.keys_per_window
    value_dim = int(shapes["value"][-1]) // heads
    vectors, key_rows = _logit_block(tokens, keys, unit)
    tile = vectors * unit.lanes
    value_lanes, value_vectors = _value_block(value_dim, unit)
    value_rows = _evenly(value_dim, max(1, unit.accumulators // vectors))
    key_block = _key_block(keys, tile, key_rows)
    tiles = ceil_to_multiple(tokens, unit.lanes) // tile
    windows_per_task = max(1, min(_MAX_WINDOWS_PER_TASK, heads * geometry.num_windows // _MIN_TASKS))
    tasks = heads * -(-geometry.num_windows // windows_per_task)
    return WindowPlan(
        geometry=geometry,
        num_heads=heads,
        head_dim=int(shapes["query"][-1]) // heads,
        value_dim=value_dim,
        scale=spec.scale * LOG2_E,
        mask_value=None if spec.mask_value is None else spec.mask_value * LOG2_E,
        dtype=dtype,
        has_positions="relative_position" in present,
        lanes=unit.lanes,
        accumulators=unit.accumulators,
        vectors=vectors,
        key_rows=key_rows,
        key_block=key_block,
        by_channel=_by_channel(tokens, keys, value_dim, value_lanes * value_vectors, unit),
        value_lanes=value_lanes,
        value_vectors=value_vectors,
        query_rows=_output_rows(tokens, tile, unit.accumulators // value_vectors),
        value_rows=value_rows,
        windows_per_task=windows_per_task,
        tiles_per_task=max(1, tiles // -(-_MIN_TASKS // tasks)),
    )


def _evenly(extent: int, most: int) -> int:
    """The smallest block that cuts the extent into as few parts as blocks of `most` do."""
    return -(-extent // -(-extent // most))


def _value_block(value_dim: int, unit: VectorUnit) -> tuple[int, int]:
    """(lanes, vectors) of a register block of channels: at most four vectors, as even as the channels allow."""
    lanes = min(unit.lanes, max(4, 1 << (value_dim - 1).bit_length()))
    vectors = -(-value_dim // lanes)
    blocks = -(-vectors // 4)
    return lanes, -(-vectors // blocks)


def _by_channel(tokens: int, keys: int, value_dim: int, block: int, unit: VectorUnit) -> bool:
    """Whether lanes along channels waste less than lanes along queries, whose result has to be transposed."""
    by_channel = tokens * ceil_to_multiple(value_dim, block)
    by_query = ceil_to_multiple(tokens, unit.lanes) * value_dim
    # A step of a transposition moves a vector as a multiply-add does; there are log2(lanes) of them.
    transposed = ceil_to_multiple(tokens, unit.lanes) * ceil_to_multiple(value_dim, unit.lanes)
    steps = unit.lanes.bit_length() + 2
    return by_channel * keys <= by_query * keys + 2 * steps * transposed


def _key_block(keys: int, tile: int, key_rows: int) -> int:
    """Keys per pass: all of them, or even parts whose logits stay in the first-level cache."""
    most = max(_LOGIT_BYTES // (4 * tile), 4 * key_rows)
    if keys <= max(most, _WHOLE_KEYS):
        return keys
    return min(keys, ceil_to_multiple(_evenly(keys, most), key_rows))


def _logit_block(tokens: int, keys: int, unit: VectorUnit) -> tuple[int, int]:
    """(vectors of queries, keys) of the register block that wastes least on padding, loads and latency."""
    all_vectors = -(-tokens // unit.lanes)

    def cost(vectors: int, key_rows: int) -> float:
        return _product_cost(vectors, key_rows) * (all_vectors - all_vectors % vectors) * ceil_to_multiple(
            keys, key_rows
        ) + (
            _product_cost(all_vectors % vectors, key_rows) * (all_vectors % vectors) * ceil_to_multiple(keys, key_rows)
        )

    # The registers that the sums leave free hold the vectors of queries and one broadcast key.
    free = unit.accumulators // 3 - 1
    widest = min(free, all_vectors, 4)
    blocks = [(v, k) for v in range(1, widest + 1) for k in range(1, unit.accumulators // v + 1)]
    return min(blocks, key=lambda block: cost(*block))


def _product_cost(vectors: int, key_rows: int) -> float:
    """Of one multiply-add of a register block: itself, the loads beside it, and waiting for the one before."""
    if not vectors:
        return 0.0
    # Two products start per cycle and take four: fewer than 8 sums would wait for each other.
    exposed_latency = max(0, 8 - vectors * key_rows) / 8
    return 1 + 0.25 * (1 / vectors + 1 / key_rows) + exposed_latency


def _output_rows(tokens: int, tile: int, limit: int) -> int:
    """Queries per register block of the output: few padded ones, and no block reaches past its tile."""
    last_tile = tokens - (tokens - 1) // tile * tile

    def cost(rows: int) -> float:
        computed = (tokens - last_tile) // tile * ceil_to_multiple(tile, rows) + ceil_to_multiple(last_tile, rows)
        return computed * (1 + 0.5 / rows)

    fits = [
        rows
        for rows in range(1, max(limit, 1) + 1)
        if ceil_to_multiple(last_tile, rows) <= tile and (tokens <= tile or tile % rows == 0)
    ]
    return min(fits, key=cost)
