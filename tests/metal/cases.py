"""Specs the GPU kernels are tried on, small enough for the emulator. Extents of different axes differ on purpose."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention, Spec
from attnrewrite.localattention.geometry import KeyWindows, NeighborhoodGeometry, WindowGeometry
from tests.functions.test_predicted_weights import CASES as PREDICTED
from tests.functions.test_predicted_weights import op

Operands = dict[str, np.ndarray]

BATCHED = ("query", "key", "value", "logits")


@dataclass(frozen=True)
class Case:
    """A spec and its operands; with `symbolic`, the kernel is built for any batch."""

    spec: Spec
    operands: Operands = field(repr=False)
    symbolic: bool = False

    def shapes(self, batch: Any) -> dict[str, tuple[Any, ...]]:
        """The operands' shapes, with `batch` in place of the batched ones' first extent where it is symbolic."""
        return {
            name: (batch, *operand.shape[1:]) if self.symbolic and name in BATCHED else operand.shape
            for name, operand in self.operands.items()
        }


def window(
    feature: tuple[int, ...],
    window_size: tuple[int, ...],
    shift: tuple[int, ...],
    heads: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    batch: int = 2,
    bias: str = "",
    mask: bool = False,
    mask_value: float | None = None,
    padding: bool = False,
    shift_padded: bool = False,
    symbolic: bool = False,
    dtype: str = "float32",
    keys: KeyWindows | None = None,
    shared_query: bool = False,
    head_shifts: tuple[tuple[int, ...], ...] = (),
    relative: str = "",
    logit_bias: tuple[int, ...] = (),
    extra_keys: tuple[int, ...] = (),
    extra_queries: tuple[int, ...] = (),
) -> Case:
    """bias: "" | "shared" | "own" (one for each window). mask: a tensor with -inf, though never for a whole row.

    relative: "" | "axes" | "axes of all heads" (one table for them) | "pairs". logit_bias: its shape. extra_keys and
    extra_queries: the shape of those operands without the channels.
    """
    rng = np.random.default_rng(sum(feature) + head_dim)
    value_dim = value_dim or head_dim
    geometry = WindowGeometry(feature, window_size, shift, shift_padded, keys)
    tokens, windows, beside = geometry.tokens_per_window, geometry.num_windows, geometry.keys_per_window
    pairs, key_window = tokens * beside, window_size if keys is None else keys.window_size
    tokens, beside = tokens + sum(extra_queries[-1:]), beside + sum(extra_keys[-1:])
    operands = {
        "query": 2 * rng.standard_normal((batch, *(window_size if shared_query else feature), heads * head_dim)),
        "key": 2 * rng.standard_normal((batch, *geometry.key_size, heads * head_dim)),
        "value": rng.standard_normal((batch, *geometry.key_size, heads * value_dim)),
    }
    if bias:
        operands["bias"] = rng.standard_normal((1 if bias == "shared" else windows, heads, tokens, beside))
    if mask:
        operands["mask"] = np.where(rng.random((windows, tokens, beside)) < 0.4, -np.inf, 0.5)
        operands["mask"][:, :, -1] = 0.0
    if padding:
        operands["key_padding"] = rng.standard_normal(heads * head_dim)
        operands["value_padding"] = rng.standard_normal(heads * value_dim)
    if relative:
        per_axis = sum(w * k for w, k in zip(window_size, key_window, strict=True))
        rows = pairs if relative == "pairs" else per_axis
        operands["relative_position"] = rng.standard_normal(
            (1 if relative == "axes of all heads" else heads, rows, head_dim)
        )
    if logit_bias:
        operands["logit_bias"] = rng.standard_normal(logit_bias)
    if extra_keys:
        operands["extra_key"] = rng.standard_normal((*extra_keys, heads * head_dim))
        operands["extra_value"] = rng.standard_normal((*extra_keys, heads * value_dim))
    if extra_queries:
        operands["extra_query"] = rng.standard_normal((*extra_queries, heads * head_dim))
    spec = FlashWindowAttention(
        geometry,
        heads,
        head_dim**-0.5,
        mask_value,
        shared_query=shared_query,
        relative_scale=0.7 if relative else 1.0,
        head_shifts=head_shifts,
    )
    return Case(spec, {name: value.astype(dtype) for name, value in operands.items()}, symbolic)


def slide(
    feature: tuple[int, ...],
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    heads: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    batch: int = 2,
    bias: bool = False,
    key_kernel: int = 0,
    key_bias: int = 0,
    value_kernel: int = 0,
    value_bias: int = 0,
    border: str = "zero",
    geometry: NeighborhoodGeometry | None = None,
    bias_of_pixels: bool = False,
    one_bias: bool = False,
    symbolic: bool = False,
    dtype: str = "float32",
) -> Case:
    """key_kernel, key_bias, value_kernel, value_bias: how many rows the operand has; 0: it is absent.

    geometry: in place of the one of these sizes. bias_of_pixels: one bias for every query. one_bias: one for all heads.
    """
    rng = np.random.default_rng(sum(feature) + head_dim)
    value_dim = value_dim or head_dim
    geometry = geometry or NeighborhoodGeometry(feature, kernel, dilation, border)
    slots = geometry.keys_per_query
    operands = {
        "query": 2 * rng.standard_normal((batch, heads * head_dim, *feature)),
        "key": 2 * rng.standard_normal((batch, heads * head_dim, *geometry.key_size)),
        "value": rng.standard_normal((batch, heads * value_dim, *geometry.key_size)),
    }
    if bias:
        pixels = (math.prod(feature),) if bias_of_pixels else ()
        operands["bias"] = rng.standard_normal((1 if one_bias else heads, *pixels, slots))
    if key_kernel:
        operands["key_kernel"] = 0.3 * rng.standard_normal((key_kernel, slots, *kernel))
    if key_bias:
        operands["key_bias"] = rng.standard_normal((key_bias, slots))
    if value_kernel:
        operands["value_kernel"] = rng.standard_normal((value_kernel, slots, *kernel))
    if value_bias:
        operands["value_bias"] = rng.standard_normal((value_bias, slots))
    if "constant" in border:
        operands["key_padding"] = rng.standard_normal(heads * head_dim)
        operands["value_padding"] = rng.standard_normal(heads * value_dim)
    spec = SlideAttention(geometry, heads, head_dim**-0.5)
    return Case(spec, {name: value.astype(dtype) for name, value in operands.items()}, symbolic)


def predicted(
    spec: SlideAttention, value_dim: int, *, padding: bool = False, dtype: str = "float32", symbolic: bool = False
) -> Case:
    """A spec with predicted weights, two images of it. padding: with a vector for slots outside the map."""
    geometry, heads = spec.geometry, spec.num_heads
    rng = np.random.default_rng(value_dim)
    planes = heads * geometry.keys_per_query * spec.rows_per_pixel
    operands = {"value": rng.standard_normal((2, heads * value_dim, *geometry.key_size))}
    if padding:
        operands["value_padding"] = rng.standard_normal(heads * value_dim)
    operands["logits"] = 2 * rng.standard_normal((2, planes, *geometry.feature_size))
    return Case(spec, {name: value.astype(dtype) for name, value in operands.items()}, symbolic)


# Windows of 4 x 5 that see two pixels more on every side.
HALO = KeyWindows((11, 15), (8, 9), (4, 5), (-2, -2), (1, 1))

WINDOWS = {
    "shifted": window((14, 14), (7, 7), (3, 3), 2, 32, bias="shared", mask_value=-100.0, symbolic=True),
    "half": window((14, 14), (7, 7), (3, 3), 2, 32, bias="shared", mask_value=-100.0, dtype="float16"),
    "padded-then-shifted": window((13, 10), (4, 4), (2, 1), 2, 30, bias="own", padding=True, shift_padded=True),
    "shifted-then-padded": window((13, 10), (4, 5), (2, 0), 2, 6, 10, padding=True, mask_value=-1.0),
    "mask-tensor": window((8, 12), (4, 4), (0, 0), 3, 16, mask=True),
    "keys-in-tiles": window((24, 24), (24, 24), (0, 0), 1, 30, batch=1),
    "channels-in-chunks": window((9,), (3,), (1,), 2, 130, mask_value=-1.0),
    "window-beyond-map": window((2, 5), (4, 6), (3, 4), 1, 8, mask_value=-1.0),
    "three-axes": window((4, 5, 6), (2, 3, 2), (1, 1, 0), 1, 8, mask_value=-1.0, padding=True),
    # Bias held over a run of windows, the last of which is shorter; then over the images of one window.
    "run": window((26, 28), (4, 4), (1, 2), 2, 6, bias="shared", mask_value=-100.0, padding=True, symbolic=True),
    "run-half": window((28, 40), (4, 8), (2, 0), 2, 10, bias="shared", mask=True, dtype="float16"),
    "run-over-images": window((8, 8), (2, 2), (1, 1), 3, 4, batch=6, bias="own", mask=True),
    "halo": window((11, 15), (4, 5), (0, 0), 2, 30, bias="shared", keys=HALO, padding=True),
    "halo-half": window((11, 15), (4, 5), (0, 0), 2, 32, bias="shared", keys=HALO, dtype="float16"),
    "halo-shifted": window((12, 15), (4, 5), (2, 1), 2, 8, keys=replace(HALO, feature_size=(12, 15), border="wrap")),
    "halo-mirrored": window((11, 15), (4, 5), (0, 0), 1, 8, keys=replace(HALO, border="reflect")),
    "halo-edge": window((11, 15), (4, 5), (0, 0), 1, 8, 12, keys=replace(HALO, border="edge")),
    "keys-downsampled": window((8, 12), (4, 4), (0, 0), 2, 8, keys=KeyWindows((4, 6), (2, 2), (2, 2), (0, 0), (1, 1))),
    "shared-query": window((8, 12), (4, 4), (0, 0), 2, 16, bias="shared", shared_query=True),
    "shifts-of-heads": window(
        (8, 12), (4, 4), (0, 0), 4, 8, mask_value=-9.0, head_shifts=((0, 0), (2, 2), (2, 2), (0, 1))
    ),
    # One tile of queries that has all coordinates; tiles that begin within rows; channels in chunks.
    "relative": window(
        (13, 10), (4, 5), (2, 1), 2, 30, bias="shared", relative="axes", padding=True, mask_value=-1.0, symbolic=True
    ),
    "relative-half": window((14, 14), (14, 14), (0, 0), 2, 64, relative="axes of all heads", batch=1, dtype="float16"),
    "relative-global": window((14, 19), (14, 19), (0, 0), 1, 12, relative="axes of all heads", batch=1),
    "relative-halo": window((11, 15), (4, 5), (0, 0), 2, 6, keys=HALO, relative="axes"),
    "relative-three-axes": window((4, 5, 6), (2, 5, 3), (1, 1, 0), 2, 8, relative="axes"),
    "relative-chunks": window((6, 8), (3, 4), (0, 0), 1, 600, batch=1, relative="axes"),
    "relative-pairs": window((6, 10), (3, 5), (1, 2), 2, 6, relative="pairs"),
    "logit-bias": window((8, 12), (4, 4), (1, 2), 2, 8, bias="shared", logit_bias=(2, 6, 2, 16, 16), symbolic=True),
    "logit-bias-of-all": window((16, 28), (4, 4), (0, 0), 4, 8, logit_bias=(1, 1, 4, 16, 16), mask=True),
    "extra-keys": window(
        (9, 10), (4, 5), (0, 0), 2, 6, 10, bias="own", extra_keys=(2, 6, 3), padding=True, logit_bias=(2, 1, 1, 1, 23)
    ),
    "extra-queries": window(
        (8, 12),
        (4, 4),
        (2, 1),
        2,
        16,
        bias="shared",
        mask_value=-2.0,
        extra_keys=(1, 1, 5),
        extra_queries=(2, 1, 2),
        relative="axes",
        symbolic=True,
    ),
    "extra-half": window(
        (10, 10), (10, 10), (0, 0), 1, 32, batch=1, extra_keys=(1, 1, 1), extra_queries=(1, 1, 1), dtype="float16"
    ),
    "heads-of-64": window((16, 16), (8, 8), (4, 4), 1, 64, bias="shared", mask_value=-100.0, batch=1),
    "heads-of-64-half": window((16, 16), (16, 16), (0, 0), 1, 64, bias="shared", batch=1, dtype="float16"),
}

SLIDES = {
    "k3": slide((14, 17), (3, 3), (1, 1), 3, 32, bias=True, symbolic=True),
    "k3-half": slide((14, 17), (3, 3), (1, 1), 2, 32, dtype="float16"),
    "k7-dilated": slide((12, 13), (7, 7), (2, 2), 1, 16, batch=1, key_bias=16, value_bias=16, bias=True),
    "learned-k3": slide((10, 9), (3, 3), (1, 1), 2, 8, key_kernel=8, key_bias=8, value_kernel=16, value_bias=16),
    # Several heads in a threadgroup: they have the same kernels.
    "learned-alike": slide((5, 7), (3, 3), (1, 1), 6, 8, bias=True, key_kernel=8, key_bias=8, value_kernel=8, batch=1),
    "learned-k5": slide((10, 9), (5, 5), (1, 1), 1, 6, 4, key_kernel=6, value_kernel=4),
    "slots-in-groups": slide((20, 21), (13, 13), (2, 1), 2, 36, batch=1),
    "one-axis": slide((40,), (9,), (3,), 1, 6),
    "three-axes": slide((5, 6, 7), (3, 3, 3), (1, 1, 2), 1, 5, key_bias=5),
    # Rows of vectors, and two or four queries of a column per thread.
    "k7": slide((16, 20), (7, 7), (1, 1), 2, 8, bias=True, key_bias=8, batch=1),
    "k7-half": slide((16, 24), (7, 7), (1, 1), 1, 32, bias=True, batch=1, dtype="float16"),
    "k3-wide": slide((64, 64), (3, 3), (1, 1), 4, 4, bias=True, key_kernel=4, value_kernel=8),
    "exclude": slide((9, 12), (3, 5), (1, 2), 2, 6, border="exclude", bias=True, bias_of_pixels=True),
    "exclude-inward": slide((9, 12), (3, 5), (1, 2), 2, 6, border="exclude,inward", bias=True, one_bias=True),
    "inward": slide((14, 16), (7, 5), (1, 1), 2, 8, border="inward", bias=True, symbolic=True),
    "inward-dilated": slide((17, 23), (3, 5), (3, 4), 1, 4, border="inward", dtype="float16"),
    "replicate": slide((8, 9), (5, 3), (1, 3), 1, 6, border="replicate"),
    "wrap-reflect": slide((8, 9), (5, 3), (1, 3), 1, 6, border="wrap,reflect", key_bias=6),
    "constant": slide((8, 12), (3, 3), (1, 1), 2, 6, 4, border="constant"),
    "strided": slide(
        (6, 8),
        (4, 3),
        (1, 1),
        2,
        8,
        geometry=NeighborhoodGeometry((6, 8), (4, 3), (1, 1), "zero", (2, 2), (12, 16), (-1, 0)),
    ),
    "halo-too-large": slide((60, 60), (3, 13), (20, 20), 1, 2, batch=1),
    **{
        f"predicted-{name}": Case(PREDICTED[name].spec, PREDICTED[name].operands())
        for name in (
            "weights",
            "strided",
            "overlap-add-scaled-with-bias",
            "overlap-add-strided-uneven",
            "upsampling-uneven-with-bias",
        )
    },
    "predicted-in-groups": predicted(op((12, 13), (9, 9)), 2),
    "predicted-constant": predicted(op((9, 8), (3, 5), border="constant"), 8, padding=True, symbolic=True),
    "overlap-add-constant": predicted(op((9, 8), (3, 3), border="constant", overlap_add=True), 4, padding=True),
    "overlap-add-half": predicted(
        op((14, 12), (3, 3), stride=(2, 2), key_size=(28, 24), overlap_add=True), 16, dtype="float16", symbolic=True
    ),
    "overlap-add-k5": predicted(op((7, 9), (5, 3), "weights", dilation=(2, 1), overlap_add=True), 3),
    "upsampling-wide": predicted(op((14, 16), (5, 5), upsampling=(2, 2)), 8, dtype="float16"),
}
