"""Where the blocks of Col2Im (`fold`, the reverse of unfold) are added, axis by axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from attnrewrite.graph import Node


@dataclass(frozen=True)
class BlockAxis:
    """Along one axis, row `place` of block `l` is added at l * stride + place * dilation - begin.

    extent: positions of the result; count: blocks.
    """

    extent: int
    size: int
    stride: int
    dilation: int
    begin: int
    count: int

    def blocks(self, place: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(inside, block): where a block adds this row at these positions, and which block it is (0 elsewhere)."""
        start = position + self.begin - place * self.dilation
        block = start // self.stride
        inside = (start % self.stride == 0) & (block >= 0) & (block < self.count)
        return inside, np.where(inside, block, 0)

    def apart(self) -> tuple[np.ndarray, np.ndarray] | None:
        """int64 [extent] each: the row and the block at every position, -1 where there is none; None where blocks
        overlap.
        """
        rows, blocks = np.full(self.extent, -1), np.full(self.extent, -1)
        positions = np.arange(self.extent)
        for place in range(self.size):
            inside, block = self.blocks(place, positions)
            if (rows[inside] >= 0).any():
                return None
            rows[inside], blocks[inside] = place, block[inside]
        return rows, blocks


def block_axes(node: Node) -> list[BlockAxis] | None:
    """The spatial axes of a Col2Im; None where its extents are computed."""
    image, block = node.constant(1), node.constant(2)
    if image is None or block is None:
        return None
    return list(_axes(node, image.tolist(), block.tolist()))


def _axes(node: Node, image: list[int], block: list[int]) -> Iterator[BlockAxis]:
    rank = len(block)
    strides = node.attributes.get("strides") or [1] * rank
    dilations = node.attributes.get("dilations") or [1] * rank
    pads = node.attributes.get("pads") or [0] * (2 * rank)
    for axis, (extent, size, stride, dilation) in enumerate(zip(image, block, strides, dilations, strict=True)):
        room = extent + pads[axis] + pads[rank + axis] - dilation * (size - 1) - 1
        yield BlockAxis(extent, size, stride, dilation, pads[axis], room // stride + 1)
