"""How key and value come into the shared memory of SlideAttention's tensor-core kernel.

Channels lie one after the other, each a band of rows of pixels. A thread has the same few pixels of every channel: it
finds out once where they lie, and whether a border stands there. Pixels are copied asynchronously, up to eight of them
at once, where they lie in rows as they are; one by one, through registers, where rows begin at odd places, where
borders read other pixels or a constant, or where neighbours are a dilation apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from attnrewrite.lowering.kernels.gpu_builder import (
    Expr,
    Flat,
    Frame,
    TileShape,
    ceil_div,
    choose,
    every,
    held,
    load,
    spread,
    store,
    when,
)
from attnrewrite.lowering.kernels.slide_tensor_plan import SlideTensorTiling
from attnrewrite.lowering.kernels.tensor_core import ELEMENT_BYTES, TensorCore, as_bits, at

# Single pixels that a thread loads before it stores them.
LOADED_TOGETHER = 16


class SlideStaging:
    """The shared memory of a threadgroup, and what fills it. starts: the pixel, per axis, at which its tile begins."""

    def __init__(
        self,
        frame: Frame,
        tiling: SlideTensorTiling,
        cores: TensorCore,
        starts: tuple[Expr, Expr],
        image: Expr,
        head: Expr,
    ) -> None:
        self._frame, self._tiling, self._cores, self._starts = frame, tiling, cores, starts
        self._image, self._head = image, head
        self._first_value = tiling.key_tile.size_bytes // ELEMENT_BYTES
        self.memory = cores.shared(self._first_value + tiling.value_tile.size_bytes // ELEMENT_BYTES)
        self._bits = as_bits(self.memory, 1)
        # Pixels of a channel, one copy each, for all threads; several channels where they are few.
        self._threads = tiling.warps * tiling.threads[0]
        self._turns = ceil_div(tiling.positions, self._threads)
        self._at_once = tiling.channels_at_once
        self._own_channel = frame.thread // tiling.positions if self._at_once > 1 else tirx.const(0, "int32")

    def key(self, channel: Expr, position: Expr) -> Expr:
        """Pointer to a pixel of a channel of the key; past its last channel, to zeros."""
        return at(
            self.memory, tirx.min(channel, self._tiling.key_tile.rows - 1) * self._tiling.key_tile.stride + position
        )

    def value(self, channel: Expr, position: Expr) -> Expr:
        """The same of the value; past its last channel, of the last."""
        tile = self._tiling.value_tile
        return at(self.memory, tirx.min(channel, tile.rows - 1) * tile.stride + position + self._first_value)

    def clear(self) -> None:
        """Zeros for the channels that fill up the last step of the key."""
        tiling = self._tiling
        if tiling.key_tile.rows > tiling.work.head_dim:
            first = tiling.work.head_dim * tiling.key_tile.stride
            with spread(self._frame, tiling.key_tile.stride) as index:
                store(self._bits, [first + index], tirx.const(0, "uint16"))

    def fetch(self, band: Expr) -> None:
        """Begins to copy key and value of a band of rows."""
        for turn in range(self._turns):
            with self._position(turn, band) as (pixel, target):
                for operand, tile, first in (
                    ("key", self._tiling.key_tile, 0),
                    ("value", self._tiling.value_tile, self._first_value),
                ):
                    self._fetch_pixel(operand, tile, pixel, target + first)
        self._cores.commit()

    @contextmanager
    def _position(self, turn: int, band: Expr) -> Iterator[tuple[Expr, Expr]]:
        """Of this thread: a pixel's number in a channel of the map, negative outside, and its place in a staged one."""
        tiling = self._tiling
        rows, columns = tiling.rows, tiling.columns
        if self._at_once > 1:
            index = self._frame.thread % tiling.positions
            inside = self._threads == tiling.positions * self._at_once or self._own_channel < self._at_once
        else:
            index = self._frame.thread + turn * self._threads
            inside = (turn + 1) * self._threads <= tiling.positions or index < tiling.positions
        per_row = columns.staged // tiling.lanes
        row, column = index // per_row, index % per_row * tiling.lanes
        with when(inside):
            stands = [
                self._starts[0] + (band * tiling.band + row) * rows.reach.dilation,
                self._starts[1] + column * columns.reach.dilation,
            ]
            (y, on_rows), (x, on_columns) = (a.reach.source(p) for a, p in zip((rows, columns), stands, strict=True))
            on_map = every([on_rows, on_columns])
            yield (
                held(choose(on_map, y * columns.reach.key_extent + x, tirx.const(-1, "int32"))),
                held(row * columns.staged + column),
            )

    def _fetch_pixel(self, operand: str, tile: TileShape, pixel: Expr, target: Expr) -> None:
        """All channels of one pixel, or of as many as one copy has."""
        buffer, work, lanes = self._frame.operands[operand], self._tiling.work, self._tiling.lanes
        channels = work.head_dim if operand == "key" else work.value_dim
        area = self._tiling.rows.reach.key_extent * self._tiling.columns.reach.key_extent
        plane = held(self._image * int(buffer.shape[1]) + self._head * channels)
        steps = channels // self._at_once
        # Compilers that unroll it hold as many pixels in registers as they can.
        together = steps if lanes > 1 else max(d for d in range(1, LOADED_TOGETHER + 1) if steps % d == 0)
        with T.serial(steps // together, unroll=lanes > 1) as outer, T.serial(together) as inner:
            channel = (outer * together + inner) * self._at_once + self._own_channel
            place = channel * tile.stride + target
            if lanes > 1:
                source = Flat(buffer, 1).pointer((plane + channel) * area + tirx.max(pixel, 0))
                self._cores.copy_async(at(self.memory, place), source, lanes * ELEMENT_BYTES, pixel >= 0)
            else:
                padding = self._frame.operands.get(f"{operand}_padding")
                outside = tirx.const(0, "uint16")
                if padding is not None:
                    outside = load(as_bits(padding, 1), [self._head * channels + channel])
                own = load(as_bits(buffer, 1), [(plane + channel) * area + pixel])
                store(self._bits, [place], choose(pixel >= 0, own, outside))
