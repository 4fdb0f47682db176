"""How query, key and value come into the shared memory of the tensor-core kernel: which pixels, which copies.

A thread copies the same places of every tile. It finds out which pixels they are once per window (or tile), and keeps
that for the operands which are read from the same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.lowering.kernels.gpu_builder import (
    WORD_BYTES,
    Expr,
    Flat,
    Frame,
    SharedTile,
    TileShape,
    barrier,
    ceil_div,
    choose,
    every,
    load,
    registers,
    store,
    when,
)
from attnrewrite.lowering.kernels.tensor_core import ELEMENT_BYTES, TensorCore, at
from attnrewrite.lowering.kernels.window_gpu_pixels import Pixel
from attnrewrite.lowering.kernels.window_gpu_relative import STEP as RELATIVE_STEP
from attnrewrite.lowering.kernels.window_tensor_plan import TensorTiling

_WORD = WORD_BYTES // ELEMENT_BYTES
_NOWHERE = -1


@dataclass(frozen=True)
class Staged:
    """An operand's tile, in shared memory from the element `first` on.

    pitch: channels from head to head there. channels: of a head. tokens: of a window. step: from pixel to pixel in
    device memory.
    """

    operand: str
    tile: TileShape
    first: int
    pitch: int
    channels: int
    tokens: int
    step: int

    @property
    def lanes(self) -> int:
        """Channels of one copy."""
        return math.gcd(self.channels, self.step, _WORD)

    @property
    def rows(self) -> int:
        """Of a tile, those that any tile has tokens for."""
        return min(self.tile.rows, self.tokens)

    def at(self, row: Expr, column: Expr) -> Expr:
        return self.first + row * self.tile.stride + column


def flat_pixel(image: Expr, pixel: Pixel, extents: Sequence[Any]) -> Expr:
    """A pixel's number among those of all images; negative where it does not lie on the map."""
    coordinates, on_map = pixel
    flat = image
    for along, extent in zip(coordinates, extents, strict=True):
        flat = flat * int(extent) + along
    return choose(on_map, flat, tirx.const(_NOWHERE, "int32"))


class Staging:
    """The shared memory of a threadgroup; emits what fills it."""

    def __init__(
        self, spec: FlashWindowAttention, frame: Frame, tiling: TensorTiling, cores: TensorCore, first_head: Expr
    ) -> None:
        self._frame, self._tiling, self._cores, self._first_head = frame, tiling, cores, first_head
        self._threads = math.prod(tiling.threads)
        sizes, pitch = tiling.sizes, tiling.head_pitch
        first_key = tiling.query_tile.size_bytes // ELEMENT_BYTES
        first_value = first_key + tiling.key_tile.size_bytes // ELEMENT_BYTES
        query, key, value = (int(frame.operands[name].shape[-1]) for name in ("query", "key", "value"))
        self.query = Staged("query", tiling.query_tile, 0, pitch, sizes.head_dim, sizes.queries, query)
        self.key = Staged("key", tiling.key_tile, first_key, pitch, sizes.head_dim, sizes.keys, key)
        self.value = Staged(
            "value", tiling.value_tile, first_value, tiling.value_pitch, sizes.value_dim, sizes.keys, value
        )
        self.memory = cores.shared(tiling.shared_elements)
        own_queries = spec.shared_query or spec.geometry.keys is not None
        one_tile = tiling.query_tiles == tiling.key_tiles == 1
        # Queries of a window that is one tile are its keys' pixels. The same pixels are those of the same copies.
        self.query_is_key = one_tile and not own_queries and self.query.lanes == self.key.lanes
        self.value_is_key = sizes.head_dim == sizes.value_dim and self.value.lanes == self.key.lanes
        alike = {"query": self.query_is_key, "value": self.value_is_key, "key": False}
        pixels = {
            staged.operand: registers(ceil_div(self._copies(staged), self._threads), "int32")
            for staged in (self.query, self.key, self.value)
            if not alike[staged.operand]
        }
        self._pixels = {operand: pixels.get(operand, pixels["key"]) for operand in alike}

    def pointer(self, staged: Staged, row: Expr, column: Expr) -> Expr:
        return at(self.memory, staged.at(row, column))

    def queries(self) -> SharedTile:
        """The tile of queries, of one head, for loads of four channels."""
        tiling = self._tiling
        shape = TileShape(tiling.tile_queries, tiling.head_pitch, self._cores.dtype)
        return SharedTile(shape, self.memory, lanes=(RELATIVE_STEP,))

    def clear(self) -> None:
        """Zeros in all of the shared memory: copies of nothing."""
        words = self._tiling.shared_elements // _WORD
        source = Flat(self._frame.output, 1).pointer(0)  # begins at a word, as parts of wider maps may not
        for start in range(0, words, self._threads):
            index = self._frame.thread + start
            with when(True if start + self._threads <= words else index < words):
                self._cores.copy_async(at(self.memory, index * _WORD), source, WORD_BYTES, False)
        self._cores.commit()
        self._cores.wait(0)
        barrier()

    def locate(self, staged: Staged, pixel_of: Callable[[Expr], Pixel], image: Expr, first: Expr) -> None:
        """Finds the pixels that this thread copies of the tokens from `first` on."""
        extents = self._frame.operands[staged.operand].shape[1:-1]
        for turn, (_, row, _) in enumerate(self._turns(staged)):
            store(self._pixels[staged.operand], [turn], flat_pixel(image, pixel_of(first + row), extents))

    def fetch(self, staged: Staged, first: Expr) -> None:
        """Begins to copy what was located. Tokens outside the map are key_padding or value_padding, or zero."""
        operand, lanes = self._frame.operands[staged.operand], staged.lanes
        padding = self._frame.operands.get(f"{staged.operand}_padding")
        source, size, per_head = Flat(operand, 1), lanes * ELEMENT_BYTES, staged.channels // lanes
        for turn, (inside, row, number) in enumerate(self._turns(staged)):
            pixel = load(self._pixels[staged.operand], [turn])
            column = number * lanes
            if self._tiling.heads > 1 and staged.pitch != staged.channels:
                column = number // per_head * staged.pitch + number % per_head * lanes
            target = self.pointer(staged, row, column)
            position = self._first_head * staged.channels + number * lanes
            is_token = True if staged.tokens % staged.rows == 0 else first + row < staged.tokens
            with when(every([inside, is_token])):
                here = source.pointer(tirx.max(pixel, 0) * staged.step + position)
                if padding is None:
                    self._cores.copy_async(target, here, size, pixel >= 0)
                    continue
                with when(pixel >= 0):
                    self._cores.copy_async(target, here, size, True)
                with when(pixel < 0):
                    self._cores.copy_async(target, Flat(padding, 1).pointer(position), size, True)

    def _copies(self, staged: Staged) -> int:
        """Of one tile, by all threads."""
        return staged.rows * self._tiling.heads * staged.channels // staged.lanes

    def _turns(self, staged: Staged) -> list[tuple[Expr | bool, Expr, Expr]]:
        """Of each copy of this thread: whether there is one, its row, and its number within the row."""
        width, count = self._tiling.heads * staged.channels // staged.lanes, self._copies(staged)
        found = []
        for start in range(0, count, self._threads):
            index = self._frame.thread + start
            inside = True if start + self._threads <= count else index < count
            found.append((inside, index // width, index % width))
        return found
