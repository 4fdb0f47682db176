"""Random windows on maps of one to three axes: windows, shifted windows, grids, stripes, blocks of a sequence, clips;
whole attention operators, rotary and relative positions, causal windows.

Letters: B batch, G = B*nW groups, N queries and M keys per window, nW windows, C channels, nH heads, d head_dim.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.localattention.geometry import WindowGeometry
from tests.models import onnx_movement
from tests.models import onnx_parts as plain
from tests.models.onnx_builder import Builder
from tests.models.onnx_spellings import WINDOW
from tests.models.onnx_windows import CHANNELS, Heads, OnLogits, Triple, WindowSpelling
from tests.property import movement, parts
from tests.property.movement import Moves

ROLLS = [
    onnx_movement.roll_by_slices,
    onnx_movement.roll_columns_first,
    onnx_movement.roll_by_split,
    onnx_movement.roll_by_gather,
    onnx_movement.roll_by_repeat,
]
HEADS_OF = [
    plain.heads_by_gather,
    plain.heads_by_slices,
    plain.heads_by_split,
    plain.heads_by_chunk,
    plain.heads_separate,
    plain.heads_interleaved,
    plain.heads_last,
    parts.heads_of_multi_head,
    parts.heads_in_front,
]
LOGITS = [
    plain.logits_scaled_query,
    plain.logits_scaled_key,
    plain.logits_scaled,
    plain.logits_divided,
    plain.logits_square_roots,
    plain.logits_sum,
    plain.logits_transposed_twice,
    plain.logits_einsum,
]
WEIGHTINGS = [plain.weighting_matmul, plain.weighting_sum, plain.weighting_transposed, plain.weighting_einsum]
SOFTMAXES = [
    plain.softmax_axis_3,
    plain.softmax_then_identity,
    plain.softmax_of_exponentials,
    plain.softmax_by_reciprocal,
    plain.softmax_by_logsumexp,
]


MASKS = [plain.mask_added, plain.mask_where, plain.mask_where_allowed]
MASKS_OF_A_BATCH = [plain.mask_four_axes, plain.mask_added_for_batch]
# From the opset on that has the operator.
OPERATORS = {
    parts.standard_operator: 23,
    parts.standard_operator_of_tokens: 23,
    parts.multi_head_operator: 13,
    parts.fused_products: 13,
}


@dataclass(frozen=True)
class Block(WindowSpelling):
    """Windows whose attention is written by `attention`; the rest as in WindowSpelling.

    added: what is added to the logits, in order; constants: the same as arrays [1 or nW, nH or 1, N, M], for operators
    that take it whole. relative: a term of the queries. asked: the windows of the queries, and of the output, where
    they are not those of the keys; queries, keys: N and M. residual: the map is added to the output.
    """

    attention: parts.Attention = parts.written_out
    added: tuple[OnLogits, ...] = ()
    constants: tuple[np.ndarray, ...] = ()
    relative: parts.OnQuery | None = None
    asked: WindowGeometry | None = None
    queries: int = 0
    keys: int = 0
    residual: bool = True

    @property
    def added_mask(self) -> np.ndarray | None:
        return self.mask_values

    def shape(self, batch: int | str) -> list[int | str]:
        size, layout = self.geometry.feature_size, self.moves.layout
        if layout == "tokens":
            return [batch, math.prod(size), CHANNELS]
        return [batch, CHANNELS, *size] if layout == "first" else [batch, *size, CHANNELS]

    @property
    def moves(self) -> Moves:
        assert isinstance(self.movement, Moves)
        return self.movement

    def block(self, g: Builder, x: str) -> str:
        tokens = self.moves.enter(g, x, self.geometry, CHANNELS)
        q, k, v = self.heads(g, self, tokens)
        attended = g.transpose(self.attention(g, q, k, v, self), 0, 2, 1, 3)
        tokens = g.reshape(attended, -1, self.queries, CHANNELS)
        out = g.linear(tokens, self.weights.proj, self.weights.proj_bias)
        y = self.moves.leave(g, out, self.asked or self.geometry, CHANNELS)
        return g.op("Add", x, y) if self.residual else y


BLOCK = Block(
    heads=plain.heads_by_gather,
    logits=plain.logits_scaled,
    weighting=plain.weighting_matmul,
    bias=None,
    mask=None,
    softmax=plain.softmax_axis_3,
    scale=WINDOW.scale,
)


def geometry_of(r: random.Random, kind: str) -> WindowGeometry:
    """A geometry of each kind: its map is small, two to three windows along an axis."""
    match kind:
        case "blocks":
            window: tuple[int, ...] = (r.randint(3, 8),)
            size: tuple[int, ...] = (window[0] * r.randint(2, 3),)
        case "stripe":
            wide, at = r.randint(4, 7), r.randrange(2)
            side = r.randint(1, 2)
            window = (side, wide) if at else (wide, side)
            long = side * r.randint(2, 4)
            size = (long, wide) if at else (wide, long)
        case "clip":
            window = (r.randint(1, 2), r.randint(2, 3), r.randint(2, 3))
            size = tuple(w * r.choice([1, 2, 2]) if a == 0 else w * 2 for a, w in enumerate(window))
        case _:
            window = (r.randint(2, 5), r.randint(2, 5))
            size = tuple(w * r.randint(2, 3) for w in window)
    shift = (0,) * len(window)
    if kind in ("window", "clip", "blocks") and r.random() < 0.5:
        shift = tuple(r.randrange(w) if w < s else 0 for w, s in zip(window, size, strict=True))
    padded = False
    if kind in ("window", "clip") and r.random() < 0.25:
        size = tuple(s - r.randrange(min(w, 2)) for s, w in zip(size, window, strict=True))
        padded = r.random() < 0.5
    geometry = WindowGeometry(size, window, shift)
    if padded and geometry.is_padded and any(shift):
        geometry = replace(geometry, shift_padded=True)
    return geometry


def moves_of(r: random.Random, geometry: WindowGeometry, batch: int | str, spread: bool = False) -> Moves:
    partitions = list(movement.PARTITIONS)
    if isinstance(batch, int):
        partitions.append(movement.by_as_strided(batch))
    layout = r.choice(["last", "last", "first", "tokens"])
    return Moves(r.choice(partitions), r.choice(movement.MERGES), r.choice(ROLLS), spread, layout)


def movement_names(moves: Moves, geometry: WindowGeometry) -> list[str]:
    """What counts as drawn of the movement."""
    names = [f"movement/{f.__qualname__.split('.')[0]}" for f in (moves.partition, moves.merge)]
    if any(geometry.shift_size) and moves.roll is not None:
        names.append(f"movement/{moves.roll.__qualname__}")
    padded = ["block/padded"] if geometry.is_padded else []
    return [*names, f"layout/{moves.layout}", f"block/axes/{len(geometry.window_size)}", *padded]


def draw_block(r: random.Random, opset: int) -> tuple[Block, list[str]]:
    """Windows on a map of one to three axes and the names of their parts."""
    kind = r.choice(["window", "window", "grid", "stripe", "blocks", "clip"])
    geometry = geometry_of(r, kind)
    batch = r.choice([1, 2, "batch"])
    moves = moves_of(r, geometry, batch, kind == "grid")
    size = geometry.tokens_per_window
    names = [f"block/{kind}", f"batch/{batch}", *movement_names(moves, geometry)]
    attention = r.choice([parts.written_out, parts.written_out, parts.folded_heads, *_operators(opset)])
    heads = r.choice(HEADS_OF)
    spelling = replace(
        BLOCK,
        heads=heads,
        logits=r.choice([f for f in LOGITS if opset >= 12 or f is not plain.logits_einsum]),
        weighting=r.choice([f for f in WEIGHTINGS if opset >= 12 or f is not plain.weighting_einsum]),
        softmax=r.choice(SOFTMAXES),
        geometry=geometry,
        movement=moves,
        batch=batch,
        opset=opset,
        attention=attention,
        queries=size,
        keys=size,
    )
    names += [f"attention/{attention.__name__}", f"heads/{heads.__name__}"]
    if attention is parts.written_out:
        written = (spelling.logits, spelling.weighting, spelling.softmax)
        names += [f"{field}/{f.__name__}" for field, f in zip(("logits", "weighting", "softmax"), written, strict=True)]
        if opset >= 12 and r.random() < 0.2:
            spelling = replace(spelling, relative=r.choice(parts.RELATIVE))
            names.append(f"relative/{spelling.relative.__name__}")  # type: ignore[union-attr]
    if not geometry.is_padded and r.random() < 0.25:  # turned padding is another vector at every place
        turn = r.choice(parts.ROTARY)
        spelling = replace(spelling, heads=turned(heads, turn))
        names.append(f"rotary/{turn.__name__}")
    return with_terms(r, spelling, names)


def _operators(opset: int) -> list[parts.Attention]:
    return [operator for operator, first in OPERATORS.items() if opset >= first]


def with_terms(r: random.Random, spelling: Block, names: list[str]) -> tuple[Block, list[str]]:
    """The block with a bias and a mask, one of them, or none, in either order."""
    geometry, batch = spelling.geometry, spelling.batch
    whole = spelling.attention in OPERATORS and spelling.attention is not parts.fused_products
    terms: list[OnLogits] = []
    constants: list[np.ndarray] = []
    if r.random() < 0.6:
        bias = r.choice(parts.BIASES)
        terms.append(bias)
        constants.append(parts.bias_values(spelling)[None])
        names.append(f"bias/{'operand' if whole else bias.__name__}")
    masked = r.random()
    if geometry.crosses_regions().any() and masked < 0.7 and (batch != "batch" or not whole):
        lowest = r.choice([-100.0, -np.inf, float(np.finfo(np.float32).min)])
        masks = MASKS if np.isneginf(lowest) else MASKS[:1]
        mask = r.choice([*masks, *(MASKS_OF_A_BATCH if batch != "batch" else [])])
        spelling = replace(spelling, mask_values=np.where(geometry.crosses_regions(), lowest, 0.0))
        terms.append(mask)
        constants.append(np.where(geometry.crosses_regions(), lowest, 0.0)[:, None])
        names.append(f"mask/{'operand' if whole else mask.__qualname__.split('.')[0]}/{lowest:.0e}")
    elif masked < 0.2 and not any(geometry.shift_size):
        causal = r.choice(parts.CAUSAL)
        terms.append(causal)
        size = geometry.tokens_per_window
        constants.append(np.where(np.tri(size, dtype=bool), 0.0, -np.inf)[None, None])
        names.append(f"mask/{'operand-causal' if whole else causal.__name__}")
    if r.random() < 0.5:
        terms.reverse()
    return replace(spelling, added=tuple(terms), constants=tuple(constants)), names


def turned(heads: Heads, turn: parts.Turn) -> Heads:
    """Queries and keys turned by their places in the window."""

    def write(g: Builder, spelling: WindowSpelling, tokens: str) -> Triple:
        size = spelling.geometry.tokens_per_window
        q, k, v = heads(g, spelling, tokens)
        return turn(g, q, size), turn(g, k, size), v

    return write
