"""What a model has to compute and to move, counted from its ONNX graph: the numbers behind a roofline.

Counted are the multiplications and additions of matrix products, convolutions and the two attention ops, two per
multiply-add; everything else (norms, softmax, activations) is not. Attention ops count what their definition asks for:
every query pixel of the map against its keys, no padding of windows and no query outside the map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attnrewrite.frontend.onnx import read
from attnrewrite.functions import is_local_op, operands_of, spec_of
from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention
from attnrewrite.graph import Graph, Node, Value

PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")


@dataclass(frozen=True)
class Work:
    """products, attention: FLOPs of matrix products and convolutions, and of the two ops.

    compulsory: bytes of weights, inputs and outputs, which no implementation can avoid. moved: bytes that the counted
    operators read and write when each of them reads its operands once and everything between them is fused away.
    """

    products: int
    attention: int
    compulsory: int
    moved: int

    @property
    def flops(self) -> int:
        return self.products + self.attention

    def to_json(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in ("products", "attention", "compulsory", "moved")}


def work_of(model: str | Path) -> Work:
    """The work of an ONNX file with static shapes; attention is recognised only where it is one of the two ops.

    Raises ValueError where a shape is symbolic or unknown.
    """
    return count(read(model))


def count(graph: Graph) -> Work:
    products = attention = moved = 0
    weights: set[Value] = set()
    for node in graph.nodes:
        weights |= {value for value in node.reads() if value.is_constant}
        if is_local_op(node):
            attention += attention_flops(node)
        elif node.op in PRODUCTS:
            products += product_flops(node)
        else:
            continue
        moved += sum(_bytes(value) for value in node.reads() if not value.is_constant)
        moved += sum(_bytes(value) for value in node.outputs)
    stored = sum(_bytes(value) for value in weights)
    ends = sum(_bytes(value) for value in {*graph.inputs, *graph.outputs} if not value.is_constant)
    return Work(products, attention, stored + ends, stored + moved)


def product_flops(node: Node) -> int:
    """FLOPs of one matrix product or convolution."""
    out = math.prod(_shape(node.output))
    if node.op == "Conv":
        _, channels, *kernel = _shape(node.required(1))  # channels of one group
        return 2 * out * channels * math.prod(kernel)
    if node.op == "ConvTranspose":
        _, channels, *kernel = _shape(node.required(1))
        return 2 * math.prod(_shape(node.required(0))) * channels * math.prod(kernel)
    if node.op == "Gemm":
        return 2 * out * _shape(node.required(0))[0 if node.attributes.get("transA") else 1]
    if node.op == "Einsum":
        return _einsum_flops(node)
    return 2 * out * _shape(node.required(0))[-1]


def _einsum_flops(node: Node) -> int:
    equation = node.attributes["equation"]
    text = equation.decode() if isinstance(equation, bytes) else equation
    terms = text.split("->")[0].replace(" ", "").split(",")
    extents = {
        letter: extent
        for term, value in zip(terms, node.inputs, strict=True)
        if value is not None
        for letter, extent in zip(term, _shape(value), strict=True)
    }
    return 2 * math.prod(extents.values()) if len(terms) > 1 else 0


def attention_flops(node: Node) -> int:
    """FLOPs of one attention op: logits, added logits of the query, values, and learned shift kernels."""
    spec = spec_of(node)
    operands = {name: _shape(value) for name, value in operands_of(node).items()}
    if isinstance(spec, FlashWindowAttention):
        return _window_flops(spec, operands)
    return _slide_flops(spec, operands)


def _window_flops(spec: FlashWindowAttention, operands: dict[str, tuple[int, ...]]) -> int:
    geometry = spec.geometry
    batch, *_, value_channels = operands["value"]
    channels = operands["query"][-1]
    queries, keys = math.prod(geometry.feature_size), geometry.keys_per_window
    extra_keys = operands["extra_key"][2] if "extra_key" in operands else 0
    if "extra_query" in operands:
        queries += geometry.num_windows * operands["extra_query"][2]
    multiplied = queries * (keys + extra_keys) * (channels + value_channels)
    if "relative_position" in operands:
        rows = operands["relative_position"][1]
        if rows != geometry.tokens_per_window * keys:  # one table per axis
            rows = sum(geometry.keys.window_size if geometry.keys else geometry.window_size)
            multiplied += math.prod(geometry.feature_size) * rows * channels
        else:
            multiplied += math.prod(geometry.feature_size) * keys * channels
    return 2 * batch * multiplied


def _slide_flops(spec: SlideAttention, operands: dict[str, tuple[int, ...]]) -> int:
    slots = spec.geometry.keys_per_query
    batch, value_channels = operands["value"][:2]
    pixels = math.prod(spec.geometry.feature_size)
    if spec.predicted:
        return 2 * batch * pixels * spec.rows_per_pixel * slots * value_channels
    channels = operands["query"][1]
    multiplied = slots * (channels + value_channels)
    for kernel, width in (("key_kernel", channels), ("value_kernel", value_channels)):
        if kernel in operands:
            multiplied += slots * width * math.prod(spec.geometry.kernel_size)
    return 2 * batch * pixels * multiplied


def _shape(value: Value) -> tuple[int, ...]:
    shape: Sequence[object] = value.shape if value.shape is not None else ("?",)
    if not all(isinstance(extent, int) for extent in shape):
        raise ValueError(f"{value} has no static shape, so its work cannot be counted")
    return tuple(int(extent) for extent in shape)  # type: ignore[call-overload]


def _bytes(value: Value) -> int:
    if value.dtype is None:
        raise ValueError(f"the dtype of {value.name} is unknown, so its work cannot be counted")
    return math.prod(_shape(value)) * value.dtype.itemsize
