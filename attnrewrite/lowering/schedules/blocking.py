"""In which order the tiles of a matrix product are computed, so that what is read again is still in a cache.

A small right operand stays in the second-level cache while row tiles pass by. For a large one, all row tiles of a block
pass by one panel (the depth x one tile's columns), then by the next; where a block of rows and a panel together are too
much for that cache, the depth is cut as well, and partial sums wait in the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Of float32, and of a pair of bfloat16 values.
ELEMENT_BYTES = 4

# What fits comfortably into the second-level cache of every preset.
CACHE_BYTES = 512 * 1024

# A block of rows and a panel are used in turns, and the output passes through as well.
BLOCK_BYTES = CACHE_BYTES * 3 // 4

# A row of the left operand beyond this depth leaves too few rows for a block.
MAX_DEPTH = 512
MIN_DEPTH = 192

# Parallel pieces aimed at, so that threads of uneven speed end at about the same time.
PIECES = 8


@dataclass(frozen=True)
class Blocks:
    """row_tiles per block, depth of one pass over it (a divisor of K), panel_groups that threads may take apart."""

    row_tiles: int
    depth: int
    panel_groups: int


def choose_blocks(rows: int, columns: int, depth: int, tile: tuple[int, int], *, may_cut_depth: bool) -> Blocks | None:
    """None where one block of all rows is best, or the right operand is small. tile: its rows and columns."""
    height, width = tile
    if rows * depth * ELEMENT_BYTES <= 2 * CACHE_BYTES or columns * depth * ELEMENT_BYTES <= CACHE_BYTES:
        return None
    cut = _cut(depth) if may_cut_depth else depth
    panel = cut * width * ELEMENT_BYTES
    fitting = max(BLOCK_BYTES - panel, BLOCK_BYTES // 3) // (cut * ELEMENT_BYTES)
    row_tiles = max(1, fitting // height)
    all_tiles = -(-rows // height)
    blocks = -(-all_tiles // row_tiles)
    row_tiles = -(-all_tiles // blocks)  # as even as can be
    panels = -(-columns // width)
    return Blocks(row_tiles, cut, min(panels, -(-PIECES // blocks)))


def _cut(depth: int) -> int:
    """The largest divisor of the depth that is not too deep; all of it where its divisors are too small."""
    divisors: Sequence[int] = [d for d in range(MIN_DEPTH, MAX_DEPTH + 1) if depth % d == 0]
    return depth if depth <= MAX_DEPTH or not divisors else divisors[-1]
