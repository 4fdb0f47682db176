"""How a matrix product is divided among threadgroups on a GPU: its tiles, and which of them is estimated to be best."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Protocol, TypeVar

from attnrewrite.lowering.schedules.gpu_emit import Device

# Reading operands again for every tile may cost so many times what reading each of them once does. CUDA devices have
# the larger last-level caches: of 4 MB (T4) to 72 MB, where Apple's have 8 or more for CPU and GPU together.
MOST_TRAFFIC = {"metal": 4, "cuda": 16}

# Multiply-adds that a GPU does while it moves one byte from the cache that tiles of one product share.
PER_BYTE = 4

SIMD = 32  # threads that hold a matrix together

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
class MatrixUnit:
    """A matrix instruction of 32 threads: `rows x columns` sums += `rows x steps` times `steps x columns`.

    most: matrices of sums that 32 threads hold in registers. multiply, load_rows, load_columns: how many of a thread's
    plain instructions take as long as the instruction, and as loading one of its operands from shared memory.
    """

    rows: int
    columns: int
    steps: int
    most: int
    multiply: int
    load_rows: int
    load_columns: int


# On Apple's GPUs the same units do it that do single multiply-adds.
SIMDGROUP = MatrixUnit(8, 8, 8, most=16, multiply=16, load_rows=2, load_columns=2)

# mma.m16n8k16 at the rate of an A100: 256 multiply-adds a cycle for each warp scheduler; 128 bytes a cycle from shared
# memory for four of them.
TENSOR_CORE = MatrixUnit(16, 8, 16, most=16, multiply=8, load_rows=16, load_columns=8)


@dataclass(frozen=True)
class MatrixTile:
    """SIMD groups (warps) along columns (x), rows (y) and steps (z) of a threadgroup, and matrices of sums in each of
    them. Groups along the steps share what is staged of the reduction; their sums are added in the end.

    Neighbouring matrices belong to neighbouring groups: matrix i of group y covers the unit's rows from
    (i * groups_y + y) * unit.rows on.
    """

    unit: MatrixUnit
    groups_x: int
    groups_y: int
    matrices_y: int
    matrices_x: int
    groups_z: int = 1

    @property
    def rows(self) -> int:
        return self.unit.rows * self.groups_y * self.matrices_y

    @property
    def columns(self) -> int:
        return self.unit.columns * self.groups_x * self.matrices_x

    @property
    def launch_size(self) -> tuple[int, int]:
        return SIMD, self.groups_x * self.groups_y * self.groups_z

    @property
    def work(self) -> float:
        r, c, unit = self.matrices_y, self.matrices_x, self.unit
        instruction = unit.multiply * r * c + unit.load_rows * r + unit.load_columns * c + 4
        return instruction / (unit.steps * self.groups_z)


@dataclass(frozen=True)
class Sizes:
    """Of a product, and of an element of its operands; None where they are not known, which counts as large."""

    batch: int | None
    rows: int | None
    columns: int | None
    depth: int | None
    element_bytes: int

    @property
    def suits_matrices(self) -> bool:
        """Whether padding to whole matrices leaves most of the work."""
        places = (self.rows, self.columns)
        enough = all(size is None or size >= MIN_PLACES for size in places)
        return enough and (self.depth is None or self.depth >= MIN_STEPS)

    def tiles(self, tile: Tile) -> int:
        """How many of these tiles make the product."""
        return (self.batch or 16) * -(-(self.rows or 4096) // tile.rows) * -(-(self.columns or 4096) // tile.columns)


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
        threads = prod(tile.launch_size)
        at_a_time = device.concurrent * 256 // threads
        arithmetic = -(-sizes.tiles(tile) // at_a_time) * at_a_time * tile.work * threads
        return arithmetic + PER_BYTE * sizes.element_bytes * images * moved(tile)

    def traffic(tile: Tile) -> float:
        return (k * moved(tile) + m * n) / (k * (m + n) + m * n)

    every, most = list(tiles), MOST_TRAFFIC[device.target.kind.name]
    return min([tile for tile in every if traffic(tile) <= most] or every, key=cost)


def thread_tiles() -> list[ThreadTile]:
    return [ThreadTile(x, y, r, c) for x, y, r, c in itertools.product((8, 16), (8, 16), (1, 2, 4, 8), (1, 2, 4, 8))]


def matrix_tiles(unit: MatrixUnit, device: Device, groups_z: Iterable[int] = (1,)) -> list[MatrixTile]:
    """Of at least four SIMD groups; runs of four columns divide a row of the tile evenly among its threads."""
    counts = itertools.product((1, 2, 3, 4), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8), groups_z)
    tiles = [MatrixTile(unit, x, y, r, c, z) for x, y, r, c, z in counts if r * c <= unit.most]
    return [tile for tile in tiles if 4 * SIMD <= prod(tile.launch_size) <= device.limits.threads]
