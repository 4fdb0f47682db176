"""SlideAttention with predicted weights for CUDA and Metal: sums of neighbours whose logits are read, not computed.

A thread has pixels of the output. Value is staged and summed as for computed weights (slide_gpu.py), and every logit
is read once, by the one thread that needs it.

With `overlap_add` an output pixel sums what all blocks put there: row r of block p, where p * stride + offset +
r * dilation is the pixel. Slot j of that block lies (j - r) * dilation from the pixel, whatever p is. So the weights of
all rows that meet at the pixel add up to those of one neighbourhood of 2 * kernel_size - 1 around it, and value is
multiplied with the sums: 25 products for 81 weights of 3 x 3 blocks.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

from tvm import DataType, tirx
from tvm.target import Target

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.localattention.geometry import NeighborhoodGeometry
from attnrewrite.lowering.kernels.gpu_builder import (
    ACCUMULATOR,
    Expr,
    Flat,
    Frame,
    Operands,
    choose,
    every,
    fill,
    registers,
    store,
)
from attnrewrite.lowering.kernels.slide_gpu import SlideKernel, Tap, build, every_tap, flatten, instances_of
from attnrewrite.lowering.kernels.slide_gpu_plan import SlideTiling, Work


class PredictedKernel(SlideKernel):
    """One row of weights for each pixel of the output."""

    def __init__(self, spec: SlideAttention, frame: Frame, tiling: SlideTiling, exp: Callable[[Expr], Expr]) -> None:
        super().__init__(spec, frame, tiling, exp)
        self.predicted = Flat(frame.operands["logits"], 1)
        self.channels = int(frame.operands["logits"].shape[1])

    def compute_logits(self, slots: range) -> None:
        """logits[row, j] = scale * what was predicted + bias, for the slots of one group."""
        factors = self.spec.upsampling or (1,) * len(self.reaches)
        repeats, size = math.prod(factors), self.spec.geometry.feature_size
        for row in self.rows:
            pixel = self.pixel(row)
            block = [at // factor for at, factor in zip(pixel, factors, strict=True)]
            within = flatten([at % factor for at, factor in zip(pixel, factors, strict=True)], factors)
            for index, slot in enumerate(slots):
                plane = (self.head * self.geometry.keys_per_query + slot) * repeats + within
                logit = self.read_logit(plane, flatten(block, size), self.on_map(row))
                at = row * len(slots) + index
                store(self.logits, [at], self.with_bias(logit, row, slot))

    def read_logit(self, plane: Expr, pixel: Expr, exists: Expr | bool) -> Expr:
        """scale * the logit of a plane [*feature_size] of this image; 0 where there is none."""
        at = (self.image * self.channels + plane) * math.prod(self.spec.geometry.feature_size) + pixel
        value = choose(exists, self.predicted.load(at).astype(ACCUMULATOR), tirx.const(0.0, ACCUMULATOR))
        return value * tirx.const(self.spec.scale, ACCUMULATOR)

    def update_softmax(self, slots: range) -> None:
        if self.spec.predicted == "logits":
            super().update_softmax(slots)
        else:
            fill(self.total, self.tiling.rows, 1.0)
            fill(self.rescale, self.tiling.rows, 1.0)


class OverlapAddKernel(PredictedKernel):
    """The rows of all blocks that meet at a pixel, added up to one row of weights."""

    def compute_logits(self, slots: range) -> None:
        """logits[row, slot] = sum of the weights that lie there, softmax included."""
        taps = self.spec.geometry.keys_per_query
        self.own, self.largest, self.share = registers(taps), registers(1), registers(1)
        self.block = registers(1, "int32")
        fill(self.logits, self.tiling.rows * len(slots), 0.0)
        for row in self.rows:
            with every_tap(self.spec.geometry.kernel_size) as found:
                for tap, flat in found:
                    self.add_row(row, tap, flat, len(slots))

    def add_row(self, row: int, tap: Tap, flat: Expr | int, slots: int) -> None:
        """Adds the weights of the block whose row `tap` lies at this pixel, if there is one."""
        geometry, taps = self.spec.geometry, self.spec.geometry.keys_per_query
        block, exists = [], [self.on_map(row)]
        for axis, (at, part) in enumerate(zip(self.pixel(row), tap, strict=True)):
            from_first = at - geometry.offset[axis] - part * geometry.dilation[axis]
            step, extent = geometry.stride[axis], geometry.feature_size[axis]
            exists += [from_first >= 0, from_first < extent * step]
            exists += [] if step == 1 else [tirx.floormod(from_first, step) == 0]
            block.append(tirx.floordiv(from_first, step))
        # -1 for no block
        store(self.block, [0], choose(every(exists), flatten(block, geometry.feature_size), tirx.const(-1, "int32")))
        is_block = self.block[0] >= 0
        for slot in range(taps):
            plane = (self.head * taps + flat) * taps + slot
            store(self.own, [slot], self.with_bias(self.read_logit(plane, self.block[0], is_block), row, slot))
        store(self.share, [0], tirx.const(1.0, ACCUMULATOR))
        if self.spec.predicted == "logits":
            store(self.largest, [0], functools.reduce(tirx.max, [self.own[slot] for slot in range(taps)]))
            store(self.share, [0], tirx.const(0.0, ACCUMULATOR))
            for slot in range(taps):
                store(self.own, [slot], self.exp(self.own[slot] - self.largest[0]))
                store(self.share, [0], self.share[0] + self.own[slot])
            store(self.share, [0], tirx.const(1.0, ACCUMULATOR) / self.share[0])
        store(self.share, [0], tirx.Select(is_block, self.share[0], tirx.const(0.0, ACCUMULATOR)))
        for slot, other in enumerate(itertools.product(*map(range, geometry.kernel_size))):
            apart = [o - t + k - 1 for o, t, k in zip(other, tap, geometry.kernel_size, strict=True)]
            at = flatten(apart, self.geometry.kernel_size) + row * slots
            store(self.logits, [at], self.logits[at] + self.own[slot] * self.share[0])

    def update_softmax(self, slots: range) -> None:
        fill(self.total, self.tiling.rows, 1.0)


def predicted_attention(spec: SlideAttention, operands: Operands, target: Target, name: str) -> tirx.PrimFunc:
    """The kernel of a spec with `predicted`; arguments as of `slide_gpu.slide_attention`."""
    value = operands.shapes["value"]
    instances, value_dim, bytes_ = (
        instances_of(spec, value, target),
        int(value[1]) // spec.num_heads,
        DataType(operands.dtype).itemsize,
    )
    own = spec.geometry
    if spec.overlap_add:
        kernel = tuple(2 * extent - 1 for extent in own.kernel_size)
        offset = tuple((1 - k) * d for k, d in zip(own.kernel_size, own.dilation, strict=True))
        around = NeighborhoodGeometry(own.key_size, kernel, own.dilation, own.border, offset=offset)
        work = Work(around, 0, value_dim, bytes_, instances, at_once=True)
    else:
        on_output = NeighborhoodGeometry(
            spec.output_size, own.kernel_size, own.dilation, own.border, own.stride, own.key_size, own.offset
        )
        work = Work(on_output, 0, value_dim, bytes_, instances, upsampling=spec.upsampling)
    emitter = OverlapAddKernel if spec.overlap_add else PredictedKernel
    return build(emitter, spec, work, operands, target, name)
