"""How a matrix product is divided among threadgroups on a GPU: its tiles, and which of them is estimated to be best."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

from attnrewrite.lowering.schedules.gpu_emit import Device

# Reading operands again for every tile may cost so many times what reading each of them once does.
MOST_TRAFFIC = 4

# Multiply-adds that a GPU does while it moves one element from the cache that tiles of one product share.
PER_ELEMENT = 16

SIMD = 32  # threads that hold a matrix together

# A matrix of a matrix unit, in rows or columns and in steps of the reduction.
MATRIX = 8

# Matrices of sums that a SIMD group holds: 32 registers of each thread.
MOST_MATRICES = 16

# From these sizes on a product goes to the matrix units; below, padding to whole matrices is most of the work.
MIN_PLACES, MIN_STEPS = 8, 16


class Tile(Protocol):
    """rows, columns: results of one threadgroup. launch_size: its threads along x and y. work: instructions of a thread
    per step of the reduction, roughly.
    """

    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def launch_size(self) -> tuple[int, int]: ...
    @property
    def work(self) -> float: ...


@dataclass(frozen=True)
class ThreadTile:
    """Threads along columns (x) and rows (y) of a threadgroup, and sums per thread: groups of up to four neighbours,
    the groups of one thread as far apart as those of all threads reach.
    """

    threads_x: int
    threads_y: int
    rows_per_thread: int
    columns_per_thread: int

    @property
    def rows(self) -> int:
        return self.threads_y * self.rows_per_thread

    @property
    def columns(self) -> int:
        return self.threads_x * self.columns_per_thread

    @property
    def launch_size(self) -> tuple[int, int]:
        return self.threads_x, self.threads_y

    @property
    def work(self) -> float:
        r, c = self.rows_per_thread, self.columns_per_thread
        return r * c + r + c + 4


@dataclass(frozen=True)
class MatrixTile:
    """SIMD groups along columns (x) and rows (y) of a threadgroup, and matrices of sums in each of them.

    Neighbouring matrices belong to neighbouring groups: matrix i of group y covers the rows from
    MATRIX * (i * groups_y + y) on.
    """

    groups_x: int
    groups_y: int
    matrices_y: int
    matrices_x: int

    @property
    def rows(self) -> int:
        return MATRIX * self.groups_y * self.matrices_y

    @property
    def columns(self) -> int:
        return MATRIX * self.groups_x * self.matrices_x

    @property
    def launch_size(self) -> tuple[int, int]:
        return SIMD, self.groups_x * self.groups_y

    @property
    def work(self) -> float:
        """For MATRIX steps a thread has two elements of every matrix to multiply MATRIX times, and to load."""
        r, c = self.matrices_y, self.matrices_x
        return 2 * r * c + (2 * (r + c) + 4) / MATRIX


@dataclass(frozen=True)
class Sizes:
    """Of a product; None where they are not known, which counts as large."""

    batch: int | None
    rows: int | None
    columns: int | None
    depth: int | None

    @property
    def suits_matrices(self) -> bool:
        """Whether padding to whole matrices leaves most of the work."""
        places = (self.rows, self.columns)
        enough = all(size is None or size >= MIN_PLACES for size in places)
        return enough and (self.depth is None or self.depth >= MIN_STEPS)


_Tile = TypeVar("_Tile", bound=Tile)


def choose(tiles: Iterable[_Tile], sizes: Sizes, device: Device) -> _Tile:
    """The tile that finishes first: rounds of threadgroups times what a thread does, and what reading operands again
    takes. It keeps to MOST_TRAFFIC wherever some tile does.
    """
    m, n, k, images = sizes.rows or 4096, sizes.columns or 4096, sizes.depth or 1024, sizes.batch or 16

    def moved(tile: Tile) -> int:
        """Elements of both operands per step of the reduction."""
        return -(-n // tile.columns) * m + -(-m // tile.rows) * n

    def cost(tile: Tile) -> float:
        count = images * -(-m // tile.rows) * -(-n // tile.columns)
        threads = prod(tile.launch_size)
        at_a_time = device.concurrent * 256 // threads
        return -(-count // at_a_time) * at_a_time * tile.work * threads + PER_ELEMENT * images * moved(tile)

    def traffic(tile: Tile) -> float:
        return (k * moved(tile) + m * n) / (k * (m + n) + m * n)

    every = list(tiles)
    return min([tile for tile in every if traffic(tile) <= MOST_TRAFFIC] or every, key=cost)


def thread_tiles() -> list[ThreadTile]:
    return [ThreadTile(x, y, r, c) for x, y, r, c in itertools.product((8, 16), (8, 16), (1, 2, 4, 8), (1, 2, 4, 8))]


def matrix_tiles(device: Device) -> list[MatrixTile]:
    """Of at least four SIMD groups; runs of four columns divide a row of the tile evenly among its threads."""
    counts = itertools.product((1, 2, 3, 4), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4))
    tiles = [MatrixTile(x, y, r, c) for x, y, r, c in counts if r * c <= MOST_MATRICES]
    return [tile for tile in tiles if 4 * SIMD <= prod(tile.launch_size) <= device.limits.threads]
