"""SlideAttention for CUDA and Metal: one threadgroup per head and tile of pixels, one thread per pixel.

Key and value of the tile and its halo are staged in shared memory a few channels at a time, so every element is read
from device memory about once and never expanded k^2 times. A thread keeps the logits of its pixel in registers. Where
the neighbourhood has more slots than fit there, it goes through them in groups with a running softmax; where the halo
of a single channel does not fit into shared memory (huge dilations), taps are read from device memory directly, still
coalesced along the last axis.

Letters: K slots of the neighbourhood, nH heads, d and dv head_dim of query/key and of value; a tap is a neighbour's
offset, and with learned shift kernels every slot mixes all K taps.
Source of the running softmax: Dao et al., "FlashAttention", https://arxiv.org/abs/2205.14135, algorithm 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import DataType, tirx
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.localattention.geometry import NeighborhoodGeometry, Sizes
from attnrewrite.lowering.kernels.gpu_builder import (
    ACCUMULATOR,
    LOWEST,
    Expr,
    Frame,
    KernelBuilder,
    Limits,
    barrier,
    ceil_div,
    choose,
    every,
    fill,
    load,
    registers,
    spread,
    store,
    unflatten,
    when,
)

THREADS = 128
MAX_SLOTS_IN_REGISTERS = 64
CARRIED_CHANNELS = 32
UNROLLED_TAPS = 9
STAGED_BYTES = 16384  # per threadgroup: leaves room for others on the same core


@dataclass(frozen=True)
class SlideTiling:
    """How threadgroups divide map, slots and channels.

    tile: pixels per spatial axis of a threadgroup, one thread each. halo: the same with the neighbourhood around it.
    staged_channels: of key or value at a time; 0 where taps are read from device memory.
    slot_groups: half-open ranges of slots whose logits are held together. value_block: channels of a head's value that
    one threadgroup computes.
    """

    tile: Sizes
    halo: Sizes
    staged_channels: int
    slot_groups: tuple[range, ...]
    value_block: int

    def staged_bytes(self, operand_bytes: int) -> int:
        return self.staged_channels * math.prod(self.halo) * operand_bytes


def choose_tiling(
    geometry: NeighborhoodGeometry, head_dim: int, value_dim: int, operand_bytes: int, limits: Limits
) -> SlideTiling:
    """The tile with the least pixels computed and staged in vain, and as many channels at a time as fit."""
    extents, slots = geometry.feature_size, geometry.keys_per_query

    def halo_of(tile: Sizes) -> Sizes:
        reach = zip(tile, geometry.kernel_size, geometry.dilation, strict=True)
        return tuple(t + (k - 1) * d for t, k, d in reach)

    def cost(tile: Sizes) -> float:
        tiles = math.prod(ceil_div(e, t) for e, t in zip(extents, tile, strict=True))
        narrow = 16 / min(tile[-1], 16)  # short rows make short, uncoalesced reads
        return tiles * (math.prod(tile) * slots + 2 * narrow * math.prod(halo_of(tile)))

    powers = [2**p for p in range(THREADS.bit_length())]
    tiles = [t for t in itertools.product(powers, repeat=len(extents)) if math.prod(t) == THREADS]
    tile = min(tiles, key=cost)
    halo = halo_of(tile)

    num_groups = ceil_div(slots, MAX_SLOTS_IN_REGISTERS)
    group = ceil_div(slots, num_groups)
    groups = tuple(range(s, min(s + group, slots)) for s in range(0, slots, group))
    # Sums are carried from group to group in shared memory; with one group they are written as they come.
    value_block = value_dim if num_groups == 1 else _largest_divisor(value_dim, CARRIED_CHANNELS)
    carried_bytes = 0 if num_groups == 1 else value_block * THREADS * 4
    one_channel = math.prod(halo) * operand_bytes
    if one_channel > limits.shared_bytes - carried_bytes:
        return SlideTiling(tile, halo, 0, groups, value_block)
    at_most = max(1, min(STAGED_BYTES, limits.shared_bytes - carried_bytes) // one_channel)
    staged = _largest_divisor(math.gcd(head_dim, value_block), at_most)
    return SlideTiling(tile, halo, staged, groups, value_block)


def _largest_divisor(value: int, at_most: int) -> int:
    return next(d for d in range(min(value, at_most), 0, -1) if value % d == 0)


Taps = Callable[[Expr, Sequence[Expr | int]], Expr]
"""(channel within the chunk, tap coordinates within the kernel) -> float32 value of that neighbour, 0 off the map."""


class _SlideKernel:
    """Emits the statements of one kernel; open only inside its frame."""

    def __init__(self, spec: SlideAttention, frame: Frame, tiling: SlideTiling, head_dim: int, value_dim: int) -> None:
        self.spec, self.frame, self.tiling = spec, frame, tiling
        self.geometry = spec.geometry
        self.head_dim, self.value_dim = head_dim, value_dim
        blocks = value_dim // tiling.value_block
        self.head = frame.y if blocks == 1 else frame.y // blocks
        self.first_value = 0 if blocks == 1 else frame.y % blocks * tiling.value_block
        extents = self.geometry.feature_size
        tile_counts = [ceil_div(e, t) for e, t in zip(extents, tiling.tile, strict=True)]
        self.tile_start = [T.bind(at * t) for at, t in zip(unflatten(frame.x, tile_counts), tiling.tile, strict=True)]
        self.thread_at = [T.bind(at) for at in unflatten(frame.thread, tiling.tile)]
        self.pixel = [T.bind(s + t) for s, t in zip(self.tile_start, self.thread_at, strict=True)]
        bounds = zip(self.pixel, extents, tiling.tile, strict=True)
        self.on_map = every([True if e % t == 0 else p < e for p, e, t in bounds])

        self.logits = registers(max(map(len, tiling.slot_groups)))
        self.maximum, self.total, self.rescale, self.factor, self.sum = (registers(1) for _ in range(5))
        if len(tiling.slot_groups) > 1:
            self.carried = T.alloc_buffer((tiling.value_block * THREADS,), ACCUMULATOR, scope="shared")
        if tiling.staged_channels:
            staged_count = tiling.staged_channels * math.prod(tiling.halo)
            self.staged = T.alloc_buffer((staged_count,), frame.output.dtype, scope="shared")

    def emit(self) -> None:
        groups = self.tiling.slot_groups
        store(self.maximum, [0], tirx.const(LOWEST, ACCUMULATOR))
        store(self.total, [0], tirx.const(0.0, ACCUMULATOR))
        for slots in groups:
            self.compute_logits(slots)
            self.update_softmax(slots)
            self.add_weighted_values(slots, first=slots is groups[0], last=slots is groups[-1])

    # Operands.

    @contextmanager
    def staged_chunk(self, operand: str, first_channel: Expr) -> Iterator[Taps]:
        """The taps of the channels from `first_channel` (of all heads' channels) on; barriers before and after."""
        if not self.tiling.staged_channels:
            yield lambda channel, tap: self.read(operand, first_channel + channel, self.neighbour(tap))
            return
        volume = math.prod(self.tiling.halo)
        with spread(self.frame, self.tiling.staged_channels * volume) as index:
            at = unflatten(index, [self.tiling.staged_channels, *self.tiling.halo])
            reach = [k // 2 * d for k, d in zip(self.geometry.kernel_size, self.geometry.dilation, strict=True)]
            pixel = [s + a - r for s, a, r in zip(self.tile_start, at[1:], reach, strict=True)]
            value = self.guarded(operand, first_channel + at[0], pixel)
            T.buffer_store(self.staged, value, [index])
        barrier()

        def staged_tap(channel: Expr, tap: Sequence[Expr | int]) -> Expr:
            flat: Expr = channel
            for at, t, dilation, extent in zip(
                self.thread_at, tap, self.geometry.dilation, self.tiling.halo, strict=True
            ):
                flat = flat * extent + (at + t * dilation)
            return load(self.staged, [flat]).astype(ACCUMULATOR)

        yield staged_tap
        barrier()

    def neighbour(self, tap: Sequence[Expr | int]) -> list[Expr]:
        axes = zip(self.pixel, tap, self.geometry.kernel_size, self.geometry.dilation, strict=True)
        return [p + (t - k // 2) * d for p, t, k, d in axes]

    def guarded(self, operand: str, channel: Expr, pixel: list[Expr]) -> Expr:
        """The operand's element, in its own type; 0 off the map."""
        buffer = self.frame.operands[operand]
        inside = tirx.all(*[tirx.all(p >= 0, p < e) for p, e in zip(pixel, self.geometry.feature_size, strict=True)])
        return choose(inside, load(buffer, [self.frame.z, channel, *pixel]), tirx.const(0.0, buffer.dtype))

    def read(self, operand: str, channel: Expr, pixel: list[Expr]) -> Expr:
        return self.guarded(operand, channel, pixel).astype(ACCUMULATOR)

    def parameter(self, operand: str, channel: Expr, *index: Expr | int) -> Expr:
        """An element of a [R, ...] parameter in the row of a channel, which is counted over all heads."""
        buffer = self.frame.operands[operand]
        rows = buffer.shape[0].value
        return load(buffer, [channel % rows, *index]).astype(ACCUMULATOR)

    @contextmanager
    def every_tap(self) -> Iterator[list[Sequence[Expr | int]]]:
        """Coordinates of all taps: a Python list for small kernels, otherwise one tap inside a loop of the kernel."""
        sizes = self.geometry.kernel_size
        if math.prod(sizes) <= UNROLLED_TAPS:
            yield list(itertools.product(*map(range, sizes)))
            return
        with T.serial(math.prod(sizes)) as tap:
            yield [unflatten(tap, sizes)]

    def slot_taps(self, slots: range) -> list[tuple[int, ...]]:
        """Without learned kernels, slot j is tap j."""
        return list(itertools.product(*map(range, self.geometry.kernel_size)))[slots.start : slots.stop]

    # The three steps.

    def compute_logits(self, slots: range) -> None:
        """logits[j] = scale * query . key_j + bias, for the slots of one group."""
        operands, group = self.frame.operands, range(len(slots))
        fill(self.logits, len(slots), 0.0)
        step = self.tiling.staged_channels or self.head_dim
        with T.serial(self.head_dim // step) as chunk:
            first = self.head * self.head_dim + chunk * step
            with self.staged_chunk("key", first) as tap_of, T.serial(step) as channel:
                row = first + channel
                own = load(operands["query"], [self.frame.z, row, *self.pixel])
                zero = tirx.const(0.0, operands["query"].dtype)
                query = T.bind(choose(self.on_map, own, zero).astype(ACCUMULATOR))
                if "key_kernel" in operands:
                    with self.every_tap() as taps:
                        for tap in taps:
                            product = T.bind(query * tap_of(channel, tap))
                            for j in group:
                                self.add_logit(j, product * self.parameter("key_kernel", row, slots[j], *tap))
                else:
                    for j, tap in zip(group, self.slot_taps(slots), strict=True):
                        self.add_logit(j, query * tap_of(channel, tap))
                if "key_bias" in operands:
                    for j in group:
                        self.add_logit(j, query * self.parameter("key_bias", row, slots[j]))
        for j in group:
            logit = self.logits[j] * tirx.const(self.spec.scale, ACCUMULATOR)
            if "bias" in operands:
                logit = logit + load(operands["bias"], [self.head, slots[j]]).astype(ACCUMULATOR)
            store(self.logits, [j], logit)

    def add_logit(self, slot: int, value: Expr) -> None:
        store(self.logits, [slot], self.logits[slot] + value)

    def update_softmax(self, slots: range) -> None:
        """Turns logits into weights relative to the running maximum, and rescales what was summed before."""
        store(self.rescale, [0], self.maximum[0])
        for j in range(len(slots)):
            store(self.maximum, [0], tirx.max(self.maximum[0], self.logits[j]))
        store(self.rescale, [0], tirx.exp(self.rescale[0] - self.maximum[0]))
        store(self.total, [0], self.total[0] * self.rescale[0])
        for j in range(len(slots)):
            store(self.logits, [j], tirx.exp(self.logits[j] - self.maximum[0]))
            store(self.total, [0], self.total[0] + self.logits[j])

    def add_weighted_values(self, slots: range, first: bool, last: bool) -> None:
        """Every channel of the block in turn: its sum over these slots, on top of that over the groups before."""
        block = self.tiling.value_block
        step = self.tiling.staged_channels or block
        with T.serial(block // step) as chunk:
            first_row = self.head * self.value_dim + self.first_value + chunk * step
            with self.staged_chunk("value", first_row) as tap_of, T.serial(step) as channel:
                carried_at = (chunk * step + channel) * THREADS + self.frame.thread
                before = tirx.const(0.0, ACCUMULATOR) if first else load(self.carried, [carried_at]) * self.rescale[0]
                store(self.sum, [0], before)
                self.add_weighted_value(slots, first_row + channel, channel, tap_of)
                if last:
                    self.write(first_row + channel, self.sum[0])
                else:
                    store(self.carried, [carried_at], self.sum[0])

    def add_weighted_value(self, slots: range, row: Expr, channel: Expr, tap_of: Taps) -> None:
        """sum += sum over the slots of weight * value_j, for the channel `row` counted over all heads."""
        operands, group = self.frame.operands, range(len(slots))
        if "value_kernel" in operands:
            with self.every_tap() as taps:
                for tap in taps:
                    store(self.factor, [0], tirx.const(0.0, ACCUMULATOR))
                    for j in group:
                        weight = self.logits[j] * self.parameter("value_kernel", row, slots[j], *tap)
                        store(self.factor, [0], self.factor[0] + weight)
                    store(self.sum, [0], self.sum[0] + self.factor[0] * tap_of(channel, tap))
        else:
            for j, tap in zip(group, self.slot_taps(slots), strict=True):
                store(self.sum, [0], self.sum[0] + self.logits[j] * tap_of(channel, tap))
        if "value_bias" in operands:
            for j in group:
                bias = self.parameter("value_bias", row, slots[j])
                store(self.sum, [0], self.sum[0] + self.logits[j] * bias)

    def write(self, row: Expr, result: Expr) -> None:
        """The output of one channel, counted over all heads."""
        frame = self.frame
        with when(self.on_map):
            value = (result / self.total[0]).astype(frame.output.dtype)
            store(frame.output, [frame.z, row, *self.pixel], value)


def slide_attention(
    spec: SlideAttention,
    present: Sequence[str],
    shapes: Sequence[Sequence[Any]],
    dtype: str,
    target: Target,
    name: str,
) -> tirx.PrimFunc:
    """The kernel as a scheduled PrimFunc; parameters are the present operands in the op's order, then the output.

    present: names of the operands given. shapes: theirs, the batch an int or a symbolic variable (one variable of the
    kernel's own then stands for it, matched from the query). dtype: float32 or float16, of all operands and the output;
    logits, softmax and sums are float32 whatever spec.softmax_dtype says, which is never less exact.
    """
    by_name = dict(zip(present, shapes, strict=True))
    head_dim, value_dim = (int(by_name[operand][1]) // spec.num_heads for operand in ("query", "value"))
    geometry = spec.geometry
    tiling = choose_tiling(geometry, head_dim, value_dim, DataType(dtype).itemsize, Limits.of(target))
    tiles = math.prod(ceil_div(e, t) for e, t in zip(geometry.feature_size, tiling.tile, strict=True))

    def grid(batch: Expr) -> tuple[Expr, Expr, Expr]:
        return tiles, spec.num_heads * (value_dim // tiling.value_block), batch

    threads = (tiling.tile[-1], math.prod(tiling.tile[:-1]))
    builder = KernelBuilder()
    output_shape = [spec.num_heads * value_dim, *geometry.feature_size]
    with builder.kernel(name, present, shapes, output_shape, dtype, grid, threads) as frame:
        _SlideKernel(spec, frame, tiling, head_dim, value_dim).emit()
    return builder.prim_func()
