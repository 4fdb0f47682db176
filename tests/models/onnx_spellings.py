"""Local attention spelled by hand in ONNX, as tables for the matcher's tests: no torch, one model per entry.

    spelling = SPELLINGS["window-partition-by-strides"]
    spelling.model()               # onnx.ModelProto, input x, output y
    spelling.expected              # kind, geometry, bias, mask, num_heads, head_dim of each of its sites
    sample_input(spelling)         # {"x": array}
    spelling.evaluate(x)           # the output in float64, from the geometry's closed form

Extents differ on purpose: a map of 8 x 12, windows of 4 x 4, shift 2, 3 heads of 5 channels, batch 2; neighbourhoods on
a map of 7 x 11. STRETCH holds spellings a matcher may leave alone; what it does rewrite must still be right. The
spellings that look right and are not lie in onnx_near_misses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto

from attnrewrite.localattention.geometry import NeighborhoodGeometry, WindowGeometry
from tests.models import onnx_borders as borders
from tests.models import onnx_fused as fused
from tests.models import onnx_movement as movement
from tests.models import onnx_neighborhoods as neighborhoods
from tests.models import onnx_other_tools as other_tools
from tests.models import onnx_parts as parts
from tests.models import onnx_window_blocks as blocks
from tests.models.onnx_borders import BorderSpelling, DenseSpelling, Mask
from tests.models.onnx_halos import HALO_SPELLINGS
from tests.models.onnx_movement import Movement
from tests.models.onnx_neighborhoods import K3_BY_5, K5_DILATED, NeighborhoodSpelling
from tests.models.onnx_windows import CHANNELS, HEADS, PLAIN, SHIFTED, Expected, WindowSpelling


class Spelling(Protocol):
    """One way to write local attention."""

    @property
    def expected(self) -> Expected: ...
    @property
    def batch(self) -> int | str: ...
    @property
    def element_type(self) -> int: ...
    def shape(self, batch: int | str) -> list[int | str]: ...
    def model(self) -> onnx.ModelProto: ...
    def evaluate(self, x: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class WholeBlock:
    """A block written in one piece that computes what `like` computes; as_tokens: its map is `[B, H*W, C]`."""

    build: Callable[[], onnx.ModelProto]
    like: WindowSpelling
    as_tokens: bool = False
    num_heads: int = HEADS

    @property
    def expected(self) -> Expected:
        return replace(self.like.expected, num_heads=self.num_heads)

    @property
    def batch(self) -> int | str:
        return self.like.batch

    @property
    def element_type(self) -> int:
        return self.like.element_type

    def shape(self, batch: int | str) -> list[int | str]:
        return [batch, 8 * 12, CHANNELS] if self.as_tokens else self.like.shape(batch)

    def model(self) -> onnx.ModelProto:
        return self.build()

    def evaluate(self, x: np.ndarray) -> np.ndarray:
        return self.like.evaluate(x.reshape(-1, 8, 12, CHANNELS)).reshape(x.shape)


def sample_input(spelling: Spelling, batch: int = 2, seed: int = 5) -> dict[str, np.ndarray]:
    """Random inputs by name, in the model's element type."""
    shape = [batch if isinstance(extent, str) else int(extent) for extent in spelling.shape(spelling.batch)]
    dtype = np.float16 if spelling.element_type == TensorProto.FLOAT16 else np.float32
    return {"x": np.random.default_rng(seed).normal(size=shape).astype(dtype)}


WINDOW = WindowSpelling(
    heads=parts.heads_by_gather,
    logits=parts.logits_scaled_query,
    weighting=parts.weighting_matmul,
    bias=parts.bias_constant,
    mask=parts.mask_added,
    softmax=parts.softmax_last,
)
UNSHIFTED = replace(WINDOW, geometry=PLAIN, mask=None)
NEIGHBORHOOD = NeighborhoodSpelling()


def _window(**changes: Any) -> WindowSpelling:
    return replace(WINDOW, **changes)


def _moved(**changes: Any) -> WindowSpelling:
    return replace(WINDOW, movement=Movement(**changes))


def _padded(shift_padded: bool, **changes: Any) -> WindowSpelling:
    """A map of 7 x 10 in windows of 4 x 4."""
    return replace(WINDOW, geometry=WindowGeometry((7, 10), (4, 4), (2, 2), shift_padded), **changes)


