"""How the tensor-core kernel of FlashWindowAttention divides its work, and what it takes.

Letters: N query and M key tokens per window, nW windows, nH heads, d and dv head_dim of query/key and of value.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.target import Target

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.lowering.kernels.gpu_builder import Expr, Limits, TileShape, ceil_div
from attnrewrite.lowering.kernels.tensor_core import COLUMNS, ELEMENT_BYTES, STEP, WARP, has_tensor_cores
from attnrewrite.lowering.kernels.window_gpu_plan import Sizes

MAX_WARPS = 8

# Keys of a tile: their logits take half as many registers of a thread. Windows of 64 tokens are one tile.
MAX_TILE_KEYS = 64
# What a tile of keys costs beside its keys, in keys: barriers, maxima, rescaling.
TILE_COST = 16
# The results of a value this wide take half as many registers.
MAX_HEAD_DIM = 128

# A threadgroup reads at least so many bytes at each pixel, where there are as many heads: DRAM gives no less at a time.
PIXEL_BYTES = 64

# Windows that a threadgroup goes through, one being fetched while another is computed. Reading a bias once for all of
# them costs a tenth of their own bytes at head_dim 32; more of them would leave few rounds of threadgroups.
MAX_RUN = 5

OPERANDS = frozenset(
    {"query", "key", "value", "bias", "mask", "logit_bias", "relative_position", "key_padding", "value_padding"}
)


@dataclass(frozen=True)
class TensorTiling:
    """How one threadgroup divides a window. A warp has 16 queries of one head.

    heads: neighbouring ones, of one window. warps: of each head. tile_keys: keys at a time, a multiple of 16.
    """

    sizes: Sizes
    heads: int
    warps: int
    tile_keys: int

    @property
    def tile_queries(self) -> int:
        return self.warps * STEP

    @property
    def query_tiles(self) -> int:
        return ceil_div(self.sizes.queries, self.tile_queries)

    @property
    def key_tiles(self) -> int:
        return ceil_div(self.sizes.keys, self.tile_keys)

    @property
    def threads(self) -> tuple[int, int]:
        return WARP, self.heads * self.warps

    @property
    def head_pitch(self) -> int:
        """Channels of query and key from head to head in shared memory; zeros fill them up."""
        return ceil_div(self.sizes.head_dim, STEP) * STEP

    @property
    def value_pitch(self) -> int:
        return ceil_div(self.sizes.value_dim, COLUMNS) * COLUMNS

    @property
    def query_tile(self) -> TileShape:
        return TileShape(self.tile_queries, self.heads * self.head_pitch, "float16")

    @property
    def key_tile(self) -> TileShape:
        return TileShape(self.tile_keys, self.heads * self.head_pitch, "float16")

    @property
    def value_tile(self) -> TileShape:
        return TileShape(self.tile_keys, self.heads * self.value_pitch, "float16")

    @property
    def product_tile(self) -> TileShape:
        """Products of the queries with relative positions, float32."""
        return TileShape(self.tile_queries, sum(axis.length for axis in self.sizes.relative))

    @property
    def shared_bytes(self) -> int:
        products = self.product_tile.size_bytes if self.sizes.relative else 0
        return self.shared_elements * ELEMENT_BYTES + products

    @property
    def shared_elements(self) -> int:
        """Of query, key and value."""
        return sum(tile.size_bytes for tile in (self.query_tile, self.key_tile, self.value_tile)) // ELEMENT_BYTES

    @property
    def is_padded(self) -> bool:
        """Whether some of the staged rows or channels are never copied."""
        sizes = self.sizes
        whole_tokens = sizes.queries % self.tile_queries == 0 and sizes.keys % self.tile_keys == 0
        return not whole_tokens or sizes.head_dim != self.head_pitch or sizes.value_dim != self.value_pitch

    def padded_products(self) -> int:
        """Logits that are computed for one head of one window."""
        return self.query_tiles * self.tile_queries * self.key_tiles * self.tile_keys

    def work(self) -> int:
        """The same, and what tiles of keys cost beside."""
        return self.query_tiles * self.tile_queries * self.key_tiles * (self.tile_keys + TILE_COST)


@functools.cache
def choose_tiling(sizes: Sizes, num_heads: int, limits: Limits) -> TensorTiling | None:
    """The least work, then the fewest readings of keys, then the fewest tiles; None where nothing fits.

    num_heads: that may share a threadgroup, 1 where they read different pixels or have products of their own. Small
    windows leave warps for several heads: as many as make up a piece of memory, and four warps.
    """
    rows = ceil_div(sizes.queries, STEP)
    # Products with relative positions take registers: half as many warps leave room for more threadgroups.
    fewest, most = min(rows, MAX_WARPS // 2), min(rows, MAX_WARPS // 2 if sizes.relative else MAX_WARPS)
    candidates = []
    for warps, tile_keys in itertools.product(range(1, most + 1), range(STEP, MAX_TILE_KEYS + 1, STEP)):
        tiling = TensorTiling(sizes, 1, warps, tile_keys)
        if tiling.shared_bytes <= limits.shared_bytes:
            candidates.append(tiling)
    if not candidates:
        return None
    best = min(candidates, key=lambda t: (t.warps < fewest, t.work(), t.query_tiles, t.key_tiles))
    for heads in range(1, num_heads + 1):
        wider = TensorTiling(sizes, heads, best.warps, best.tile_keys)
        fits = wider.shared_bytes <= limits.shared_bytes and heads * best.warps <= MAX_WARPS
        if not fits:
            break
        if num_heads % heads == 0:
            best = wider
            if heads * sizes.head_dim * ELEMENT_BYTES >= PIXEL_BYTES and heads * best.warps >= MAX_WARPS // 2:
                break
    return best


def tiling_of(
    spec: FlashWindowAttention, shapes: Mapping[str, Sequence[Any]], dtype: str, target: Target
) -> TensorTiling | None:
    """The tiling of an op; shapes of its operands by name."""
    sizes = Sizes.of(spec, shapes, dtype)
    heads = spec.num_heads if len(spec.runs_of_heads()) == 1 and not sizes.relative else 1
    return choose_tiling(sizes, heads, Limits.of(target))


def takes(spec: FlashWindowAttention, shapes: Mapping[str, Sequence[Any]], dtype: str, target: Target) -> bool:
    """Whether the tensor-core kernel computes this op; else `window_gpu` does.

    It does for float16 from sm_75 on, and bfloat16 from sm_80 on; with heads of an even number of channels, at most
    128; relative positions with a table for each axis; and none of the operands that only `window_gpu` has.
    """
    if not (OPERANDS.issuperset(shapes) and has_tensor_cores(target, dtype)):
        return False
    widths = [int(shapes[name][-1]) // spec.num_heads for name in ("query", "value")]
    if any(width % 2 or width > MAX_HEAD_DIM for width in widths):
        return False
    tiling = tiling_of(spec, shapes, dtype, target)
    return tiling is not None and len(tiling.sizes.relative) != 1


def choose_run(tiling: TensorTiling, num_windows: int, heads: int, batch: Expr | int, limits: Limits) -> Expr | int:
    """Windows that a threadgroup goes through one after the other; found at run time where the batch is."""
    if tiling.key_tiles > 1:
        return 1
    return limits.run(batch * (num_windows * (heads // tiling.heads) * tiling.query_tiles), MAX_RUN)
