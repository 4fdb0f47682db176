"""How the GPU kernel of SlideAttention divides map, slots and channels among threadgroups and threads.

Source of the border "inward": Neighborhood Attention Transformer, https://arxiv.org/abs/2204.07143.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tvm import tirx

from attnrewrite.errors import CompilerError
from attnrewrite.localattention.geometry import NeighborhoodGeometry
from attnrewrite.localattention.geometry import Sizes as Extents
from attnrewrite.lowering.kernels.gpu_builder import Expr, Limits, ceil_div

CARRIED_CHANNELS = 32
INDICES = 56  # registers of a thread beside its logits
STAGED_ELEMENT = 4  # bytes: what is staged is float32 already, so that it is converted once and not once per slot

# Multiply-adds in the time of: a byte from device memory (window_gpu_plan.py), a load from shared memory, a barrier.
PER_BYTE, PER_LOAD, PER_BARRIER = 16, 4, 60

# Heads share a threadgroup while parameters are more than this part of what it reads and writes.
PARAMETER_READS = 0.25

# Borders at which a neighbour is read elsewhere than it stands: not where its neighbours in memory are.
_FOLDED = ("replicate", "reflect", "wrap")


@dataclass(frozen=True)
class Reach:
    """One axis: where the neighbourhood of a query lies, and which part of the key map a tile of queries needs.

    tile: queries. lanes: pixels that are staged at once, 1 on all axes but the last. upsampling: so many queries, one
    after the other, have the same neighbourhood, and stride is that from one to the next.
    """

    extent: int
    kernel: int
    dilation: int
    stride: int
    offset: int
    border: str
    key_extent: int
    tile: int
    lanes: int = 1
    upsampling: int = 1

    @classmethod
    def of(cls, work: Work, axis: int, tile: int) -> Reach:
        """The widest loads that the borders and extents allow, on the last axis."""
        geometry, lanes = work.geometry, 1
        kernel, dilation, stride = (s[axis] for s in (geometry.kernel_size, geometry.dilation, geometry.stride))
        border, key_extent = geometry.borders[axis], geometry.key_size[axis]
        upsampling = work.upsampling[axis] if work.upsampling else 1
        if axis == len(geometry.feature_size) - 1 and border not in _FOLDED and tile % upsampling == 0:
            lanes = math.gcd(key_extent, tile // upsampling * stride, 4)
        own = (geometry.feature_size[axis], kernel, dilation, stride, geometry.offset[axis], border)
        return cls(*own, key_extent, tile, lanes, upsampling)

    @property
    def front(self) -> int:
        """Pixels staged in vain before the first neighbour, so that what is staged starts at a multiple of lanes."""
        return self.offset % self.lanes

    @property
    def halo(self) -> int:
        """Pixels staged for a tile."""
        latest_start = self.upsampling - math.gcd(self.tile, self.upsampling)
        last = (latest_start + self.tile - 1) // self.upsampling
        needed = last * self.stride + (self.kernel - 1) * self.dilation + 1 + self.front
        if self.border == "inward":
            needed += self.dilation - 1  # it moves in steps of the dilation
        return ceil_div(needed, self.lanes) * self.lanes

    @property
    def tiles(self) -> int:
        return ceil_div(self.extent, self.tile)

    def staged_pixels(self) -> int:
        """Of all tiles, those on the map."""
        return sum(
            max(0, min(first + self.halo, self.key_extent) - max(first, 0))
            for first in map(self._first_staged, self._starts)
        )

    @property
    def _starts(self) -> Iterator[int]:
        return iter(range(0, self.extent, self.tile))

    def _first_staged(self, tile_start: int) -> int:
        first = tile_start // self.upsampling * self.stride + self.offset - self.front
        return max(0, min(first, self.key_extent - self.halo)) if self.border == "inward" else first

    # The same as index arithmetic.

    def first_staged(self, tile_start: Expr) -> Expr:
        """The pixel of the key map at which staging begins for the tile of queries from `tile_start` on."""
        first = tile_start // self.upsampling * self.stride + (self.offset - self.front)
        if self.border == "inward":
            return tirx.max(tirx.min(first, self.key_extent - self.halo), 0)
        return first

    def first_neighbour(self, query: Expr) -> Expr:
        """Where slot 0 of a query stands; the others follow `dilation` apart."""
        first = query // self.upsampling * self.stride + self.offset
        if self.border != "inward":
            return first
        group = tirx.floormod(first, self.dilation)  # the pixels a neighbourhood may move over: every step-th
        members = (self.key_extent - group + self.dilation - 1) // self.dilation
        moved = tirx.max(tirx.min(tirx.floordiv(first, self.dilation), members - self.kernel), 0)
        return group + moved * self.dilation

    def source(self, position: Expr) -> tuple[Expr, Expr | bool]:
        """The pixel that is read for a position, and whether there is one."""
        extent = self.key_extent
        match self.border:
            case "replicate":
                return tirx.max(tirx.min(position, extent - 1), 0), True
            case "wrap":
                return tirx.floormod(position, extent), True
            case "reflect":
                period = max(2 * (extent - 1), 1)
                folded = tirx.floormod(position, period)
                return (tirx.min(folded, period - folded) if extent > 1 else folded), True
        return position, tirx.all(position >= 0, position < extent)


@dataclass(frozen=True)
class Work:
    """The op a tiling is for. instances: heads times images, as far as known. parameter_floats: per channel of key and
    of value, of learned kernels and biases.

    Where the weights are predicted, head_dim is 0 and the queries are the pixels of the output. upsampling: per axis,
    how many of those in a row have one neighbourhood. at_once: the weights of all slots are needed together.

    alike: a threadgroup may take so many heads, which have the same parameters.
    """

    geometry: NeighborhoodGeometry
    head_dim: int
    value_dim: int
    bytes: int
    instances: int = 1
    parameter_floats: int = 0
    upsampling: Extents = ()
    at_once: bool = False
    alike: int = 1


@dataclass(frozen=True)
class SlideTiling:
    """reaches: per axis, with the tile of queries. rows: neighbouring queries along the last axis but one that a thread
    has. staged_channels: of key or value at a time; 0 where taps are read from device memory. slot_groups: half-open
    ranges of slots whose logits are held together. value_block: channels of a head's value that one threadgroup
    computes. parameters: whether learned kernels are staged. heads: of a threadgroup, each with threads of its own.
    """

    work: Work
    reaches: tuple[Reach, ...]
    rows: int
    staged_channels: int
    slot_groups: tuple[range, ...]
    value_block: int
    parameters: bool
    heads: int = 1

    @property
    def threads(self) -> Extents:
        """Of one head, per axis."""
        tile = [reach.tile for reach in self.reaches]
        if len(tile) > 1:
            tile[-2] //= self.rows
        return tuple(tile)

    @property
    def halo(self) -> Extents:
        return tuple(reach.halo for reach in self.reaches)

    @property
    def carried_floats(self) -> int:
        """Sums that wait for the next group of slots."""
        threads = self.heads * math.prod(self.threads)
        return self.value_block * threads * self.rows if len(self.slot_groups) > 1 else 0

    @property
    def parameter_floats(self) -> int:
        return self.work.parameter_floats * max(self.staged_channels, 1) if self.parameters else 0

    def fits_twice(self, limits: Limits) -> bool:
        """Whether the registers of a core, as far as known, are enough for two threadgroups: one computes while the
        other waits for what it stages.
        """
        threads = self.heads * ceil_div(math.prod(self.threads), 32) * 32
        own = self.rows * max(map(len, self.slot_groups)) + INDICES
        return not limits.registers or 2 * threads * own <= limits.registers

    def shared_floats(self) -> int:
        """Of staged channels, parameters, the bias of all slots, and carried sums; each aligned to words."""
        staged = self.heads * self.staged_channels * math.prod(self.halo)
        bias = self.heads * self.work.geometry.keys_per_query
        parts = (staged, self.parameter_floats, bias, self.carried_floats)
        return sum(ceil_div(part, 4) * 4 for part in parts)

    def requested_bytes(self) -> int:
        """What one head of one image asks device memory for, with its share of the parameters."""
        work = self.work
        pixels = math.prod(work.geometry.feature_size)
        blocks = work.value_dim // self.value_block
        staged = math.prod(r.staged_pixels() for r in self.reaches)
        once = staged if self.staged_channels else pixels * work.geometry.keys_per_query
        own = pixels * (work.head_dim * blocks + work.value_dim) + once * (work.head_dim * blocks + work.value_dim)
        return work.bytes * (own * len(self.slot_groups)) + self.parameter_bytes()

    def parameter_bytes(self) -> int:
        """The parameters' part of them."""
        work, groups = self.work, math.prod(r.tiles for r in self.reaches)
        channels = work.head_dim * (work.value_dim // self.value_block) + work.value_dim
        return work.bytes * work.parameter_floats * channels * groups // self.heads

    def estimate(self, limits: Limits) -> float:
        """Time of all heads and images in multiply-adds: of the rounds of threads, and of device memory."""
        work, geometry = self.work, self.work.geometry
        slots, threads = geometry.keys_per_query, self.heads * math.prod(self.threads)
        blocks = work.value_dim // self.value_block
        groups = math.prod(r.tiles for r in self.reaches) * work.instances * blocks // self.heads
        at_a_time = limits.in_flight * limits.threads
        rounds = max(1.0, groups * ceil_div(threads, 32) * 32 / at_a_time)
        if not limits.registers:
            # A GPU of few cores ends with a round that takes as long as a full one.
            rounds = math.ceil(rounds)
        column = geometry.kernel_size[-2] if len(self.reaches) > 1 else 1
        loads = slots // column * (column + self.rows - 1)
        arithmetic = slots * self.rows * (slots if work.parameter_floats > slots else 1)
        channels = work.head_dim + self.value_block
        barriers = 2 * channels / max(self.staged_channels, 1) * PER_BARRIER
        per_thread = channels * (arithmetic + PER_LOAD * (loads + work.parameter_floats)) + barriers
        return rounds * at_a_time * per_thread + PER_BYTE * self.requested_bytes() * work.instances


@functools.cache
def choose_tiling(work: Work, limits: Limits) -> SlideTiling:
    """The tiling with the least estimated time; taps are staged wherever some tile's halo fits.

    Raises CompilerError where no tile fits into threadgroup memory.
    """
    geometry = work.geometry
    slots, axes = geometry.keys_per_query, len(geometry.feature_size)
    sides = [sorted({*(2**p for p in range(9) if 2**p < e), min(e, 256)}) for e in geometry.feature_size]
    moves_rows = axes > 1 and (geometry.borders[-2] == "inward" or max(work.upsampling[-2:-1], default=1) > 1)
    candidates = []
    for rows in (1, 2, 4) if axes > 1 and not moves_rows else (1,):
        if rows > 1 and rows * slots > limits.held:
            continue
        for threads in itertools.product(*sides):
            if not 16 <= math.prod(threads) <= limits.threads and math.prod(geometry.feature_size) > 16:
                continue
            tile = list(threads)
            if axes > 1:
                tile[-2] *= rows
            for heads in (h for h in range(1, work.alike + 1) if work.alike % h == 0):
                tiling = _tiling(work, tuple(tile), rows, heads, limits)
                if tiling is None or heads * math.prod(threads) > limits.threads or not tiling.fits_twice(limits):
                    break
                candidates.append(tiling)
                if tiling.parameter_bytes() <= PARAMETER_READS * tiling.requested_bytes():
                    break
    if not candidates:
        sizes = f"a neighbourhood of {slots} pixels"
        raise CompilerError(f"no tile of {sizes} fits into {limits.shared_bytes} bytes of threadgroup memory")
    staged = [tiling for tiling in candidates if tiling.staged_channels]
    return min(staged or candidates, key=lambda tiling: tiling.estimate(limits))


def _tiling(work: Work, tile: Extents, rows: int, heads: int, limits: Limits) -> SlideTiling | None:
    geometry = work.geometry
    reaches = [Reach.of(work, axis, extent) for axis, extent in enumerate(tile)]
    slots = geometry.keys_per_query
    # With more slots than a thread holds logits, they come in groups.
    num_groups = 1 if work.at_once else ceil_div(slots, limits.held)
    group = ceil_div(slots, num_groups)
    groups = tuple(range(s, min(s + group, slots)) for s in range(0, slots, group))
    # Sums are carried from group to group in shared memory; with one group they are written as they come.
    block = work.value_dim if num_groups == 1 else _largest_divisor(work.value_dim, CARRIED_CHANNELS)
    divisors = [d for d in range(1, math.gcd(work.head_dim, block) + 1) if math.gcd(work.head_dim, block) % d == 0]
    for parameters in (work.parameter_floats > 0 and num_groups == 1, False):
        for staged in (*reversed(divisors), 0):
            tiling = SlideTiling(work, tuple(reaches), rows, staged, groups, block, parameters, heads)
            # Others on the same core have room, too.
            most = limits.shared_bytes if staged <= 1 or tiling.carried_floats else limits.shared_bytes // 2
            if tiling.shared_floats() * STAGED_ELEMENT <= most and (staged or not parameters):
                return tiling
    return None


def _largest_divisor(value: int, at_most: int) -> int:
    return next(d for d in range(min(value, at_most), 0, -1) if value % d == 0)