def _masked(values: float, **changes: Any) -> WindowSpelling:
    """Shifted windows whose mask adds `values` across regions."""
    mask_values = np.where(SHIFTED.crosses_regions(), values, 0.0)
    return replace(WINDOW, mask_values=mask_values, **changes)


def _near(**changes: Any) -> NeighborhoodSpelling:
    return replace(NEIGHBORHOOD, **changes)


def _almost_shift_mask() -> np.ndarray:
    mask = np.where(SHIFTED.crosses_regions(), -100.0, 0.0)
    mask[-1, 3, 7] = -50.0
    return mask


NCHW = Movement(movement.nchw_partition_by_reshape, movement.nchw_merge_by_reshape, axes=(2, 3))
SPACE_TO_DEPTH = Movement(movement.nchw_partition_by_space_to_depth, movement.nchw_merge_by_depth_to_space, axes=(2, 3))
FOLDED = Movement(movement.nchw_partition_by_reshape, movement.nchw_merge_by_fold, axes=(2, 3))

SYMBOLIC = _window(batch="batch")
CAUSAL = np.broadcast_to(np.where(np.tri(16, dtype=bool), 0.0, -np.inf), (6, 16, 16))

WINDOW_SPELLINGS: dict[str, Spelling] = {
    "shifted": WINDOW,
    "unshifted": UNSHIFTED,
    # Shift.
    "roll-columns-first": _moved(roll=movement.roll_columns_first),
    "roll-by-split": _moved(roll=movement.roll_by_split),
    "roll-by-gather": _moved(roll=movement.roll_by_gather),
    "roll-by-repeat": _moved(roll=movement.roll_by_repeat),
    "roll-by-quadrants": _moved(roll=movement.roll_by_quadrants),
    "roll-by-wrap-pad": _window(movement=Movement(roll=movement.roll_by_wrap_pad), opset=19),
    # Partition and merge.
    "partition-in-two-steps": _moved(partition=movement.partition_in_two_steps, merge=movement.merge_in_two_steps),
    "partition-by-slices": _moved(partition=movement.partition_by_slices, merge=movement.merge_by_slices),
    "partition-by-split": _moved(partition=movement.partition_by_split, merge=movement.merge_by_split),
    "partition-by-strides": _moved(partition=movement.partition_by_strides),
    "partition-by-unfold": _moved(partition=movement.partition_by_unfold),
    "partition-by-flat-gather": _moved(
        partition=movement.partition_by_flat_gather, merge=movement.merge_by_flat_gather, roll=None
    ),
    "nchw": _window(movement=NCHW),
    "nchw-project-map": _window(movement=NCHW, project="map"),
    "nchw-space-to-depth": _window(movement=SPACE_TO_DEPTH),
    "nchw-space-to-depth-project-map": _window(movement=SPACE_TO_DEPTH, project="map"),
    "nchw-merge-by-fold": _window(movement=FOLDED, opset=18),
    "project-map": _window(project="map"),
    "project-map-chunk": _window(project="map", heads=parts.heads_by_chunk),
    # Heads.
    "heads-by-slices": _window(heads=parts.heads_by_slices),
    "heads-by-split": _window(heads=parts.heads_by_split),
    "heads-by-chunk": _window(heads=parts.heads_by_chunk),
    "heads-separate": _window(heads=parts.heads_separate),
    "heads-by-gemm": _window(heads=parts.heads_by_gemm),
    "heads-interleaved": _window(heads=parts.heads_interleaved),
    "heads-last": _window(heads=parts.heads_last),
    "pointwise-in-windows": _window(heads=parts.after_pointwise(parts.heads_by_gather)),
    # Logits and scale.
    "scale-on-key": _window(logits=parts.logits_scaled_key),
    "scale-on-logits": _window(logits=parts.logits_scaled),
    "scale-first-operand": _window(logits=parts.logits_scale_first),
    "scale-by-division": _window(logits=parts.logits_divided),
    "scale-query-by-division": _window(logits=parts.logits_divided_query),
    "scale-square-roots": _window(logits=parts.logits_square_roots),
    "unscaled": _window(logits=parts.logits_unscaled, scale=1.0),
    "logits-einsum": _window(logits=parts.logits_einsum, weighting=parts.weighting_einsum),
    "logits-einsum-spaced": _window(logits=parts.logits_einsum_spaced),
    "logits-mul-reduce-sum": _window(logits=parts.logits_sum, weighting=parts.weighting_sum),
    "logits-bmm": _window(logits=parts.logits_bmm),
    "logits-transposed-twice": _window(logits=parts.logits_transposed_twice),
    "weighting-transposed": _window(weighting=parts.weighting_transposed),
    # Bias.
    "no-bias": _window(bias=None),
    "no-bias-no-mask": _window(bias=None, mask=None),
    "bias-first-operand": _window(bias=parts.bias_first),
    "bias-gathered": _window(bias=parts.bias_gathered),
    "bias-subtracted": _window(bias=parts.bias_subtracted),
    # Mask.
    "shifted-without-mask": _window(mask=None),
    "mask-before-bias": _window(mask_first=True),
    "mask-minus-infinity": _masked(-np.inf),
    "mask-where": _masked(-np.inf, mask=parts.mask_where),
    "mask-where-allowed": _masked(-np.inf, mask=parts.mask_where_allowed),
    "mask-lowest-float": _masked(float(np.finfo(np.float32).min)),
    "mask-computed-from-constants": _window(mask=parts.mask_computed),
    "mask-for-whole-batch": _window(mask=parts.mask_added_for_batch),
    "mask-four-axes": _window(mask=parts.mask_four_axes),
    "mask-almost-shift": _window(mask_values=_almost_shift_mask(), mask_kind="constant"),
    # Softmax.
    "softmax-axis-3": _window(softmax=parts.softmax_axis_3),
    "softmax-transposed": _window(softmax=parts.softmax_transposed),
    "softmax-then-identity": _window(softmax=parts.softmax_then_identity),
    "softmax-guarded": _window(softmax=parts.softmax_guarded),
    "softmax-guarded-without-mask": replace(UNSHIFTED, softmax=parts.softmax_guarded),
    "softmax-of-exponentials": _window(softmax=parts.softmax_of_exponentials),
    "softmax-of-exponentials-unmasked": replace(UNSHIFTED, softmax=parts.softmax_of_exponentials),
    "softmax-of-plain-exponentials": _window(softmax=parts.softmax_of_plain_exponentials),
    "softmax-by-reciprocal": _window(softmax=parts.softmax_by_reciprocal),
    "softmax-by-expanded-sum": _window(softmax=parts.softmax_by_expanded_sum),
    "softmax-by-logsumexp": _window(softmax=parts.softmax_by_logsumexp),
    "softmax-by-log-of-sum": _window(softmax=parts.softmax_by_log_of_sum),
    "softmax-by-logsoftmax": _window(softmax=parts.softmax_by_logsoftmax),
    "softmax-less-maximum": _window(softmax=parts.softmax_less_maximum),
    "softmax-of-exponentials-opset-12": _window(softmax=parts.softmax_of_exponentials, opset=12),
    "softmax-of-exponentials-opset-20": _window(softmax=parts.softmax_of_exponentials, opset=20),
    # Geometry.
    "rectangular-window": _window(geometry=WindowGeometry((8, 12), (4, 3), (2, 1))),
    "shift-of-one-axis": _window(geometry=WindowGeometry((8, 12), (4, 4), (0, 2))),
    "uneven-shift": _window(geometry=WindowGeometry((8, 12), (4, 4), (1, 3))),
    "one-window-per-row": _window(geometry=WindowGeometry((8, 12), (4, 12), (2, 0))),
    "square-map": _window(geometry=WindowGeometry((16, 16), (4, 4), (2, 2))),
    "pad-then-shift": _padded(True),
    "pad-then-shift-project-map": _padded(True, project="map"),
    "shift-then-pad": _padded(False),
    "shift-then-pad-project-map": _padded(False, project="map"),
    "padded-unshifted": replace(UNSHIFTED, geometry=WindowGeometry((7, 10), (4, 4), (0, 0))),
    "pad-then-shift-nchw": _padded(True, movement=NCHW),
    # Batch, opset, element type.
    "batch-one": _window(batch=1),
    "batch-symbolic": _window(batch="batch"),
    "batch-symbolic-nchw": _window(batch="batch", movement=NCHW, project="map"),
    "opset-11": _window(opset=11, softmax=parts.softmax_axis_3),
    "opset-12": _window(opset=12, softmax=parts.softmax_axis_3, heads=parts.heads_by_split),
    "opset-20": _window(opset=20),
    "opset-23": _window(opset=23),
    "float16": _window(element_type=TensorProto.FLOAT16),
    "float16-softmax-in-float32": _window(element_type=TensorProto.FLOAT16, softmax=parts.softmax_in_float32),
    # Written whole.
    "windows-as-axes": WholeBlock(blocks.windows_as_axes, UNSHIFTED),
    "one-transpose-each": WholeBlock(blocks.one_transpose_each, UNSHIFTED),
    "windows-before-batch": WholeBlock(blocks.windows_before_batch, UNSHIFTED),
    "softmax-written-out": WholeBlock(blocks.softmax_written_out, UNSHIFTED),
    "attention-23-of-tokens": WholeBlock(fused.standard_of_tokens, UNSHIFTED),
    "attention-23-of-heads": WholeBlock(fused.standard_of_heads, UNSHIFTED),
    "attention-23-causal": WholeBlock(
        fused.standard_causal,
        replace(UNSHIFTED, bias=None, mask=parts.mask_added, mask_values=CAUSAL, mask_kind="constant"),
    ),
    "attention-23-boolean-mask": WholeBlock(fused.standard_with_boolean_mask, _masked(-np.inf, bias=None)),
    "onnxruntime-attention": WholeBlock(fused.packed_with_weights, UNSHIFTED),
    "onnxruntime-multi-head": WholeBlock(fused.multi_head, UNSHIFTED),
    "onnxruntime-multi-head-of-heads": WholeBlock(fused.multi_head_of_heads, UNSHIFTED),
    "onnxruntime-fused-products": WholeBlock(fused.fused_products, UNSHIFTED),
    "keras-shifted": WholeBlock(other_tools.keras_shifted, SYMBOLIC),
    "keras-multi-head": WholeBlock(other_tools.keras_multi_head, replace(UNSHIFTED, batch="batch")),
    "paddle-shifted": WholeBlock(other_tools.paddle_shifted, SYMBOLIC),
    "tokens-in-and-out": WholeBlock(blocks.tokens_in_and_out, WINDOW, as_tokens=True),
}

