"""Random spellings: every part of window and neighbourhood attention written in a way drawn on its own.

    drawn = draw(7); drawn.model; drawn.parts       # parts: the names of what was drawn, for counting

The parts are those of tests.models (each a spelling people or exporters use); what the tables there pair by hand is
paired at random here, over random geometries, and varied by detours. One case in seven is an entry of the tables.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper

from attnrewrite.localattention.geometry import NeighborhoodGeometry, WindowGeometry
from tests.models import onnx_movement as movement
from tests.models import onnx_neighborhoods as neighborhoods
from tests.models import onnx_parts as parts
from tests.models.onnx_movement import Movement
from tests.models.onnx_neighborhoods import NeighborhoodSpelling
from tests.models.onnx_spellings import NCHW, SPACE_TO_DEPTH, SPELLINGS, WINDOW, Spelling
from tests.models.onnx_windows import WindowSpelling
from tests.property.detours import with_detours
from tests.property.draw_blocks import draw_block
from tests.property.draw_borders import draw_border, draw_dense, draw_halo
from tests.property.draw_keys import draw_agents, draw_extra, draw_pooled, draw_shared
from tests.property.draw_outlook import MOVEMENTS, draw_aggregation, draw_outlook

ROLLS = [
    movement.roll_by_slices,
    movement.roll_columns_first,
    movement.roll_by_split,
    movement.roll_by_gather,
    movement.roll_by_repeat,
    movement.roll_by_quadrants,
    movement.roll_by_wrap_pad,
]
PARTITIONS = [
    movement.partition_by_reshape,
    movement.partition_in_two_steps,
    movement.partition_by_slices,
    movement.partition_by_split,
    movement.partition_by_strides,
    movement.partition_by_unfold,
]
MERGES = [
    movement.merge_by_reshape,
    movement.merge_in_two_steps,
    movement.merge_by_slices,
    movement.merge_by_split,
]
HEADS = [
    parts.heads_by_gather,
    parts.heads_by_slices,
    parts.heads_by_split,
    parts.heads_by_chunk,
    parts.heads_separate,
    parts.heads_by_gemm,
    parts.heads_interleaved,
    parts.heads_last,
    parts.after_pointwise(parts.heads_by_gather),
]
LOGITS = [
    parts.logits_scaled_query,
    parts.logits_scaled_key,
    parts.logits_scaled,
    parts.logits_scale_first,
    parts.logits_divided,
    parts.logits_divided_query,
    parts.logits_square_roots,
    parts.logits_einsum,
    parts.logits_einsum_spaced,
    parts.logits_sum,
    parts.logits_transposed_twice,
]
WEIGHTINGS = [parts.weighting_matmul, parts.weighting_einsum, parts.weighting_sum, parts.weighting_transposed]
BIASES = [None, parts.bias_constant, parts.bias_first, parts.bias_gathered, parts.bias_subtracted]
SOFTMAXES = [
    parts.softmax_last,
    parts.softmax_axis_3,
    parts.softmax_transposed,
    parts.softmax_then_identity,
    parts.softmax_guarded,
    parts.softmax_of_exponentials,
    parts.softmax_of_plain_exponentials,
    parts.softmax_by_reciprocal,
    parts.softmax_by_expanded_sum,
    parts.softmax_by_logsumexp,
    parts.softmax_by_log_of_sum,
    parts.softmax_by_logsoftmax,
    parts.softmax_less_maximum,
]
GATHERINGS = [
    *MOVEMENTS,
    neighborhoods.by_convolution,
    neighborhoods.by_convolution_per_head,
    neighborhoods.by_padded_convolution,
]
ATTENTIONS = [
    neighborhoods.attend_by_sums,
    neighborhoods.attend_keeping_axes,
    neighborhoods.attend_by_einsum,
    neighborhoods.attend_by_matmul,
    neighborhoods.attend_pixels_in_batch,
]
OPSETS = [11, 12, 13, 14, 15, 16, 17, 17, 18, 19, 20, 21, 22, 23]


@dataclass(frozen=True)
class Drawn:
    """One random spelling; detours included in its model and its parts."""

    seed: int
    model: onnx.ModelProto
    parts: tuple[str, ...]

    def input(self, batch: int = 2) -> dict[str, np.ndarray]:
        """Random numbers for every input; a symbolic extent is `batch`."""
        rng, found = np.random.default_rng(self.seed), {}
        for value in self.model.graph.input:
            kind = value.type.tensor_type
            shape = [d.dim_value if d.HasField("dim_value") else batch for d in kind.shape.dim]
            found[value.name] = rng.normal(size=shape).astype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        return found


def draw(seed: int, detours: int = 6) -> Drawn:
    """The spelling of a seed, with up to that many detours."""
    r = random.Random(seed)
    source = r.choice(list(SOURCES))
    opset = r.choice([v for v in OPSETS if v >= FIRST_OPSET.get(source, 11)])
    model, names = SOURCES[source](r, opset)
    parted = any(n in PARTED for n in names)
    model, taken = with_detours(model, r, 0 if parted else r.randint(0, detours))
    return Drawn(seed, model, (f"source/{source}", *names, *(f"detour/{t}" for t in taken)))


Model = tuple[onnx.ModelProto, list[str]]


def draw_entry(r: random.Random, opset: int) -> Model:
    """An entry of the tables, which has an opset of its own."""
    name = r.choice(list(SPELLINGS))
    return SPELLINGS[name].model(), [f"table/{name}"]


def spelled(draw: Callable[[random.Random, int], tuple[Spelling, list[str]]]) -> Callable[[random.Random, int], Model]:
    def model(r: random.Random, opset: int) -> Model:
        spelling, names = draw(r, opset)
        return spelling.model(), [*names, f"opset/{opset}"]

    return model


def draw_window(r: random.Random, opset: int) -> tuple[WindowSpelling, list[str]]:
    """Windows of 2 to 6 a side, cyclic shifts, padding in either order, and a way to write each part."""
    window = (r.randint(2, 6), r.randint(2, 6))
    padded = r.random() < 0.3
    size = tuple(w * r.randint(2, 3) - (r.randrange(w) if padded else 0) for w in window)
    shift = tuple(r.randrange(w) for w in window) if r.random() < 0.6 else (0, 0)
    geometry = WindowGeometry((size[0], size[1]), window, (shift[0], shift[1]), padded and r.random() < 0.5)
    geometry = replace(geometry, shift_padded=geometry.shift_padded and geometry.is_padded and any(shift))
    batch = r.choice([1, 2, "batch"])
    movement_, moved = _movement(r, geometry, opset)
    masks = [None]
    if geometry.crosses_regions().any():
        masks = [None, parts.mask_added, parts.mask_where, parts.mask_where_allowed, parts.mask_computed]
        masks += [parts.mask_four_axes, parts.mask_added_for_batch] if batch != "batch" else []
    mask = r.choice(masks)
    project = r.choice(["tokens", "map"])
    heads = [h for h in HEADS if project == "tokens" or h in (parts.heads_by_gather, parts.heads_by_chunk)]
    softmaxes = [s for s in SOFTMAXES if opset >= 13 or s is not parts.softmax_transposed]
    logits = [f for f in LOGITS if opset >= 12 or "einsum" not in f.__name__]
    weightings = [f for f in WEIGHTINGS if opset >= 12 or "einsum" not in f.__name__]
    if geometry.tokens_per_window == 16:
        logits = [*logits, parts.logits_bmm]
    chosen: dict[str, Any] = {
        "heads": r.choice(heads),
        "logits": r.choice(logits),
        "weighting": r.choice(weightings),
        "bias": r.choice(BIASES),
        "mask": mask,
        "softmax": r.choice(softmaxes),
    }
    excluded = mask in (parts.mask_where, parts.mask_where_allowed) or (
        mask is not None and mask is not parts.mask_computed and r.random() < 0.3
    )
    mask_values = None
    if excluded:
        lowest = -np.inf if mask is not parts.mask_added or r.random() < 0.5 else float(np.finfo(np.float32).min)
        mask_values = np.where(geometry.crosses_regions(), lowest, 0.0)
    spelling = replace(
        WINDOW,
        **chosen,
        geometry=geometry,
        movement=movement_,
        project=project,
        scale=1.0 if chosen["logits"] is parts.logits_unscaled else WINDOW.scale,
        mask_first=r.random() < 0.5,
        mask_values=mask_values,
        batch=batch,
        opset=opset,
    )
    names = [f"window/{field}/{_name(f)}" for field, f in chosen.items()] + [f"window/movement/{m}" for m in moved]
    how = "padded" if geometry.is_padded else "whole"
    return spelling, [*names, f"batch/{batch}", f"window/{how}", f"window/project/{project}"]


def _movement(r: random.Random, geometry: WindowGeometry, opset: int) -> tuple[Movement, list[str]]:
    rolls = [f for f in ROLLS if opset >= 19 or f is not movement.roll_by_wrap_pad]
    roll = r.choice(rolls)
    layout = r.random()
    if layout < 0.15 and not geometry.is_padded:
        whole = Movement(movement.partition_by_flat_gather, movement.merge_by_flat_gather, None)
        return whole, ["flat_gather"]
    if layout < 0.25 and geometry.window_size[0] == geometry.window_size[1]:
        return replace(SPACE_TO_DEPTH, roll=roll), ["space_to_depth", _name(roll)]
    if layout < 0.4:
        return replace(NCHW, roll=roll), ["nchw", _name(roll)]
    partition, merge = r.choice(PARTITIONS), r.choice(MERGES)
    return Movement(partition, merge, roll), [_name(partition), _name(merge), _name(roll)]


def draw_neighborhood(r: random.Random, opset: int) -> tuple[NeighborhoodSpelling, list[str]]:
    """Neighbourhoods of 3 to 7 a side, dilated, with pure or learned shifts."""
    kernel = (r.choice([3, 3, 5, 7]), r.choice([3, 3, 5, 7]))
    dilation = (r.choice([1, 1, 2, 3]), r.choice([1, 1, 2, 3]))
    reach = [d * (k // 2) for k, d in zip(kernel, dilation, strict=True)]
    geometry = NeighborhoodGeometry((reach[0] + r.randint(3, 6), reach[1] + r.randint(3, 8)), kernel, dilation)
    attentions = [a for a in ATTENTIONS if opset >= 13 or a in (neighborhoods.attend_by_matmul,)]
    gathering, attention = r.choice(GATHERINGS), r.choice(attentions)
    learned = r.choice(["no", "no", "no", "one-convolution", "two-convolutions"])
    spelling = NeighborhoodSpelling(
        gathering,
        attention,
        geometry,
        scaled=r.choice(["query", "key", "none"]),
        bias=r.random() < 0.5,
        key_bias=r.random() < 0.2,
        learned=learned,
        channels_last=r.random() < 0.4,
        batch=r.choice([1, 2, "batch"]),
        opset=opset,
    )
    gathered = _name(gathering) if learned == "no" else f"learned-{learned}"
    names = [f"neighborhood/gathering/{gathered}", f"neighborhood/attention/{_name(attention)}"]
    return spelling, [*names, f"batch/{spelling.batch}", f"neighborhood/kernel/{kernel[0]}x{kernel[1]}"]


def _name(part: Callable[..., Any] | None) -> str:
    return "none" if part is None else part.__qualname__.split(".")[0]


SOURCES: dict[str, Callable[[random.Random, int], Model]] = {
    "table": draw_entry,
    "window": spelled(draw_window),
    "neighborhood": spelled(draw_neighborhood),
    "halo": spelled(draw_halo),
    "border": spelled(draw_border),
    "dense": spelled(draw_dense),
    "block": spelled(draw_block),
    "extra": spelled(draw_extra),
    "pooled": spelled(draw_pooled),
    "shared": spelled(draw_shared),
    "agents": spelled(draw_agents),
    "aggregation": draw_aggregation,
    "outlook": draw_outlook,
}
# The softmax of a border runs over axis 2 of 4, which opset 13 can say.
FIRST_OPSET = {"border": 13}
# Parts of several branches that must look alike: a detour of one of them keeps them apart.
PARTED = {"neighborhood/gathering/learned-two-convolutions", "aggregation/one_by_one"}
PARTED |= {f"table/{name}" for name, s in SPELLINGS.items() if getattr(s, "learned", "no") == "two-convolutions"}
