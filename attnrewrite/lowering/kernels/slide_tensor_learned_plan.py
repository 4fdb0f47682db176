"""How the tensor-core kernel of SlideAttention with learned shift kernels divides its work, and what it takes.

Letters: d and dv head_dim of query/key and of value, K slots of a neighbourhood, as many taps of each slot's kernel.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.target import Target

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.lowering.kernels.gpu_builder import Limits, TileShape, ceil_div
from attnrewrite.lowering.kernels.slide_gpu_plan import Reach, Work
from attnrewrite.lowering.kernels.tensor_core import COLUMNS, ELEMENT_BYTES, WARP, has_tensor_cores

# Rows of queries that a warp has. Rows 2 i and 2 i + 1 make a fragment; what is read for one of them serves the others.
ROWS = 4
FRAGMENTS = ROWS // 2

# Lanes of a warp that share a pixel: each has a quarter of its channels.
QUARTERS = 4
MAX_WARPS = 8

# With more slots than this, logits take too many registers.
MAX_SLOTS = 32
# Channels that are staged at a time: the most that one lane reads of a pixel at once, times four; or half as many.
CHUNKS = (32, 16)

# Instructions of a thread: for a query, per tap and channel; for an element of a map, and of a kernel, that is staged.
PER_PRODUCT, PER_STAGED, PER_PARAMETER = 1.5, 1.3, 3.0

# The least power of two near a scale that queries are multiplied by: the least normal number of float16.
LEAST_SCALE = 2.0**-14

# Images that a threadgroup goes through with the same kernels.
MAX_RUN = 4

OPERANDS = frozenset({"query", "key", "value", "bias", "key_kernel", "key_bias", "value_kernel", "value_bias"})


@dataclass(frozen=True)
class Table:
    """Parameters of one chunk of channels in shared memory. copies: 1 where all heads have the same. slots: of a head.

    rows: of a slot. After the last slot, zeros stand for all that fill up a fragment.
    """

    copies: int
    slots: int
    rows: int
    chunk: int

    @property
    def rows_of_copy(self) -> int:
        return (self.slots + 1) * self.rows

    @property
    def tile(self) -> TileShape:
        """As both numbers of rows are odd, so is that of 16-byte words from slot to slot: `ldmatrix` meets no bank
        twice.
        """
        return TileShape(self.copies * self.rows_of_copy, self.chunk, "float16")

    @property
    def elements(self) -> int:
        return self.tile.size_bytes // ELEMENT_BYTES


@dataclass(frozen=True)
class Parameters:
    """What an op learned for key or value. channels: of a head. kernel_rows, bias_rows: the channels, of one head or of
    all, that kernels and biases are given for; 0: there are none.
    """

    channels: int
    kernel_rows: int
    bias_rows: int


@dataclass(frozen=True)
class LearnedTiling:
    """How one threadgroup divides its work. A warp has ROWS x 8 queries of one head.

    reaches: along both axes. heads: of a threadgroup. slots: K. key, value: their parameters. chunk: channels of a head
    that are staged at a time. resident: whether all parameters stay in shared memory, or one chunk's at a time.
    """

    reaches: tuple[Reach, Reach]
    heads: int
    slots: int
    key: Parameters
    value: Parameters
    chunk: int
    resident: bool

    @property
    def warps(self) -> tuple[int, int, int]:
        """By head, band of rows, and group of eight columns."""
        rows, columns = (reach.tile for reach in self.reaches)
        return self.heads, rows // ROWS, columns // COLUMNS

    @property
    def threads(self) -> tuple[int, int]:
        return WARP, math.prod(self.warps)

    @property
    def slot_tiles(self) -> int:
        """Products of fragments that make a query's logits."""
        return ceil_div(self.slots, COLUMNS)

    @property
    def words(self) -> int:
        """What a lane reads of a pixel: pairs of channels."""
        return self.chunk // QUARTERS // 2

    @property
    def halo(self) -> tuple[int, int]:
        return self.reaches[0].halo, self.reaches[1].halo

    @property
    def plane(self) -> int:
        """Elements from a quarter of the channels to the next: 8 banks apart, so that four lanes meet none twice."""
        elements = math.prod(self.halo) * self.chunk // QUARTERS
        return ceil_div(elements - 16, 64) * 64 + 16

    @property
    def map_elements(self) -> int:
        """Of a chunk of key or value."""
        return self.heads * QUARTERS * self.plane

    def chunks(self, own: Parameters) -> int:
        return ceil_div(own.channels, self.chunk)

    def kernels(self, own: Parameters) -> Table:
        """Where there are none, those that only move the map are in their place."""
        return Table(self._copies(own, own.kernel_rows), self.slots, self.slots, self.chunk)

    def biases(self, own: Parameters) -> Table | None:
        return Table(self._copies(own, own.bias_rows), self.slots, 1, self.chunk) if own.bias_rows else None

    def _copies(self, own: Parameters, rows: int) -> int:
        return 1 if rows in (0, own.channels) else self.heads

    def parameter_elements(self, own: Parameters) -> int:
        """Of one chunk."""
        biases = self.biases(own)
        return self.kernels(own).elements + (0 if biases is None else biases.elements)

    @property
    def shared_elements(self) -> int:
        own = [self.parameter_elements(p) for p in (self.key, self.value)]
        if not self.resident:
            return self.map_elements + max(own)
        chunks = [self.chunks(p) for p in (self.key, self.value)]
        return self.map_elements + sum(e * c for e, c in zip(own, chunks, strict=True))

    def cost(self) -> float:
        """Instructions of all threadgroups for one head of one image."""
        tiles = math.prod(reach.tiles for reach in self.reaches)
        channels = self.chunk * (self.chunks(self.key) + self.chunks(self.value))
        queries = math.prod(reach.tile for reach in self.reaches) * self.slots * PER_PRODUCT
        parameters = self.slots**2 * PER_PARAMETER * self.kernels(self.key).copies / self.heads
        return tiles * channels * (queries + math.prod(self.halo) * PER_STAGED + parameters)


