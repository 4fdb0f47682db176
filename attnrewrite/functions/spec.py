"""The two ops as values: their attributes and operands, independent of any graph library. docs/ops.md is the prose.

Operand names are the op's inputs in order; a missing optional operand is an empty name in the node.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from attnrewrite.localattention.geometry import KeyWindows, NeighborhoodGeometry, Sizes, WindowGeometry

DOMAIN = "attnrewrite"
DOMAIN_VERSION = 1


@dataclass(frozen=True)
class FlashWindowAttention:
    """Attributes of `attnrewrite::FlashWindowAttention`; feature maps are channels-last `[B, *feature_size, nH*d]`.

    scale multiplies the logits q.k; mask_value, where given, is added to every logit whose query and key lie in
    different regions of the shifted map (`WindowGeometry.crosses_regions`): Swin's shift mask, carried as geometry.
    softmax_dtype: ONNX TensorProto data type the logits are cast to for bias, mask and softmax; 0 = that of the inputs.
    shared_query: the query is [B, *window_size, nH*d], one set of queries for all windows.
    relative_scale multiplies the products of the query with `relative_position`, as scale those with the key.
    head_shifts: of heads in equal groups, one after the other, the shift of each group; empty where all heads have that
    of the geometry, which is otherwise that of the first group.
    With the operand extra_query the op has a second output, what those queries attend.
    """

    geometry: WindowGeometry
    num_heads: int
    scale: float
    mask_value: float | None = None
    softmax_dtype: int = 0
    shared_query: bool = False
    relative_scale: float = 1.0
    head_shifts: tuple[Sizes, ...] = ()

    op_type = "FlashWindowAttention"
    operands = (
        "query", "key", "value", "bias", "mask", "key_padding", "value_padding", "relative_position", "logit_bias",
        "extra_key", "extra_value", "extra_query",
    )  # fmt: skip

    def attributes(self) -> dict[str, Any]:
        """The node's ONNX attributes."""
        geometry = self.geometry
        attributes: dict[str, Any] = {
            "num_heads": self.num_heads,
            "scale": float(self.scale),
            "feature_size": list(geometry.feature_size),
            "window_size": list(geometry.window_size),
            "shift_size": list(geometry.shift_size),
            "shift_padded": int(geometry.shift_padded),
            "softmax_dtype": self.softmax_dtype,
        }
        if self.mask_value is not None:
            attributes["mask_value"] = float(self.mask_value)
        if geometry.keys is not None:
            attributes |= _key_attributes(geometry.keys)
        if self.shared_query:
            attributes["shared_query"] = 1
        if self.relative_scale != 1.0:
            attributes["relative_scale"] = float(self.relative_scale)
        if self.head_shifts:
            attributes["head_shifts"] = [extent for shift in self.head_shifts for extent in shift]
        return attributes

    def runs_of_heads(self) -> list[tuple[int, WindowGeometry]]:
        """How many heads in a row have which windows; one run where no head has a shift of its own."""
        if not self.head_shifts:
            return [(self.num_heads, self.geometry)]
        per_group = self.num_heads // len(self.head_shifts)
        return [
            (len(list(run)) * per_group, replace(self.geometry, shift_size=shift))
            for shift, run in itertools.groupby(self.head_shifts)
        ]

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> FlashWindowAttention:
        geometry = WindowGeometry(
            sizes(attributes["feature_size"]),
            sizes(attributes["window_size"]),
            sizes(attributes["shift_size"]),
            bool(attributes.get("shift_padded", 0)),
            _key_windows(attributes),
        )
        return cls(
            geometry,
            int(attributes["num_heads"]),
            float(attributes["scale"]),
            float(attributes["mask_value"]) if "mask_value" in attributes else None,
            int(attributes.get("softmax_dtype", 0)),
            bool(attributes.get("shared_query", 0)),
            relative_scale=float(attributes.get("relative_scale", 1.0)),
            head_shifts=_rows(attributes.get("head_shifts", ()), len(geometry.feature_size)),
        )


def _rows(values: Any, width: int) -> tuple[Sizes, ...]:
    """A flat list of sizes, `width` to each row."""
    flat = sizes(values)
    return tuple(flat[start : start + width] for start in range(0, len(flat), width))


def _key_attributes(keys: KeyWindows) -> dict[str, Any]:
    """The attributes of key windows that are not the queries' own."""
    return {
        "key_size": list(keys.feature_size),
        "key_window_size": list(keys.window_size),
        "key_stride": list(keys.stride),
        "key_offset": list(keys.offset),
        "key_dilation": list(keys.dilation),
        "key_border": keys.border,
    }


