"""SlideAttention for CUDA and Metal: one threadgroup per head and tile of queries, a column of them per thread.

Key and value of the tile and its halo are staged in shared memory a few channels at a time, in rows of up to 16 bytes
per load, so every element is read from device memory about once and never expanded k^2 times; learned kernels and
biases are staged with them. A thread keeps the logits of its queries, neighbours along the last axis but one, in
registers: what one of them reads is read for all of them. Where the neighbourhood has more slots than fit there, it
goes through them in groups with a running softmax; where the halo of a single channel does not fit into shared memory,
neighbours are read from device memory.

A tap is a position within the neighbourhood. Slot j of the op is tap j, or with learned kernels a weighted sum of taps.
slide_gpu_plan.py chooses the tiles, and knows where neighbours lie and what the borders make of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import DataType, tirx
from tvm.target import Target
from tvm.tirx.script.builder import ir as T

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.lowering.kernels.gpu_builder import (
    ACCUMULATOR,
    LOWEST,
    Expr,
    Flat,
    Frame,
    KernelBuilder,
    Limits,
    Operands,
    SharedMemory,
    barrier,
    ceil_div,
    choose,
    every,
    fill,
    load,
    registers,
    spread,
    store,
    typed,
    unflatten,
    when,
)
from attnrewrite.lowering.kernels.slide_gpu_plan import STAGED_ELEMENT, SlideTiling, Work, choose_tiling
from attnrewrite.lowering.kernels.tensor_core import exponential

UNROLLED_TAPS = 9

Tap = Sequence[Expr | int]
"""Coordinates of a tap within the kernel."""

Neighbour = Callable[[Expr, int, Tap], Expr]
"""(channel within the chunk, row, tap) -> float32: what query `row` of the thread has for a neighbour there."""

Parameter = Callable[[str, Expr, int, Expr | int], Expr]
"""(operand, channel within the chunk, slot within its group, tap's flat index) -> float32"""


class SlideKernel:
    """Emits the statements of one kernel; open only inside its frame."""

    def __init__(self, spec: SlideAttention, frame: Frame, tiling: SlideTiling, exp: Callable[[Expr], Expr]) -> None:
        self.spec, self.frame, self.tiling, self.exp = spec, frame, tiling, exp
        work, self.reaches, self.rows = tiling.work, tiling.reaches, range(tiling.rows)
        self.geometry = work.geometry
        self.head_dim, self.value_dim, self.image = work.head_dim, work.value_dim, frame.z
        blocks = self.value_dim // tiling.value_block
        within = unflatten(frame.thread, (tiling.heads, *tiling.threads))
        self.head_of_group: Expr = within[0] if tiling.heads > 1 else 0
        self.first_head = frame.y // blocks * tiling.heads
        self.head = T.bind(self.first_head + self.head_of_group)
        self.first_value = 0 if blocks == 1 else frame.y % blocks * tiling.value_block
        self.tile_start = [
            T.bind(at * r.tile)
            for at, r in zip(unflatten(frame.x, [r.tiles for r in self.reaches]), self.reaches, strict=True)
        ]
        within = within[1:] if tiling.heads > 1 else unflatten(frame.thread, tiling.threads)
        if len(within) > 1:
            within[-2] = within[-2] * tiling.rows
        self.query = [T.bind(s + t) for s, t in zip(self.tile_start, within, strict=True)]
        self.first = [T.bind(r.first_neighbour(q)) for r, q in zip(self.reaches, self.query, strict=True)]
        self.first_staged = [T.bind(r.first_staged(s)) for r, s in zip(self.reaches, self.tile_start, strict=True)]
        position = [f - s for f, s in zip(self.first, self.first_staged, strict=True)]
        staged = tiling.staged_channels * math.prod(tiling.halo)  # of one head
        self.staged_at = T.bind(self.head_of_group * staged + flatten(position, tiling.halo))

        slots = max(map(len, tiling.slot_groups))
        self.logits = registers(tiling.rows * slots)
        self.asked, self.product, self.factor, self.sum = (registers(tiling.rows) for _ in range(4))
        self.maximum, self.total, self.rescale = (registers(tiling.rows) for _ in range(3))
        self.value = registers(1)
        self.parameters_at = ceil_div(tiling.heads * staged, 4) * 4
        self.bias_at = self.parameters_at + ceil_div(tiling.parameter_floats, 4) * 4
        self.carried_at = self.bias_at + ceil_div(tiling.heads * self.geometry.keys_per_query, 4) * 4
        self.shared: dict[int, Flat] = {}
        if staged or tiling.carried_floats or self.bias_of_slots is not None:  # TVM refuses views of unused memory
            memory = SharedMemory(tiling.shared_floats() * STAGED_ELEMENT).buffer
            total = self.carried_at + tiling.carried_floats
            self.shared = {lanes: Flat(memory, lanes, ACCUMULATOR, total) for lanes in {1, self.reaches[-1].lanes}}

    @property
    def bias_of_slots(self) -> tirx.Buffer | None:
        """The bias, where all queries share it."""
        bias = self.frame.operands.get("bias")
        return bias if bias is not None and len(bias.shape) == 2 else None

    def emit(self) -> None:
        groups, rows = self.tiling.slot_groups, self.tiling.rows
        fill(self.maximum, rows, LOWEST)
        fill(self.total, rows, 0.0)
        if (bias := self.bias_of_slots) is not None:
            length = int(bias.shape[1])
            with spread(self.frame, self.tiling.heads * length) as index:
                own = load(bias, [self.row_of(bias, self.first_head + index // length), index % length])
                self.shared[1].store(self.bias_at + index, own.astype(ACCUMULATOR))
            barrier()
        for slots in groups:
            self.compute_logits(slots)
            self.update_softmax(slots)
            self.add_weighted_values(slots, first=slots is groups[0], last=slots is groups[-1])

    def row_of(self, bias: tirx.Buffer, head: Expr) -> Expr:
        """The row of a head; one row may serve all heads."""
        return 0 if int(bias.shape[0]) == 1 else head

    def pixel(self, row: int) -> list[Expr]:
        """Where the thread's query `row` lies."""
        at = list(self.query)
        if row:
            at[-2] = at[-2] + row
        return at

    def on_map(self, row: int) -> Expr | bool:
        bounds = zip(self.pixel(row), self.reaches, strict=True)
        return every([True if r.extent % r.tile == 0 else at < r.extent for at, r in bounds])

    def position(self, plane: Expr, row: int) -> Expr:
        """The flat index of the thread's query `row` in a plane of a map of queries."""
        return flatten([plane, *self.pixel(row)], [0, *self.geometry.feature_size])

    # Operands.

    @contextmanager
    def chunk(self, operand: str, start: Expr, slots: range) -> Iterator[tuple[Neighbour, Parameter]]:
        """Neighbours and parameters of a head's channels from `start` on, staged meanwhile."""
        first_channel = self.first_channel(operand, self.head) + start
        if not self.tiling.staged_channels:
            yield (
                lambda channel, row, tap: self.read(operand, first_channel + channel, row, tap),
                self.direct_parameters(first_channel, slots),
            )
            return
        self.stage_map(operand, start)
        names = [name for name in (f"{operand}_kernel", f"{operand}_bias") if name in self.frame.operands]
        starts = (
            self.stage_parameters(names, self.first_channel(operand, self.first_head) + start)
            if self.tiling.parameters
            else {}
        )
        barrier()
        volume, strides = math.prod(self.tiling.halo), _strides(self.tiling.halo)

        def neighbour(channel: Expr, row: int, tap: Tap) -> Expr:
            at = channel * volume + self.staged_at
            for t, r, along in zip(tap, self.reaches, strides, strict=True):
                at = at + t * (r.dilation * along)
            if row:
                at = at + row * self.reaches[-2].stride * strides[-2]
            return self.shared[1].load(at)

        def parameter(name: str, channel: Expr, slot: int, tap: Expr | int) -> Expr:
            taps = math.prod(int(e) for e in self.frame.operands[name].shape[2:])
            per_channel = self.geometry.keys_per_query * taps
            return self.shared[1].load(channel * per_channel + (starts[name] + slot * taps) + tap)

        yield neighbour, parameter if self.tiling.parameters else self.direct_parameters(first_channel, slots)
        barrier()

    def first_channel(self, operand: str, head: Expr) -> Expr:
        """Of a head, among the channels of all."""
        return head * (self.value_dim if operand == "value" else self.head_dim)

    def stage_map(self, operand: str, start: Expr) -> None:
        """The halo of a chunk of channels as float32, for all heads of the threadgroup.

        Where there is no pixel it is what the border holds. A thread has the same pixels of all channels: where they
        lie is found once.
        """
        lanes, halo, staged = self.reaches[-1].lanes, self.tiling.halo, self.tiling.staged_channels
        buffer, padding = self.frame.operands[operand], self.frame.operands.get(f"{operand}_padding")
        source, channels, extents = Flat(buffer, lanes), int(buffer.shape[1]), self.geometry.key_size
        steps = [self.tiling.heads, *halo[:-1], halo[-1] // lanes]
        with spread(self.frame, math.prod(steps)) as index:
            head, *at = unflatten(index, steps)
            at[-1] = at[-1] * lanes
            stands = [s + a for s, a in zip(self.first_staged, at, strict=True)]
            pixel, inside = zip(*(r.source(p) for r, p in zip(self.reaches, stands, strict=True)), strict=True)
            first_channel = self.first_channel(operand, self.first_head + head) + start
            first = T.bind(flatten([self.image * channels + first_channel, *pixel], [0, *extents]))
            target = T.bind(flatten([head * staged, *at], [0, *halo]))
            with T.serial(staged) as own:
                outside: Expr = tirx.const(0.0, ACCUMULATOR)
                if padding is not None:
                    outside = load(padding, [first_channel + own]).astype(ACCUMULATOR)
                outside = outside if lanes == 1 else tirx.Broadcast(outside, lanes)
                value = typed(source.load(first + own * math.prod(extents)), ACCUMULATOR, lanes)
                self.shared[lanes].store(target + own * math.prod(halo), choose(every(inside), value, outside))

    def stage_parameters(self, names: Sequence[str], first_channel: Expr) -> dict[str, int]:
        """Parameters of a chunk of channels; returns where in shared memory each begins."""
        starts, start, channels = {}, self.parameters_at, self.tiling.staged_channels
        for name in names:
            buffer = self.frame.operands[name]
            rows, *rest = (int(e) for e in buffer.shape)
            per_channel, source = math.prod(rest), Flat(buffer, 1)
            with spread(self.frame, channels * per_channel) as index:
                row = (first_channel + index // per_channel) % rows
                value = source.load(row * per_channel + index % per_channel)
                self.shared[1].store(start + index, value.astype(ACCUMULATOR))
            starts[name] = start
            start += channels * per_channel
        return starts

    def direct_parameters(self, first_channel: Expr, slots: range) -> Parameter:
        """Parameters read from device memory."""
        names = ("key_kernel", "key_bias", "value_kernel", "value_bias")
        buffers = {name: buffer for name in names if (buffer := self.frame.operands.get(name)) is not None}
        sources = {name: Flat(buffer, 1) for name, buffer in buffers.items()}

        def parameter(name: str, channel: Expr, slot: int, tap: Expr | int) -> Expr:
            rows, *rest = (int(e) for e in buffers[name].shape)
            at = ((first_channel + channel) % rows) * rest[0] + slots[slot]
            return sources[name].load(at * math.prod(rest[1:]) + tap).astype(ACCUMULATOR)

        return parameter

    def read(self, operand: str, channel: Expr, row: int, tap: Tap) -> Expr:
        """A neighbour from device memory."""
        buffer, padding = self.frame.operands[operand], self.frame.operands.get(f"{operand}_padding")
        pixel, inside = zip(
            *(r.source(p) for r, p in zip(self.reaches, self.stands(row, tap), strict=True)), strict=True
        )
        outside = tirx.const(0.0, buffer.dtype) if padding is None else load(padding, [channel])
        return choose(every(inside), load(buffer, [self.image, channel, *pixel]), outside).astype(ACCUMULATOR)

    def stands(self, row: int, tap: Tap) -> list[Expr]:
        """Where on the key map a tap of the thread's query `row` stands, on it or not."""
        at = [f + t * r.dilation for f, t, r in zip(self.first, tap, self.reaches, strict=True)]
        if row:
            at[-2] = at[-2] + row * self.reaches[-2].stride
        return at

    def shared_neighbours(self, slots: range) -> list[list[tuple[int, int, Tap]]]:
        """(row, slot within the group, tap) of every slot of every row, those together that read the same neighbour."""
        taps = list(itertools.product(*map(range, self.geometry.kernel_size)))[slots.start : slots.stop]
        found: dict[tuple[int, ...], list[tuple[int, int, Tap]]] = {}
        for row, (slot, tap) in itertools.product(self.rows, enumerate(taps)):
            at = [t * r.dilation for t, r in zip(tap, self.reaches, strict=True)]
            if row:
                at[-2] += row * self.reaches[-2].stride
            found.setdefault(tuple(at), []).append((row, slot, tap))
        return list(found.values())

    # The three steps.

    def compute_logits(self, slots: range) -> None:
        """logits[row, j] = scale * query . key_j + bias, for the slots of one group."""
        operands, count = self.frame.operands, len(slots)
        fill(self.logits, self.tiling.rows * count, 0.0)
        step = self.tiling.staged_channels or self.head_dim
        query, channels = Flat(operands["query"], 1), int(operands["query"].shape[1])
        # Compilers that unroll it hold the learned kernels of all chunks in registers, and run out of them.
        with T.serial(self.head_dim // step, unroll=False) as chunk:
            first = self.head * self.head_dim + chunk * step
            with self.chunk("key", chunk * step, slots) as (neighbour, parameter), T.serial(step) as channel:
                plane = self.image * channels + first + channel
                for row in self.rows:
                    own = query.load(self.position(plane, row)).astype(ACCUMULATOR)
                    store(self.asked, [row], choose(self.on_map(row), own, tirx.const(0.0, ACCUMULATOR)))
                if "key_kernel" in operands:
                    self.add_learned_keys(count, channel, neighbour, parameter)
                else:
                    for users in self.shared_neighbours(slots):
                        store(self.value, [0], neighbour(channel, users[0][0], users[0][2]))
                        for row, slot, _ in users:
                            self.add_logit(row * count + slot, self.asked[row] * self.value[0])
                if "key_bias" in operands:
                    for slot in range(count):
                        store(self.value, [0], parameter("key_bias", channel, slot, 0))
                        for row in self.rows:
                            self.add_logit(row * count + slot, self.asked[row] * self.value[0])
        for row, slot in itertools.product(self.rows, range(count)):
            at = row * count + slot
            logit = self.logits[at] * tirx.const(self.spec.scale, ACCUMULATOR)
            store(self.logits, [at], self.with_bias(logit, row, slots[slot]))

    def add_learned_keys(self, count: int, channel: Expr, neighbour: Neighbour, parameter: Parameter) -> None:
        with every_tap(self.geometry.kernel_size) as taps:
            for tap, flat in taps:
                for row in self.rows:
                    store(self.product, [row], self.asked[row] * neighbour(channel, row, tap))
                for slot in range(count):
                    store(self.value, [0], parameter("key_kernel", channel, slot, flat))
                    for row in self.rows:
                        self.add_logit(row * count + slot, self.product[row] * self.value[0])

    def add_logit(self, at: int, value: Expr) -> None:
        store(self.logits, [at], self.logits[at] + value)

    def with_bias(self, logit: Expr, row: int, slot: int) -> Expr:
        """The logit plus bias; LOWEST where the border leaves the slot out."""
        bias = self.frame.operands.get("bias")
        if self.bias_of_slots is not None:
            own_row = self.head_of_group * int(self.bias_of_slots.shape[1])
            logit = logit + self.shared[1].load(self.bias_at + own_row + slot)
        elif bias is not None:
            own = load(bias, [self.row_of(bias, self.head), self.position(tirx.const(0, "int32"), row), slot]).astype(
                ACCUMULATOR
            )
            logit = logit + choose(self.on_map(row), own, tirx.const(0.0, ACCUMULATOR))
        return choose(self.takes_part(row, slot), logit, tirx.const(LOWEST, ACCUMULATOR))

    def takes_part(self, row: int, slot: int) -> Expr | bool:
        """False where the slot stands off the map and the border is "exclude"."""
        tap = unravel(slot, self.geometry.kernel_size)
        return every(
            [
                tirx.all(p >= 0, p < r.key_extent)
                for p, r in zip(self.stands(row, tap), self.reaches, strict=True)
                if r.border == "exclude"
            ]
        )

    def update_softmax(self, slots: range) -> None:
        """Turns logits into weights relative to the running maximum, and rescales what was summed before."""
        count = len(slots)
        for row in self.rows:
            store(self.rescale, [row], self.maximum[row])
            for at in range(row * count, (row + 1) * count):
                store(self.maximum, [row], tirx.max(self.maximum[row], self.logits[at]))
            store(self.rescale, [row], self.exp(self.rescale[row] - self.maximum[row]))
            store(self.total, [row], self.total[row] * self.rescale[row])
            for slot in range(count):
                at = row * count + slot
                weight = self.exp(self.logits[at] - self.maximum[row])
                takes_part = self.takes_part(row, slots[slot])
                if takes_part is not True:
                    weight = tirx.Select(takes_part, weight, tirx.const(0.0, ACCUMULATOR))
                store(self.logits, [at], weight)
                store(self.total, [row], self.total[row] + self.logits[at])

    def add_weighted_values(self, slots: range, first: bool, last: bool) -> None:
        """Every channel of the block in turn: its sum over these slots, on top of that over the groups before."""
        block, threads = self.tiling.value_block, math.prod(self.tiling.threads)
        step = self.tiling.staged_channels or block
        output, channels = Flat(self.frame.output, 1), int(self.frame.output.shape[1])
        for row in self.rows if last else ():
            store(self.total, [row], tirx.const(1.0, ACCUMULATOR) / self.total[row])
        with T.serial(block // step, unroll=False) as chunk:
            start = self.first_value + chunk * step
            first_row = self.head * self.value_dim + start
            with self.chunk("value", start, slots) as (neighbour, parameter), T.serial(step) as channel:

                def carried(row: int) -> Expr:
                    index = ((chunk * step + channel) * self.tiling.rows + row) * threads + self.frame.thread
                    return self.carried_at + index

                for row in self.rows:
                    zero = tirx.const(0.0, ACCUMULATOR)
                    before = zero if first else self.shared[1].load(carried(row)) * self.rescale[row]
                    store(self.sum, [row], before)
                self.add_channel(slots, channel, neighbour, parameter)
                for row in self.rows:
                    if not last:
                        self.shared[1].store(carried(row), self.sum[row])
                        continue
                    with when(self.on_map(row)):
                        result = (self.sum[row] * self.total[row]).astype(self.frame.output.dtype)
                        output.store(self.position(self.image * channels + first_row + channel, row), result)

    def add_channel(self, slots: range, channel: Expr, neighbour: Neighbour, parameter: Parameter) -> None:
        """sum[row] += sum over the slots of weight * value_j, for one channel."""
        operands, count = self.frame.operands, len(slots)
        if "value_kernel" in operands:
            with every_tap(self.geometry.kernel_size) as taps:
                for tap, flat in taps:
                    fill(self.factor, self.tiling.rows, 0.0)
                    for slot in range(count):
                        store(self.value, [0], parameter("value_kernel", channel, slot, flat))
                        for row in self.rows:
                            share = self.logits[row * count + slot] * self.value[0]
                            store(self.factor, [row], self.factor[row] + share)
                    for row in self.rows:
                        self.add_to_sum(row, self.factor[row] * neighbour(channel, row, tap))
        else:
            for users in self.shared_neighbours(slots):
                store(self.value, [0], neighbour(channel, users[0][0], users[0][2]))
                for row, slot, _ in users:
                    self.add_to_sum(row, self.logits[row * count + slot] * self.value[0])
        if "value_bias" in operands:
            for slot in range(count):
                store(self.value, [0], parameter("value_bias", channel, slot, 0))
                for row in self.rows:
                    self.add_to_sum(row, self.logits[row * count + slot] * self.value[0])

    def add_to_sum(self, row: int, value: Expr) -> None:
        store(self.sum, [row], self.sum[row] + value)


@contextmanager
def every_tap(sizes: Sequence[int]) -> Iterator[list[tuple[Tap, Expr | int]]]:
    """All taps and their flat indices: a Python list for small kernels, otherwise one in a loop of the kernel."""
    if math.prod(sizes) <= UNROLLED_TAPS:
        yield [(tap, flat) for flat, tap in enumerate(itertools.product(*map(range, sizes)))]
        return
    with T.serial(math.prod(sizes)) as flat:
        yield [(unflatten(flat, sizes), flat)]


def unravel(flat: int, extents: Sequence[int]) -> list[int]:
    """Row-major coordinates of a flat index."""
    return list(next(itertools.islice(itertools.product(*map(range, extents)), flat, None)))


def _strides(extents: Sequence[int]) -> list[int]:
    """Elements from one position to the next along each axis of a row-major box."""
    return [math.prod(extents[axis + 1 :]) for axis in range(len(extents))]


def flatten(at: Sequence[Expr], extents: Sequence[int]) -> Expr:
    """The row-major flat index of a position; the first extent does not matter."""
    flat: Expr = at[0]
    for index, extent in zip(at[1:], extents[1:], strict=True):
        flat = flat * extent + index
    return flat


def slide_attention(spec: SlideAttention, operands: Operands, target: Target, name: str) -> tirx.PrimFunc:
    """The kernel as a scheduled PrimFunc; parameters are the operands, then the output.

    operands: of float32 or float16; `dtypes` may say otherwise of bias and logits. Logits, softmax and sums are float32
    whatever spec.softmax_dtype says, which is never less exact.
    """
    by_name = operands.shapes
    heads = spec.num_heads
    head_dim, value_dim = (int(by_name[operand][1]) // heads for operand in ("query", "value"))
    learned = {
        (operand, kind): by_name.get(f"{operand}_{kind}", (1, 0))
        for operand, kind in itertools.product(("key", "value"), ("kernel", "bias"))
    }
    dims = {"key": head_dim, "value": value_dim}
    parameters = max(sum(math.prod(learned[operand, kind][1:]) for kind in ("kernel", "bias")) for operand in dims)
    # A row for each channel of one head serves all heads.
    alike = parameters > 0 and all(dims[operand] % int(shape[0]) == 0 for (operand, _), shape in learned.items())
    instances = instances_of(spec, by_name["query"], target)
    bytes_ = DataType(operands.dtype).itemsize
    work = Work(spec.geometry, head_dim, value_dim, bytes_, instances, parameters, alike=heads if alike else 1)
    return build(SlideKernel, spec, work, operands, target, name)


def instances_of(spec: SlideAttention, shape: Sequence[Any], target: Target) -> int:
    """Heads times images of an operand; of a batch that is not known, as many as are likely."""
    return spec.num_heads * (shape[0] if isinstance(shape[0], int) else Limits.of(target).batch)


def build(
    kernel: type[SlideKernel], spec: SlideAttention, work: Work, operands: Operands, target: Target, name: str
) -> tirx.PrimFunc:
    """The function of a kernel that does this work."""
    tiling, heads, value_dim = choose_tiling(work, Limits.of(target)), spec.num_heads, work.value_dim

    def grid(images: Expr) -> tuple[int, int, Expr]:
        blocks = value_dim // tiling.value_block
        return math.prod(r.tiles for r in tiling.reaches), heads // tiling.heads * blocks, images

    threads = (tiling.threads[-1], tiling.heads * math.prod(tiling.threads[:-1]))
    builder = KernelBuilder()
    output_shape = [heads * value_dim, *spec.output_size]
    with builder.kernel(name, operands, [output_shape], grid, threads, channel_axis=1) as frame:
        kernel(spec, frame, tiling, exponential(target)).emit()
    return builder.prim_func()