@functools.cache
def choose_tiling(work: Work, key: Parameters, value: Parameters, heads: int, limits: Limits) -> LearnedTiling | None:
    """The least cost, then the fewest warps; None where nothing fits. heads: of the op."""
    fitting = [t for t in _tilings(work, key, value, heads) if t.shared_elements * ELEMENT_BYTES <= limits.shared_bytes]
    return min(fitting, key=lambda t: (t.cost(), math.prod(t.warps), not t.resident), default=None)


def _tilings(work: Work, key: Parameters, value: Parameters, heads: int) -> Iterator[LearnedTiling]:
    height, width = work.geometry.feature_size
    bands = range(1, min(MAX_WARPS, ceil_div(height, ROWS)) + 1)
    groups = range(1, min(MAX_WARPS, ceil_div(width, COLUMNS)) + 1)
    for band, group, own in itertools.product(bands, groups, range(1, MAX_WARPS + 1)):
        if band * group * own > MAX_WARPS or heads % own:
            continue
        reaches = (Reach.of(work, 0, band * ROWS), Reach.of(work, 1, group * COLUMNS))
        for chunk, resident in itertools.product(CHUNKS, (True, False)):
            yield LearnedTiling(reaches, own, work.geometry.keys_per_query, key, value, chunk, resident)


def tiling_of(spec: SlideAttention, shapes: Mapping[str, Sequence[Any]], limits: Limits) -> LearnedTiling | None:
    """The tiling of an op; shapes of its operands by name."""
    key, value = (_parameters(spec, shapes, name) for name in ("key", "value"))
    work = Work(spec.geometry, key.channels, value.channels, ELEMENT_BYTES)
    return choose_tiling(work, key, value, spec.num_heads, limits)


def _parameters(spec: SlideAttention, shapes: Mapping[str, Sequence[Any]], name: str) -> Parameters:
    rows = (int(shapes.get(f"{name}_{kind}", (0,))[0]) for kind in ("kernel", "bias"))
    return Parameters(int(shapes[name][1]) // spec.num_heads, *rows)


def takes(spec: SlideAttention, shapes: Mapping[str, Sequence[Any]], dtype: str, target: Target) -> bool:
    """Whether the tensor-core kernel computes this op; else `slide_gpu` does.

    It does for float16 from sm_75 on, and bfloat16 from sm_80 on; maps of two axes; key or value moved by kernels of at
    most 32 slots; scales of either sign that are neither tiny nor infinite.
    """
    if not (OPERANDS.issuperset(shapes) and {"key_kernel", "value_kernel"} & set(shapes)):
        return False
    geometry = spec.geometry
    if not (has_tensor_cores(target, dtype) and geometry.is_plain and geometry.border == "zero"):
        return False
    if len(geometry.feature_size) != 2 or geometry.keys_per_query > MAX_SLOTS:
        return False
    if not LEAST_SCALE <= abs(spec.scale) < math.inf:
        return False
    return tiling_of(spec, shapes, Limits.of(target)) is not None


def choose_run(tiling: LearnedTiling, heads: int, batch: int | None, limits: Limits) -> int:
    """Images that a threadgroup goes through one after the other. batch: None where it is not known."""
    if not tiling.resident:
        return 1
    threadgroups = math.prod(reach.tiles for reach in tiling.reaches) * heads // tiling.heads * (batch or 1)
    return limits.run(threadgroups, MAX_RUN)