def _key_windows(attributes: Mapping[str, Any]) -> KeyWindows | None:
    """Key windows from a node's attributes; what is absent is as for the query's windows."""
    if not any(name.startswith("key_") for name in attributes):
        return None
    feature, window = attributes["feature_size"], attributes["window_size"]
    return KeyWindows(
        sizes(attributes.get("key_size", feature)),
        sizes(attributes.get("key_window_size", window)),
        sizes(attributes.get("key_stride", window)),
        sizes(attributes.get("key_offset", [0] * len(feature))),
        sizes(attributes.get("key_dilation", [1] * len(feature))),
        text(attributes.get("key_border", "padding")),
    )


@dataclass(frozen=True)
class SlideAttention:
    """Attributes of `attnrewrite::SlideAttention`; feature maps are channels-first `[B, nH*d, *feature_size]`.

    Slot j of K = prod(kernel_size), row-major, is the neighbour at `NeighborhoodGeometry.pixels()`; what a slot outside
    the key map is says the geometry's border.

    predicted: "" where the weights are the softmax of query . key; else the operand `logits` takes the place of query
    and key, as "logits" (softmax over the slots follows) or as "weights" (it does not). Then every pixel of the query
    map may hold several rows of weights: overlap_add, K rows, row t added up at the pixel that slot t reads (the output
    lies on the key map); upsampling (one factor per spatial axis), prod(upsampling) rows, the pixels of one block of a
    finer output.
    """

    geometry: NeighborhoodGeometry
    num_heads: int
    scale: float
    softmax_dtype: int = 0
    predicted: str = ""
    overlap_add: bool = False
    upsampling: Sizes = ()

    op_type = "SlideAttention"
    operands = (
        "query", "key", "value", "bias", "key_kernel", "key_bias", "value_kernel", "value_bias",
        "key_padding", "value_padding", "logits",
    )  # fmt: skip

    @property
    def border(self) -> str:
        return self.geometry.border

    @property
    def rows_per_pixel(self) -> int:
        """Rows of predicted weights that a pixel of the query map holds."""
        return self.geometry.keys_per_query if self.overlap_add else math.prod(self.upsampling)

    @property
    def output_size(self) -> Sizes:
        """Spatial extents of the output."""
        geometry = self.geometry
        if self.overlap_add:
            return geometry.key_size
        factors = self.upsampling or (1,) * len(geometry.feature_size)
        return tuple(e * f for e, f in zip(geometry.feature_size, factors, strict=True))

    def attributes(self) -> dict[str, Any]:
        """The node's ONNX attributes; stride, key_size and offset where they are not the default."""
        geometry = self.geometry
        attributes: dict[str, Any] = {
            "num_heads": self.num_heads,
            "scale": float(self.scale),
            "feature_size": list(geometry.feature_size),
            "kernel_size": list(geometry.kernel_size),
            "dilation": list(geometry.dilation),
            "border": geometry.border,
            "softmax_dtype": self.softmax_dtype,
        }
        if any(s != 1 for s in geometry.stride):
            attributes["stride"] = list(geometry.stride)
        if geometry.key_size != geometry.feature_size:
            attributes["key_size"] = list(geometry.key_size)
        if geometry.offset != geometry.centred_offset:
            attributes["offset"] = list(geometry.offset)
        if self.predicted:
            attributes["predicted"] = self.predicted
        if self.overlap_add:
            attributes["overlap_add"] = 1
        if self.upsampling:
            attributes["upsampling"] = list(self.upsampling)
        return attributes

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> SlideAttention:
        optional = {name: sizes(attributes.get(name, ())) for name in ("stride", "key_size", "offset")}
        geometry = NeighborhoodGeometry(
            sizes(attributes["feature_size"]),
            sizes(attributes["kernel_size"]),
            sizes(attributes["dilation"]),
            text(attributes["border"]),
            **optional,
        )
        return cls(
            geometry,
            int(attributes["num_heads"]),
            float(attributes["scale"]),
            int(attributes.get("softmax_dtype", 0)),
            text(attributes.get("predicted", "")),
            bool(attributes.get("overlap_add", 0)),
            sizes(attributes.get("upsampling", ())),
        )


Spec = FlashWindowAttention | SlideAttention
SPECS: dict[str, type[FlashWindowAttention] | type[SlideAttention]] = {
    spec.op_type: spec for spec in (FlashWindowAttention, SlideAttention)
}


def sizes(values: Any) -> Sizes:
    return tuple(int(v) for v in values)


def text(value: Any) -> str:
    """A string attribute, which ONNX readers give as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
