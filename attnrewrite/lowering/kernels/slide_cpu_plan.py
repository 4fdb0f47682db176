"""How the slide kernel for CPUs is cut: tiles, register blocks, strips; and where its taps lie. No loops here."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.localattention.geometry import Sizes, ceil_to_multiple
from attnrewrite.lowering.kernels.vector_math import LOG2_E, VectorUnit

# Rows of one tile at most: more would only lengthen the code.
_MAX_ROWS = 4
# The strip of a task is at least this many times as high as its halo, which neighbouring strips copy again.
_STRIP_PER_HALO = 4
# A wider map is cut, so that the memory of a thread stays bounded.
_WIDEST_STRIP = 256


@dataclass(frozen=True)
class SlidePlan:
    """Sizes of one kernel; scale carries the factor log2(e).

    The spatial sizes have one entry per axis: at least two (rows and columns), of extent 1 where the map, of map_axes
    axes, has fewer. A tile is `rows` rows by `lanes` columns; a strip is strip_tiles tiles high, strip_columns columns
    wide. The register block of the logits is rows by scored_rows kernel rows, that of the output rows by `channels`.
    """

    map_axes: int
    feature_size: Sizes
    kernel_size: Sizes
    dilation: Sizes
    num_heads: int
    head_dim: int
    value_dim: int
    scale: float
    dtype: str
    lanes: int
    rows: int
    scored_rows: int
    channels: int
    strip_tiles: int
    strip_columns: int

    @property
    def height(self) -> int:
        return self.feature_size[-2]

    @property
    def width(self) -> int:
        return self.feature_size[-1]

    @property
    def planes(self) -> int:
        return math.prod(self.feature_size[:-2])

    @property
    def kernel_planes(self) -> int:
        return math.prod(self.kernel_size[:-2])

    @property
    def kernel_rows(self) -> int:
        return self.kernel_size[-2]

    @property
    def kernel_columns(self) -> int:
        return self.kernel_size[-1]

    @property
    def slots(self) -> int:
        return math.prod(self.kernel_size)

    @property
    def row_step(self) -> int:
        return self.dilation[-2]

    @property
    def column_step(self) -> int:
        return self.dilation[-1]

    @property
    def row_border(self) -> int:
        return self.kernel_rows // 2 * self.row_step

    @property
    def column_border(self) -> int:
        return self.kernel_columns // 2 * self.column_step

    @property
    def stored_lanes(self) -> int:
        """Columns of a tile that are pixels of the map."""
        return min(self.lanes, self.width)

    @property
    def column_tiles(self) -> int:
        return -(-self.strip_columns // self.lanes)

    @property
    def strip_rows(self) -> int:
        return self.strip_tiles * self.rows

    @property
    def strips_down(self) -> int:
        return -(-self.height // self.strip_rows)

    @property
    def strips_across(self) -> int:
        return -(-self.width // self.strip_columns)

    @property
    def strips(self) -> int:
        return self.strips_down * self.strips_across

    @property
    def copied_rows(self) -> int:
        return self.strip_rows + 2 * self.row_border

    @property
    def copied_columns(self) -> int:
        return self.strip_columns + 2 * self.column_border

    def strip_origin(self, strip: Expr) -> tuple[Expr, Expr]:
        """First (row, column) of a strip; the last one across overlaps the one before it."""
        across = strip % self.strips_across
        column = T.min(across * self.strip_columns, max(self.width - self.strip_columns, 0))
        return strip // self.strips_across * self.strip_rows, column

    def columns_in_map(self, first_column: Expr) -> tuple[Expr, Expr]:
        """[first, end) of the columns a strip copies from the map; the others of its copy are border."""
        first = T.max(first_column - self.column_border, 0)
        return first, T.min(first_column + self.strip_columns + self.column_border, self.width)

    def first_column(self, tile: Expr) -> Expr:
        """Column of the strip the tile starts at; the last tile overlaps the one before it."""
        return T.min(tile * self.lanes, self.strip_columns - self.lanes)

    def first_row(self, tile: Expr) -> Expr:
        """Row of the strip the tile starts at; its other rows follow row_step apart."""
        span = self.rows * self.row_step
        return tile // self.row_step * span + tile % self.row_step

    def neighbour_plane(self, plane: Expr, slot: Expr) -> tuple[Expr, Expr]:
        """(plane that a kernel plane reads, whether it is a plane of the map)."""
        flat: Expr = T.int32(0)
        inside: Expr = T.bool(True)
        for axis, (extent, kernel, step) in enumerate(
            zip(self.feature_size[:-2], self.kernel_size[:-2], self.dilation[:-2], strict=True)
        ):
            position = plane // math.prod(self.feature_size[axis + 1 : -2]) % extent
            tap = slot // math.prod(self.kernel_size[axis + 1 : -2]) % kernel
            position = position + (tap - kernel // 2) * step
            inside = T.And(inside, T.And(position >= 0, position < extent))
            flat = flat * extent + position
        return flat, inside

    def tap(self, slot: Expr, kernel_row: Expr, kernel_column: Expr) -> list[Expr]:
        """Index of a tap along the axes that the map has."""
        kernel_planes = self.kernel_size[:-2]
        leading = [slot // math.prod(kernel_planes[axis + 1 :]) % kernel for axis, kernel in enumerate(kernel_planes)]
        return [*leading, kernel_row, kernel_column][-self.map_axes :]


def plan_slide(
    spec: SlideAttention, present: Collection[str], shapes: Mapping[str, Sequence[Any]], dtype: str, unit: VectorUnit
) -> SlidePlan:
    """shapes: those of the operands; only the channel axis of query and value is looked at."""
    geometry = spec.geometry
    missing = max(0, 2 - len(geometry.feature_size))
    feature_size = (1,) * missing + geometry.feature_size
    kernel_size = (1,) * missing + geometry.kernel_size
    dilation = (1,) * missing + geometry.dilation
    value_dim = int(shapes["value"][1]) // spec.num_heads

    lanes = min(unit.lanes, max(4, 1 << (feature_size[-1] - 1).bit_length()))
    # Rows of a tile are a dilation apart, and there are only so many in the map.
    rows = min(_MAX_ROWS, -(-feature_size[-2] // dilation[-2]))
    if "key_kernel" in present or "value_kernel" in present:
        # A learned kernel sums kernel_columns slots for every row, and their weighted sum.
        rows = max(1, min(rows, unit.accumulators // (kernel_size[-1] + 1)))
    blocks = -(-kernel_size[-2] * rows // unit.accumulators)
    scored_rows = -(-kernel_size[-2] // blocks)
    channels = max(1, min(value_dim, 16 // rows, unit.accumulators // rows))
    # Tiles of a strip come in groups of row_step, which interleave to cover row_step * rows rows without a gap.
    group = rows * dilation[-2]
    halo = (kernel_size[-2] - 1) * dilation[-2]
    groups = min(max(1, _STRIP_PER_HALO * halo // group), -(-feature_size[-2] // group))
    return SlidePlan(
        map_axes=len(geometry.feature_size),
        feature_size=feature_size,
        kernel_size=kernel_size,
        dilation=dilation,
        num_heads=spec.num_heads,
        head_dim=int(shapes["query"][1]) // spec.num_heads,
        value_dim=value_dim,
        scale=spec.scale * LOG2_E,
        dtype=dtype,
        lanes=lanes,
        rows=rows,
        scored_rows=scored_rows,
        channels=channels,
        strip_tiles=groups * dilation[-2],
        strip_columns=_strip_columns(feature_size[-1], lanes, kernel_size[-1] // 2 * dilation[-1]),
    )


def _strip_columns(width: int, lanes: int, border: int) -> int:
    """Columns of a strip: the whole map, or a cut of a wide one that computes the fewest columns twice."""
    widest = max(_WIDEST_STRIP, 8 * border)
    if width <= widest:
        return max(width, lanes)
    cuts = range(-(-width // widest), -(-2 * width // widest) + 1)
    return min((ceil_to_multiple(-(-width // cut), lanes) for cut in cuts), key=lambda w: (-(-width // w) * w, -w))
