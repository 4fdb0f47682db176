"""Linear layers, convolutions and attention of ATen as ONNX operators; `building.entry` says how an entry is called."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnrewrite.dims import static
from attnrewrite.frontend.fx.building import Builder, Opaque, Results, Table, entry, every, plain
from attnrewrite.frontend.shapes import broadcast
from attnrewrite.graph import UnknownShape, Value, ancestors

PRODUCTS: Table = {}


def matmul(write: Builder, a: Value, b: Value) -> Value:
    """a b of matrices, the axes in front broadcast; a matrix repeated to as many as the other has is taken once."""
    b = _repeated(write, b) if len(a.known_shape) >= len(b.known_shape) else b
    try:
        lead = (
            broadcast([a.known_shape[:-2], b.known_shape[:-2]])
            if max(len(a.known_shape), len(b.known_shape)) > 2
            else ()
        )
    except UnknownShape as error:
        raise Opaque(str(error)) from error
    return write.op("MatMul", [a, b], (*lead, a.known_shape[-2], b.known_shape[-1]))


def _repeated(write: Builder, x: Value) -> Value:
    """The one matrix that all matrices of a tensor are; the tensor itself where they differ, or may."""
    *lead, rows, columns = x.known_shape
    if not lead:
        return x
    if x.is_constant:
        alike = all(step == 0 or extent == 1 for step, extent in zip(x.constant.strides, lead, strict=False))
        for _ in lead if alike else ():
            x = write.taken(x, np.array(0), 0)
        return x
    made = x
    while made.producer is not None and made.producer.op == "Reshape" and made.known_shape[-2:] == (rows, columns):
        made = made.producer.required(0)
    one = made.producer.required(0) if made.producer is not None and made.producer.op == "Expand" else None
    is_matrix = one is not None and one.known_shape[-2:] == made.known_shape[-2:] == (rows, columns)
    if one is None or not is_matrix or any(e != 1 for e in one.known_shape[:-2]):
        return x
    return write.reshape(one, (rows, columns))


def _transposed(write: Builder, x: Value) -> Value:
    rank = len(x.known_shape)
    return write.transpose(x, [*range(rank - 2), rank - 1, rank - 2])


def _scaled(write: Builder, x: Value, factor: Any) -> Value:
    return x if factor == 1 else write.binary("Mul", x, write.scalar(factor, x))


def _floating(write: Builder) -> None:
    """Products of whole numbers wrap around in torch and are no MatMul of every runtime."""
    if write.dtype.kind not in "fV":
        raise Opaque(f"a product in {write.dtype}")


@entry(PRODUCTS, "linear")
def linear(write: Builder, input: Value, weight: Value, bias: Value | None) -> Value:
    _floating(write)
    if len(weight.known_shape) != 2:
        raise Opaque("a linear layer with a vector of weights")
    rows = write.reshape(input, (1, *input.known_shape)) if len(input.known_shape) == 1 else input
    product = write.reshape(matmul(write, rows, _transposed(write, weight)), write.shape)
    return product if bias is None else write.binary("Add", product, bias)


@entry(PRODUCTS, "matmul", "mm", "bmm")
def product(write: Builder, x: Value, other: Value | None = None, mat2: Value | None = None) -> Value:
    _floating(write)
    other = other if other is not None else mat2
    assert other is not None
    a = write.reshape(x, (1, *x.known_shape)) if len(x.known_shape) == 1 else x
    b = write.reshape(other, (*other.known_shape, 1)) if len(other.known_shape) == 1 else other
    return write.reshape(matmul(write, a, b), write.shape)


@entry(PRODUCTS, "addmm")
def addmm(write: Builder, x: Value, mat1: Value, mat2: Value, beta: Any, alpha: Any) -> Value:
    """beta * x + alpha * mat1 mat2."""
    _floating(write)
    return write.binary("Add", _scaled(write, matmul(write, mat1, mat2), alpha), _scaled(write, x, beta))


@entry(PRODUCTS, "baddbmm")
def baddbmm(write: Builder, x: Value, batch1: Value, batch2: Value, beta: Any, alpha: Any) -> Value:
    _floating(write)
    return write.binary("Add", _scaled(write, matmul(write, batch1, batch2), alpha), _scaled(write, x, beta))


@entry(PRODUCTS, "einsum")
def einsum(write: Builder, equation: str, tensors: Sequence[Value], path: Any) -> Value:
    _floating(write)
    if any(v.dtype != write.dtype for v in tensors):
        raise Opaque("an einsum of several dtypes")
    return write.op("Einsum", list(tensors), write.shape, equation=equation.replace(" ", ""))


@entry(PRODUCTS, "convolution")
def convolution(
    write: Builder,
    input: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Value:
    spatial = len(weight.known_shape) - 2
    image, shape = write.batched(input, spatial)
    attributes: dict[str, Any] = {
        "kernel_shape": [static(e) for e in weight.known_shape[2:]],
        "strides": every(stride, spatial),
        "pads": every(padding, spatial) * 2,
        "dilations": every(dilation, spatial),
        "group": groups,
    }
    if transposed:
        attributes["output_padding"] = every(output_padding, spatial)
    operands = [image, weight, *([] if bias is None else [bias])]
    result = write.op("ConvTranspose" if transposed else "Conv", operands, shape, **attributes)
    return write.reshape(result, write.shape)


def attention(
    write: Builder,
    query: Value,
    key: Value,
    value: Value,
    mask: Value | None,
    scale: float | None,
    *,
    is_causal: bool,
) -> Value:
    """softmax(scale * query key^T + mask) value, all [..., L, d]; a mask of bools excludes where it is false."""
    _floating(write)
    factor = 1 / math.sqrt(static(query.known_shape[-1])) if scale is None else scale
    logits = matmul(write, _scaled(write, query, factor), _transposed(write, key))
    if is_causal:
        allowed = np.tri(plain(query.known_shape[-2]), plain(key.known_shape[-2]), dtype=bool)
        logits = _excluded(write, logits, write.constant(allowed))
    if mask is not None:
        boolean = mask.dtype == np.dtype(bool)
        logits = (
            _excluded(write, logits, mask) if boolean else write.binary("Add", logits, write.cast(mask, write.dtype))
        )
    weights = write.unary("Softmax", logits, axis=-1)
    if mask is not None and _may_leave_no_key(mask):
        nothing = write.unary("IsNaN", weights, np.dtype(bool))
        weights = write.op("Where", [nothing, write.scalar(0, weights), weights], weights.known_shape, weights.dtype)
    return matmul(write, weights, value)


def _may_leave_no_key(mask: Value) -> bool:
    """Whether a query may be left no key, for which torch gives zeros and a softmax none: by a mask of bools, or one to
    add that is made with -inf.
    """
    if mask.is_constant:
        excluded = ~mask.constant if mask.dtype == np.dtype(bool) else np.isneginf(mask.constant)
        return bool(excluded.all(-1).any())
    made_of = (v for v in ancestors([mask]) if v.is_constant and v.dtype is not None and v.dtype.kind == "f")
    return mask.dtype == np.dtype(bool) or any(bool(np.isneginf(v.constant).any()) for v in made_of)


def _excluded(write: Builder, logits: Value, allowed: Value) -> Value:
    lowest = write.scalar(-math.inf, logits)
    return write.op("Where", [allowed, logits, lowest], logits.known_shape, logits.dtype)


@entry(PRODUCTS, "scaled_dot_product_attention")
def scaled_dot_product_attention(
    write: Builder,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Value | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Value:
    if dropout_p:
        raise Opaque("dropout of attention weights")
    if enable_gqa and query.known_shape[-3] != key.known_shape[-3]:
        raise Opaque("query heads that share a key head")
    return attention(write, query, key, value, attn_mask, scale, is_causal=is_causal)


@entry(PRODUCTS, "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu")
@entry(PRODUCTS, "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention")
@entry(PRODUCTS, "_scaled_dot_product_attention_math")
def fused_attention(
    write: Builder,
    query: Value,
    key: Value,
    value: Value,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    attn_mask: Value | None = None,
    attn_bias: Value | None = None,
    dropout_mask: Value | None = None,
    enable_gqa: bool = False,
    **saved: Any,
) -> Results:
    """Of the results only the first, the attended values, is known. saved: what the backward pass is to be told."""
    if dropout_mask is not None:
        raise Opaque("dropout of attention weights")
    mask = attn_mask if attn_mask is not None else attn_bias
    attended = scaled_dot_product_attention(write, query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
    return [attended, *[None] * (len(write.shapes) - 1)]
