"""How the window kernel for CPUs is cut: tiles, register blocks, tasks; and where its tokens lie. No loops here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.localattention.geometry import WindowGeometry, ceil_to_multiple
from attnrewrite.lowering.kernels.vector_math import LOG2_E, VectorUnit

# A task is what one thread takes at a time. The transposed bias is made once per task, so a task is several windows of
# one head; but a map has to give at least this many tasks, or threads would idle.
_MIN_TASKS = 32
_MAX_WINDOWS_PER_TASK = 16


@dataclass(frozen=True)
class WindowPlan:
    """Sizes of one kernel; scale and mask_value carry the factor log2(e).

    A tile is `vectors * lanes` queries. The register block of the logits is key_rows keys by one tile, that of the
    output query_rows queries by value_vectors vectors of value_lanes channels.
    """

    geometry: WindowGeometry
    num_heads: int
    head_dim: int
    value_dim: int
    scale: float
    mask_value: float | None
    dtype: str
    lanes: int
    vectors: int
    key_rows: int
    value_lanes: int
    value_vectors: int
    query_rows: int
    windows_per_task: int

    @property
    def tokens(self) -> int:
        return self.geometry.tokens_per_window

    @property
    def num_windows(self) -> int:
        return self.geometry.num_windows

    @property
    def tasks_per_head(self) -> int:
        return -(-self.num_windows // self.windows_per_task)

    @property
    def tile(self) -> int:
        return self.lanes * self.vectors

    @property
    def tiles(self) -> int:
        return -(-self.tokens // self.tile)

    @property
    def padded_keys(self) -> int:
        return ceil_to_multiple(self.tokens, self.key_rows)

    @property
    def value_blocks(self) -> int:
        return -(-self.value_dim // (self.value_lanes * self.value_vectors))

    @property
    def padded_value_dim(self) -> int:
        return self.value_blocks * self.value_vectors * self.value_lanes

    @property
    def last_tile(self) -> int:
        """Queries of the last tile that are tokens."""
        return self.tokens - (self.tiles - 1) * self.tile

    @property
    def can_cross_regions(self) -> bool:
        return self.mask_value is not None and any(self.geometry.shift_size)

    def pixel(self, window: Expr, token: Expr) -> Expr:
        """Flat pixel of a token, the closed form of `WindowGeometry.pixels`; -1 outside the map and past the window."""
        geometry = self.geometry
        flat, inside = T.int32(0), token < self.tokens
        for axis, position in enumerate(self._positions(window, token)):
            extent, padded, shift = geometry.feature_size[axis], geometry.padded_size[axis], geometry.shift_size[axis]
            wrap = (padded if geometry.shift_padded else extent) - shift
            index = T.Select(position >= wrap, position - wrap, position + shift) if shift else position
            if padded != extent:
                inside = T.And(inside, (index if geometry.shift_padded else position) < extent)
            flat = flat * extent + index
        return T.Select(inside, flat, -1)

    def reads_pixel(self, pixel: Expr) -> Expr:
        """Whether a token of the window lies in the map; known to be so without padding."""
        return pixel >= 0 if self.geometry.is_padded else T.bool(True)

    def writes_pixel(self, pixel: Expr) -> Expr:
        """Whether a query of an output block lies in the map; known to be so where no block is padded either."""
        whole = self.last_tile % self.query_rows == 0 and (self.tiles == 1 or self.tile % self.query_rows == 0)
        return T.bool(True) if whole and not self.geometry.is_padded else pixel >= 0

    def region(self, window: Expr, token: Expr) -> Expr:
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

    def _positions(self, window: Expr, token: Expr) -> list[Expr]:
        """Position of a token along each axis of the padded map, before the shift."""
        window_size = self.geometry.window_size
        return [
            index * size + offset
            for index, size, offset in zip(
                unravel(window, self.geometry.grid), window_size, unravel(token, window_size), strict=True
            )
        ]


def unravel(flat: Expr, sizes: Sequence[int]) -> list[Expr]:
    """Row-major coordinates of a flat index; the first axis is not reduced, so an index past the end stays past it."""
    coordinates: list[Expr] = []
    for axis, size in enumerate(sizes):
        rest = math.prod(sizes[axis + 1 :])
        index = T.floordiv(flat, rest) if rest > 1 else flat
        coordinates.append(T.floormod(index, size) if axis else index)
    return coordinates


def plan_windows(
    spec: FlashWindowAttention, shapes: Mapping[str, Sequence[Any]], dtype: str, unit: VectorUnit
) -> WindowPlan:
    """shapes: those of the operands; only the last axis of query and value is looked at."""
    geometry, heads = spec.geometry, spec.num_heads
    value_dim = int(shapes["value"][-1]) // heads
    vectors, key_rows = _logit_block(geometry.tokens_per_window, unit)
    value_lanes, value_vectors = _value_block(value_dim, unit)
    query_rows = _output_rows(geometry.tokens_per_window, vectors * unit.lanes, unit.accumulators // value_vectors)
    return WindowPlan(
        geometry=geometry,
        num_heads=heads,
        head_dim=int(shapes["query"][-1]) // heads,
        value_dim=value_dim,
        scale=spec.scale * LOG2_E,
        mask_value=None if spec.mask_value is None else spec.mask_value * LOG2_E,
        dtype=dtype,
        lanes=unit.lanes,
        vectors=vectors,
        key_rows=key_rows,
        value_lanes=value_lanes,
        value_vectors=value_vectors,
        query_rows=query_rows,
        windows_per_task=max(1, min(_MAX_WINDOWS_PER_TASK, heads * geometry.num_windows // _MIN_TASKS)),
    )


def _value_block(value_dim: int, unit: VectorUnit) -> tuple[int, int]:
    """(lanes, vectors) of a register block of channels: at most four vectors, as even as the channels allow."""
    lanes = min(unit.lanes, max(4, 1 << (value_dim - 1).bit_length()))
    vectors = -(-value_dim // lanes)
    blocks = -(-vectors // 4)
    return lanes, -(-vectors // blocks)


def _logit_block(tokens: int, unit: VectorUnit) -> tuple[int, int]:
    """(vectors of queries, keys) of the register block that wastes least on padding, loads and gathering anew."""

    def cost(vectors: int, key_rows: int) -> float:
        tile = vectors * unit.lanes
        products = ceil_to_multiple(tokens, tile) * ceil_to_multiple(tokens, key_rows)
        loads_per_product = 1 / vectors + 1 / key_rows
        # Two products start per cycle and take four: fewer than 8 sums would wait for each other.
        exposed_latency = max(0, 8 - vectors * key_rows) / 8
        # Every tile gathers all keys and values.
        gathered = 2 * tokens * -(-tokens // tile)
        return products * (1 + 0.25 * loads_per_product + exposed_latency) + gathered

    # The registers that the sums leave free hold the vectors of queries and one broadcast key.
    free = unit.accumulators // 3 - 1
    blocks = [(v, k) for v in range(1, 7) for k in range(1, unit.accumulators // v + 1) if v <= free]
    return min(blocks, key=lambda block: cost(*block))


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