NEIGHBORHOOD_SPELLINGS: dict[str, Spelling] = {
    "slices": NEIGHBORHOOD,
    "slices-of-both-axes": _near(gathering=neighborhoods.by_slices_of_both_axes),
    "rows-then-columns": _near(gathering=neighborhoods.by_rows_then_columns),
    "shifting-the-map": _near(gathering=neighborhoods.by_shifting_the_map),
    "unfold": _near(gathering=neighborhoods.by_unfold),
    "tensor-unfold": _near(gathering=neighborhoods.by_tensor_unfold),
    "flat-gather": _near(gathering=neighborhoods.by_flat_gather),
    "one-hot-convolution": _near(gathering=neighborhoods.by_convolution),
    "one-hot-convolution-per-head": _near(gathering=neighborhoods.by_convolution_per_head),
    "one-hot-convolution-padded-before": _near(gathering=neighborhoods.by_padded_convolution),
    "extract-patches": _near(gathering=neighborhoods.by_patches),
    "extract-patches-k3-by-5-channels-last": _near(
        geometry=NeighborhoodGeometry((7, 11), (3, 5), (1, 1)),
        gathering=neighborhoods.by_patches,
        attention=neighborhoods.attend_by_matmul,
        channels_last=True,
    ),
    "keeping-axes": _near(attention=neighborhoods.attend_keeping_axes),
    "einsum": _near(attention=neighborhoods.attend_by_einsum),
    "matmul": _near(attention=neighborhoods.attend_by_matmul),
    "pixels-in-batch": _near(attention=neighborhoods.attend_pixels_in_batch),
    "unfold-matmul": _near(gathering=neighborhoods.by_unfold, attention=neighborhoods.attend_by_matmul),
    "unfold-einsum-bias": _near(gathering=neighborhoods.by_unfold, attention=neighborhoods.attend_by_einsum, bias=True),
    "scale-on-key": _near(scaled="key"),
    "unscaled": _near(scaled="none"),
    "bias": _near(bias=True),
    "bias-keeping-axes": _near(attention=neighborhoods.attend_keeping_axes, bias=True),
    "bias-matmul": _near(attention=neighborhoods.attend_by_matmul, bias=True),
    "key-bias": _near(key_bias=True, attention=neighborhoods.attend_keeping_axes),
    "k5-dilated": _near(geometry=K5_DILATED),
    "k5-dilated-unfold": _near(geometry=K5_DILATED, gathering=neighborhoods.by_unfold),
    "k5-dilated-one-hot-convolution": _near(geometry=K5_DILATED, gathering=neighborhoods.by_convolution),
    "k3-by-5": _near(geometry=K3_BY_5),
    "k3-by-5-rows-then-columns": _near(geometry=K3_BY_5, gathering=neighborhoods.by_rows_then_columns),
    "k7-unfold": _near(geometry=NeighborhoodGeometry((9, 11), (7, 7), (1, 1)), gathering=neighborhoods.by_unfold),
    "channels-last": _near(channels_last=True),
    "channels-last-unfold-matmul": _near(
        channels_last=True, gathering=neighborhoods.by_unfold, attention=neighborhoods.attend_by_matmul
    ),
    "slide-two-convolutions": _near(learned="two-convolutions", attention=neighborhoods.attend_keeping_axes),
    "slide-one-convolution": _near(learned="one-convolution", attention=neighborhoods.attend_keeping_axes),
    "slide-key-bias": _near(learned="two-convolutions", attention=neighborhoods.attend_keeping_axes, key_bias=True),
    "slide-k3-by-5": _near(learned="two-convolutions", geometry=K3_BY_5),
    "batch-symbolic": _near(batch="batch", gathering=neighborhoods.by_unfold),
    "opset-11": _near(opset=11, attention=neighborhoods.attend_by_matmul),
    "opset-20": _near(opset=20),
    "float16": _near(element_type=TensorProto.FLOAT16, gathering=neighborhoods.by_unfold),
}


def _bordered(kernel: tuple[int, ...], border: str, *, mask: Mask = "none", **changes: Any) -> BorderSpelling:
    geometry = {name: changes.pop(name) for name in ("stride", "key_size", "offset") if name in changes}
    size, dilation = changes.pop("size", (7, 11)), changes.pop("dilation", (1, 1))
    return BorderSpelling(
        geometry=NeighborhoodGeometry(size, kernel, dilation, border, **geometry), mask=mask, **changes
    )


def _dense(geometry: NeighborhoodGeometry, **changes: Any) -> DenseSpelling:
    bias = "constant" if changes.get("bias") else "none"
    return DenseSpelling(Expected("neighborhood", geometry, bias, "constant"), geometry.pixels(), **changes)


BORDER_SPELLINGS: dict[str, Spelling] = {
    "replicated": _bordered((3, 3), "replicate", gathering=borders.by_padding("edge")),
    "replicated-bias": _bordered((3, 5), "replicate", gathering=borders.by_padding("edge"), bias=True),
    "reflected": _bordered((5, 3), "reflect", gathering=borders.by_padding("reflect"), dilation=(1, 2)),
    "wrapped-by-concat": _bordered((3, 5), "wrap", gathering=borders.by_wrapping, bias=True),
    "wrapped-by-gather": _bordered((3, 3), "wrap", gathering=borders.by_table, dilation=(2, 1)),
    "constant": _bordered((3, 3), "constant", gathering=borders.by_padding("constant", 1.25), pad_value=1.25),
    "excluded": _bordered((3, 3), "exclude", gathering=borders.by_padding("constant"), mask="add"),
    "excluded-where": _bordered((3, 3), "exclude", gathering=borders.by_padding("constant"), mask="where", bias=True),
    "excluded-where-allowed": _bordered((3, 5), "exclude", gathering=borders.by_table, mask="where-allowed"),
    "excluded-lowest": _bordered((3, 3), "exclude", gathering=borders.by_table, mask="lowest", pixel_bias=True),
    "excluded-edge-padded": _bordered((3, 3), "exclude", gathering=borders.by_padding("edge"), mask="where"),
    "penalised": _bordered((3, 3), "zero", gathering=borders.by_padding("constant"), mask="-100"),
    "bias-per-pixel": _bordered((3, 3), "zero", gathering=borders.by_padding("constant"), pixel_bias=True),
    "inward": _bordered((3, 5), "inward", gathering=borders.by_table),
    "inward-by-axis": _bordered((3, 3), "inward", gathering=borders.by_axis_tables, bias=True),
    "inward-relative-bias": _bordered((5, 3), "inward", gathering=borders.by_table, pixel_bias=True),
    "inward-dilated": _bordered((3, 3), "inward", gathering=borders.by_table, dilation=(2, 3), pixel_bias=True),
    "inward-symbolic-batch": _bordered((3, 3), "inward", gathering=borders.by_table, pixel_bias=True, batch="batch"),
    "inward-float16": _bordered(
        (3, 3), "inward", gathering=borders.by_table, pixel_bias=True, element_type=TensorProto.FLOAT16
    ),
    "even": _bordered((2, 4), "zero", gathering=borders.by_padding("constant")),
    "off-centre": _bordered((3, 3), "zero", gathering=borders.by_padding("constant"), offset=(0, 0)),
    "causal-rows": _bordered((3, 3), "exclude", offset=(-2, -1), gathering=borders.by_padding("constant"), mask="add"),
    "strided": _bordered(
        (3, 3), "zero", size=(4, 6), key_size=(8, 12), stride=(2, 2), gathering=borders.by_padding("constant")
    ),
    "strided-inward": _bordered(
        (3, 3), "inward", size=(4, 5), key_size=(8, 15), stride=(2, 3), gathering=borders.by_table
    ),
    "of-one-axis": _bordered((5,), "inward", size=(13,), dilation=(1,), gathering=borders.by_table, pixel_bias=True),
    "of-one-axis-causal": _bordered(
        (4,), "exclude", size=(13,), dilation=(1,), offset=(-3,), gathering=borders.by_padding("constant"), mask="add"
    ),
    "of-three-axes": _bordered(
        (3, 3, 2), "inward", size=(3, 5, 4), dilation=(1, 1, 1), gathering=borders.by_table, pixel_bias=True
    ),
    "dense-band": _dense(NeighborhoodGeometry((29,), (5,), (1,), "exclude")),
    "dense-band-causal": _dense(NeighborhoodGeometry((29,), (4,), (1,), "exclude", offset=(-3,)), mask="where"),
    "dense-neighbourhood": _dense(NeighborhoodGeometry((7, 11), (3, 3), (1, 1), "exclude"), bias=True),
    "dense-inward": _dense(NeighborhoodGeometry((7, 11), (3, 5), (1, 1), "inward"), mask="where-allowed", bias=True),
    "dense-inward-of-three-axes": _dense(NeighborhoodGeometry((3, 5, 7), (3, 3, 3), (1, 1, 1), "inward")),
    "dense-lowest": _dense(NeighborhoodGeometry((7, 11), (3, 3), (2, 2), "exclude"), mask="lowest", batch="batch"),
    "dense-wrapped": _dense(NeighborhoodGeometry((7, 11), (3, 3), (1, 1), "wrap"), bias=True, batch=1),
}

SPELLINGS: dict[str, Spelling] = {
    **{f"window-{name}": spelling for name, spelling in WINDOW_SPELLINGS.items()},
    **{f"halo-{name}": spelling for name, spelling in HALO_SPELLINGS.items()},
    **{f"neighborhood-{name}": spelling for name, spelling in NEIGHBORHOOD_SPELLINGS.items()},
    **{f"border-{name}": spelling for name, spelling in BORDER_SPELLINGS.items()},
}

STRETCH: dict[str, Spelling] = {
    "window-bias-and-mask-in-one": WholeBlock(blocks.bias_and_mask_in_one, WINDOW),
    "window-head-by-head": WholeBlock(blocks.head_by_head, UNSHIFTED, num_heads=1),
    "window-keys-in-another-order": WholeBlock(blocks.keys_in_another_order, UNSHIFTED),
    "window-padded-with-a-constant": _padded(True, movement=Movement(pad_value=0.75)),
}
