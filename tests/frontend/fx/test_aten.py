"""Every entry of the ATen table against torch, on numbers: odd extents, negative axes and indices.

A row is a function and the shapes of its inputs; it is exported, read, and run in ONNX Runtime. Nothing may be opaque.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F

from attnrewrite.graph import Graph
from tests.frontend.fx.reading import assert_computes, compiled, decomposed, exported, opaque, traced

Row = tuple[Callable[..., Any], tuple[Any, ...]]
X = (2, 3, 5, 7)
I = torch.tensor([2, -1, 0, 0])  # noqa: E741
J = torch.tensor([[1], [-2], [4]])

MOVEMENT: dict[str, Row] = {
    "view": (lambda x: x.view(6, -1), (X,)),
    "reshape of a transposed": (lambda x: x.transpose(1, 2).reshape(2, 5, -1), (X,)),
    "flatten": (lambda x: x.flatten(1, 2), (X,)),
    "unflatten": (lambda x: x.unflatten(-1, (7, 1)), (X,)),
    "squeeze": (lambda x: (x.squeeze(), x.squeeze(-3), x.squeeze((0, 1)), x.squeeze(2)), ((1, 1, 5),)),
    "unsqueeze": (lambda x: x.unsqueeze(-2), (X,)),
    "expand": (lambda x: (x.expand(4, 2, -1, 5), x.expand_as(torch.zeros(2, 3, 5))), ((2, 3, 1),)),
    "permute": (lambda x: x.permute(0, -1, 1, 2), (X,)),
    "transpose": (lambda x: (x.transpose(-1, 0), x.mT, x.swapaxes(1, -2), x.movedim(0, -1)), (X,)),
    "t": (lambda x: x.t(), ((3, 5),)),
    "slice": (lambda x: x[:, 1:, -4:-1, ::3], (X,)),
    "slice beyond": (lambda x: (x[:, :, 4:99], x[-9:1], x[:, 2:1]), (X,)),
    "select": (lambda x: (x[0], x[..., -2], x.select(-2, -1)), (X,)),
    "new axes": (lambda x: x[None, :, 0, None, ..., 2], (X,)),
    "narrow": (lambda x: x.narrow(-1, 2, 3), (X,)),
    "split": (lambda x: x.split(2, -2), (X,)),
    "split with sizes": (lambda x: x.split([1, 4, 2], 3), (X,)),
    "chunk": (lambda x: x.chunk(3, -1), (X,)),
    "tensor split": (lambda x: x.tensor_split(3, -1), (X,)),
    "unbind": (lambda x: x.unbind(1), (X,)),
    "cat": (lambda x, y: torch.cat([x, y, x], -2), (X, (2, 3, 1, 7))),
    "cat of dtypes": (lambda x: torch.cat([x, x > 0, x.to(torch.int64)], 1), (X,)),
    "stack": (lambda x: torch.stack([x, x + 1], -1), (X,)),
    "roll": (lambda x: x.roll((2, -3), (-2, 3)), (X,)),
    "roll by more than there is": (lambda x: x.roll((11, -7, 5), (2, 3, 2)), (X,)),
    "roll of all": (lambda x: x.roll(4), (X,)),
    "flip": (lambda x: x.flip(-1, 1), (X,)),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 3)), (X,)),
    "pad with a number, and crop": (lambda x: F.pad(x, (-1, 2, 1, -2, 1, 0), value=-2.5), (X,)),
    "pad by reflection": (lambda x: F.pad(x, (2, 1, 4, 0), mode="reflect"), (X,)),
    "pad by replication": (lambda x: F.pad(x, (2, 9, 4, 0), mode="replicate"), (X,)),
    "pad around": (lambda x: F.pad(x, (2, 1, 4, 0), mode="circular"), (X,)),
    "pad three axes": (lambda x: F.pad(x, (1, 0, 2, 1, 0, 1), mode="replicate"), ((1, 2, 3, 4, 5),)),
    "im2col": (lambda x: F.unfold(x, (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1)), (X,)),
    "im2col of one image": (lambda x: F.unfold(x, 3, padding=1), ((3, 5, 7),)),
    "col2im": (lambda x: F.fold(x, (5, 6), (3, 2), dilation=(1, 2), padding=(1, 0), stride=(2, 1)), ((2, 12, 12),)),
    "index": (lambda x: (x[:, I], x[:, :, J], x[[1, 0]], x[..., I]), (X,)),
    "index by a buffer of bools": (lambda x: x[:, torch.tensor([True, False, True])], (X,)),
    "index of several axes": (lambda x: (x[:, I[:3, None], J[:, 0]], x[I[1:3] % 2, :, J[1:, 0]]), (X,)),
    "index of the first axes": (lambda x: x[[1, 0, 1], [2, -1, 0]], (X,)),
    "index of all axes": (lambda x: x[[1, 0], [2, -1], [0, 4], [-1, 3]], (X,)),
    "index by a computed tensor": (lambda x, y: x[:, :, y.argmax(-1)], (X, (3, 5))),
    "gather": (lambda x: x.gather(-2, torch.arange(60).reshape(2, 3, 2, 5) % 5), (X,)),
    "index select": (lambda x: x.index_select(-1, I % 7), (X,)),
    "embedding": (lambda w: F.embedding(I % 3, w), ((3, 4),)),
    "unfold": (lambda x: (x.unfold(-1, 3, 2), x.unfold(1, 2, 1).unfold(2, 4, 1)), (X,)),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), ((2, 12, 3, 5),)),
    "pixel shuffle of one image": (lambda x: F.pixel_shuffle(x, 2), ((12, 3, 5),)),
    "pixel unshuffle": (lambda x: F.pixel_unshuffle(x, 2), ((2, 3, 4, 6),)),
    "channel shuffle": (lambda x: F.channel_shuffle(x, 3), ((2, 12, 3, 5),)),
    "repeat": (lambda x: (x.repeat(1, 2, 1, 3), x.repeat(2, 1, 1, 1, 1), x.tile((2,))), (X,)),
    "repeat of ones": (lambda x: x.repeat(3, 2, 1), ((1, 5),)),
    "repeat interleave": (lambda x: x.repeat_interleave(2, dim=1), (X,)),
    "slice scatter": (lambda x, y: x.slice_scatter(y, -1, 1, 6, 2), (X, (2, 3, 5, 3))),
    "slice scatter without gaps": (lambda x, y: x.slice_scatter(y, 2, -2), (X, (2, 3, 2, 7))),
    "select scatter": (lambda x, y: x.select_scatter(y, 1, -1), (X, (2, 5, 7))),
    "as strided": (lambda x: (x.as_strided((3, 2), (2, 5), 4), x.as_strided((30, 7), (7, 1))), (X,)),
    "diagonal": (lambda x: (x.diagonal(1, -2, -1), x.diagonal(-2, 3, 1)), (X,)),
    "triu, tril": (lambda x: (x.triu(1), x.tril(-1), x.tril(2)), (X,)),
    "where": (lambda x, y: torch.where(x > 0, x, y), (X, (5, 1))),
    "where of numbers": (lambda x: (torch.where(x > 0, 1.5, x), torch.where(x > 0, 2, 3)), (X,)),
    "masked fill": (lambda x: x.masked_fill(torch.arange(7) > 3, -torch.inf), (X,)),
    "masked fill by a tensor": (lambda x, y: x.masked_fill(x > 0, y.sum()), (X, (2,))),
    "clone": (lambda x: x.transpose(0, 1).clone().contiguous().detach(), (X,)),
    "dtypes": (lambda x: (x.to(torch.int32), x.double(), (x > 0).float(), x.half().float(), x.type_as(x)), (X,)),
    "meshgrid": (lambda x, y: torch.meshgrid(x, y, indexing="ij"), ((3,), (4,))),
    "einops": (lambda x: x.reshape(2, 3, 5, 1, 7).permute(0, 2, 4, 1, 3).reshape(-1, 3), (X,)),
}

POINTWISE: dict[str, Row] = {
    "whole numbers": (lambda x: (x.floor(), x.ceil(), x.round(), x.sign(), x.neg(), x.abs()), (X,)),
    "of positive": (lambda x: (x.abs().log(), x.abs().sqrt(), x.abs().rsqrt(), x.reciprocal()), (X,)),
    "exp": (lambda x: (x.exp(), x.sigmoid(), x.tanh(), x.erf()), (X,)),
    "sin": (lambda x: (x.sin(), x.cos(), x.tan(), x.atan(), x.sinh(), x.cosh(), x.asinh()), (X,)),
    "inverse": (lambda x: (x.sin().asin(), x.sin().acos(), (x.abs() + 1).acosh(), (x.sin() / 2).atanh()), (X,)),
    "exp of whole numbers": (lambda x: x.to(torch.int64).exp(), (X,)),
    "relu": (lambda x: (F.relu(x), F.relu6(x), F.leaky_relu(x, 0.2), F.hardtanh(x, -0.5, 0.7)), (X,)),
    "elu": (lambda x: (F.elu(x, 0.7), F.selu(x), F.celu(x), F.softplus(x)), (X,)),
    "gelu": (lambda x: (F.gelu(x), F.gelu(x, approximate="tanh")), (X,)),
    "silu": (lambda x: (F.silu(x), F.mish(x), F.hardswish(x * 3), F.hardsigmoid(x * 3)), (X,)),
    "prelu": (lambda x, w: (F.prelu(x, w), F.prelu(x, w[:1])), (X, (3,))),
    "glu": (lambda x: F.glu(x, 1), ((2, 6, 5),)),
    "add": (lambda x, y: (x + y, x + 2, 2 + x, torch.add(x, y, alpha=3)), (X, (5, 1))),
    "sub": (lambda x, y: (x - y, x - 2, 2 - x, torch.sub(x, y, alpha=3), torch.rsub(x, y)), (X, (5, 1))),
    "mul, div": (lambda x, y: (x * y, x * 2, x / y, 2 / x, x / 3), (X, (5, 1))),
    "of dtypes": (
        lambda x: (x.to(torch.int32) + x, x.to(torch.int64) / 2, x.to(torch.int32) * 2.5, x.half() + x),
        (X,),
    ),
    "of bools": (lambda x: ((x > 0) + (x > 1), (x > 0) * (x > 1), (x > 0) * 2.0, (x > 0) & (x < 1), ~(x > 0)), (X,)),
    "quotients of whole numbers": (
        lambda x: ((x * 9).to(torch.int64) // 4, (x * 9).to(torch.int64) % 4, (x * 9).to(torch.int64) // -4),
        (X,),
    ),
    "truncated quotients": (lambda x: torch.div((x * 9).to(torch.int64), 4, rounding_mode="trunc"), (X,)),
    "fmod": (lambda x: (torch.fmod(x, 0.75), torch.fmod((x * 9).to(torch.int64), 4)), (X,)),
    "pow": (lambda x: (x**2, x.abs() ** 0.5, 2**x, x.abs() ** x, x.square()), (X,)),
    "max, min": (lambda x, y: (torch.maximum(x, y), torch.minimum(x, y), torch.max(x, y)), (X, (5, 1))),
    "clamp": (lambda x: (x.clamp(-0.5, 0.7), x.clamp(min=0.1), x.clamp(max=-0.1), x.clip(0.5, -0.5)), (X,)),
    "clamp by tensors": (lambda x, y: (x.clamp(min=y), x.clamp(-y.abs(), y.abs())), (X, (5, 1))),
    "clamp of whole numbers": (lambda x: (x * 9).to(torch.int64).clamp(-3, 4), (X,)),
    "compare": (lambda x, y: (x > y, x >= y, x < y, x <= y, x == y, x != y), (X, (5, 1))),
    "compare with numbers": (lambda x: (x > 0, x.to(torch.int64) > 0.5, x != 0, x.to(torch.int64) == 0), (X,)),
    "compare dtypes": (lambda x: (x.to(torch.int64) < x, x.to(torch.int64) == x.to(torch.int32)), (X,)),
    "logic": (lambda x: (torch.logical_and(x > 0, x), torch.logical_or(x > 0, x < -1), (x > 0) ^ (x > 1)), (X,)),
    "not": (lambda x: (torch.logical_not(x > 0), torch.logical_not(x), ~x.to(torch.int64)), (X,)),
    "is it a number": (lambda x: (torch.isnan(x.log()), torch.isinf(1 / (x * 0))), (X,)),
    "addcmul": (lambda x, y: (torch.addcmul(x, y, y, value=2), torch.addcdiv(x, y, y.abs() + 1)), (X, (5, 1))),
    "lerp": (lambda x, y: (torch.lerp(x, y, 0.3), torch.lerp(x, y, y)), (X, X)),
    "dropout of inference": (lambda x: F.dropout(x, 0.3, training=False), (X,)),
}

REDUCTIONS: dict[str, Row] = {
    "mean": (lambda x: (x.mean(), x.mean(-1), x.mean((1, -1), keepdim=True)), (X,)),
    "sum": (lambda x: (x.sum(), x.sum(1), x.sum((2, -1), keepdim=True), (x > 0).sum(-1)), (X,)),
    "max": (lambda x: (x.amax(-1), x.amin((1, 2), keepdim=True), x.max(), x.min()), (X,)),
    "max along": (lambda x: (*x.max(-2), *x.min(1, keepdim=True)), (X,)),
    "argmax": (lambda x: (x.argmax(), x.argmax(-1), x.argmin(1, keepdim=True)), (X,)),
    "prod": (lambda x: x.prod(-1), (X,)),
    "logsumexp": (lambda x: x.logsumexp((-1, 1)), (X,)),
    "norm": (lambda x: (x.norm(dim=-1), torch.linalg.vector_norm(x, 1, (1, 2), keepdim=True)), (X,)),
    "normalize": (lambda x: F.normalize(x, dim=-1), (X,)),
    "var": (lambda x: (x.var(-1), x.var((1, 2), unbiased=False, keepdim=True), x.std(0)), (X,)),
    "var and mean": (lambda x: torch.var_mean(x, -1, correction=0, keepdim=True), (X,)),
    "cumsum": (lambda x: (x.cumsum(-1), (x > 0).cumsum(1)), (X,)),
    "any, all": (lambda x: ((x > 1).any(-1), (x > -1).all(1, keepdim=True), (x > 2).any()), (X,)),
    "topk": (lambda x: (*x.topk(3, -1), *x.topk(2, 1, largest=False)), (X,)),
    "sort": (lambda x: (*x.sort(-1), *x.sort(1, descending=True)), (X,)),
    "softmax": (lambda x: (x.softmax(-1), x.softmax(1), F.log_softmax(x, -1)), (X,)),
    "softmax in another dtype": (lambda x: x.half().softmax(-1, dtype=torch.float32), (X,)),
    "layer norm": (lambda x, w, b: (F.layer_norm(x, (7,), w, b), F.layer_norm(x, (5, 7), eps=0.1)), (X, (7,), (7,))),
    "rms norm": (lambda x, w: (F.rms_norm(x, (7,), w, 1e-5), F.rms_norm(x, (5, 7))), (X, (7,))),
    "group norm": (lambda x, w, b: F.group_norm(x, 3, w, b), ((2, 6, 5, 4), (6,), (6,))),
    "instance norm": (lambda x: F.instance_norm(x), (X,)),
    "batch norm": (
        lambda x, m, v, w: (F.batch_norm(x, m, v.abs() + 1, w, m), F.batch_norm(x, m, v.abs() + 1)),
        (X, (3,), (3,), (3,)),
    ),
    "average pool": (lambda x: (F.avg_pool2d(x, 2), F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)), (X,)),
    "average pool, rounded up": (lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True), ((2, 3, 4, 6),)),
    "average pool 1d": (lambda x: F.avg_pool1d(x, 3, 2, 1), ((2, 3, 9),)),
    "max pool": (lambda x: (F.max_pool2d(x, 3, 2, 1), F.max_pool2d(x, (2, 3), dilation=(1, 2), ceil_mode=True)), (X,)),
    "adaptive pool": (lambda x: (F.adaptive_avg_pool2d(x, 1), F.adaptive_avg_pool2d(x, (5, 1))), (X,)),
    "adaptive pool of even parts": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), ((2, 3, 4, 9),)),
    "nearest": (lambda x: (F.interpolate(x, scale_factor=2), F.interpolate(x, (10, 21))), (X,)),
    "bilinear": (
        lambda x: (
            F.interpolate(x, (9, 11), mode="bilinear"),
            F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True),
        ),
        (X,),
    ),
    "bicubic": (lambda x: F.interpolate(x, (9, 11), mode="bicubic"), (X,)),
}

PRODUCTS: dict[str, Row] = {
    "linear": (lambda x, w, b: (F.linear(x, w, b), F.linear(x[0, 0, 0], w)), (X, (4, 7), (4,))),
    "matmul": (lambda x, y: (x @ y, x[0, 0] @ y, x @ y[:, 0], x[0, 0, 0] @ y), (X, (7, 4))),
    "matmul, broadcast": (lambda x, y: x @ y, ((2, 1, 5, 7), (3, 7, 4))),
    "bmm": (lambda x, y: torch.bmm(x, y), ((2, 5, 7), (2, 7, 4))),
    "mm": (lambda x, y: torch.mm(x, y), ((5, 7), (7, 4))),
    "addmm": (lambda b, x, y: (torch.addmm(b, x, y), torch.addmm(b, x, y, beta=2, alpha=0.5)), ((4,), (5, 7), (7, 4))),
    "baddbmm": (lambda b, x, y: torch.baddbmm(b, x, y, beta=0.5), ((1, 5, 4), (2, 5, 7), (2, 7, 4))),
    "einsum": (lambda x, y: torch.einsum("b h i d, b h j d -> b h i j", x, y), (X, (2, 3, 4, 7))),
    "conv": (lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 2), (1, 2)), (X, (4, 3, 3, 2), (4,))),
    "conv, depthwise": (lambda x, w: F.conv2d(x, w, padding=1, groups=3), (X, (3, 1, 3, 3))),
    "conv of one image": (lambda x, w: F.conv2d(x, w, padding="same"), ((3, 5, 7), (4, 3, 3, 3))),
    "conv 1d, 3d": (
        lambda x, w, y, v: (F.conv1d(x, w), F.conv3d(y, v)),
        ((2, 3, 9), (4, 3, 3), (1, 2, 3, 4, 5), (3, 2, 2, 2, 2)),
    ),
    "conv transpose": (lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1), (X, (3, 4, 3, 3))),
    "attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7))),
    "attention with a mask": (
        lambda q, k, m: (
            F.scaled_dot_product_attention(q, k, k, attn_mask=m, scale=0.3),
            F.scaled_dot_product_attention(q, k, k, attn_mask=m > -1),
            F.scaled_dot_product_attention(q, k, k, attn_mask=m > 0.8),  # some queries are left no key
            F.scaled_dot_product_attention(q, k, k, attn_mask=m.masked_fill(m < 0.8, -torch.inf)),
            F.scaled_dot_product_attention(q, k, k, attn_mask=torch.arange(5)[:, None] > torch.arange(6)),
            F.scaled_dot_product_attention(q, k, k, is_causal=True),
        ),
        ((2, 3, 5, 4), (2, 3, 6, 4), (5, 6)),
    ),
}

WRITES: dict[str, Row] = {
    "relu in place": (lambda x: F.relu(x * 2, inplace=True) + 1, (X,)),
    "operators in place": (lambda x, y: (x * 1).add_(y).mul_(2).sub_(1).clamp_(-1, 1), (X, (5, 1))),
    "zeros, then parts": (lambda x: zeros_then_parts(x), (X,)),
    "a slice": (lambda x, y: written(x * 1, lambda z: z[:, :, 1:3].copy_(y)), (X, (2, 7))),
    "every other": (lambda x: written(x * 1, lambda z: z[..., ::2].mul_(3)), (X,)),
    "one": (lambda x: written(x * 1, lambda z: z[:, -1].zero_()), (X,)),
    "a view of a view": (lambda x: written(x * 1, lambda z: z.transpose(1, 2)[:, 1].view(2, 3, 7)[0].fill_(2)), (X,)),
    "seen through another view": (lambda x: seen_through_another(x), (X,)),
    "a mask of constants": (lambda x: x + mask_of_constants(), (X,)),
    "masked fill in place": (lambda x: (x * 1).masked_fill_(x > 0, 7), (X,)),
    "converted back": (lambda x: x.to(torch.int64).add_(x.to(torch.int32)), (X,)),
}


def written(x: torch.Tensor, write: Callable[[torch.Tensor], Any]) -> torch.Tensor:
    write(x)
    return x * 2


def zeros_then_parts(x: torch.Tensor) -> torch.Tensor:
    whole = x.new_zeros(2, 3, 6, 8)
    whole[:, :, :5, :7] = x
    whole[:, 0, 5] = 1
    return whole + 1


def seen_through_another(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x + 0
    before, part, flat = x * 3, x[:, 1:], x.view(-1)
    part.add_(10)
    return before, flat * 2, x[0], part


def mask_of_constants() -> torch.Tensor:
    mask = torch.zeros(5, 7)
    for count, rows in enumerate((slice(0, -3), slice(-3, -1), slice(-1, None))):
        mask[rows, 2:] = count
    return mask.masked_fill(mask != 0, -100.0)


ROWS = {f"{name} ({kind})": row for kind, rows in (
    ("movement", MOVEMENT), ("pointwise", POINTWISE), ("reductions", REDUCTIONS), ("products", PRODUCTS),
    ("writes", WRITES),
) for name, row in rows.items()}  # fmt: skip


def inputs_of(shapes: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


# Calls with arguments that their entry does not cover: they stay what they are.
OPAQUE: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "softplus with a threshold": (lambda x: F.softplus(x, threshold=3), (X,), "softplus.default"),
    "rounded quotient of fractions": (lambda x: x // 0.3, (X,), "floor_divide.default"),
    "remainder of fractions": (lambda x: x % 0.3, (X,), "remainder.Scalar"),
    "uneven adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, (2, 3)), (X,), "adaptive_avg_pool2d.default"),
    "pool with a divisor": (lambda x: F.avg_pool2d(x, 2, divisor_override=3), (X,), "avg_pool2d.default"),
    "pool beyond the padding": (lambda x: F.avg_pool2d(x, 2, ceil_mode=True), (X,), "avg_pool2d.default"),
    "norm of order 3": (lambda x: x.norm(3, -1), (X,), "linalg_vector_norm.default"),
    "product of whole numbers": (lambda x: x.to(torch.int64) @ x.to(torch.int64).mT, (X,), "matmul.default"),
    "bits": (lambda x: x.to(torch.int64) & 3, (X,), "bitwise_and.Scalar"),
    "training dropout": (lambda x: F.dropout(x, 0.5), (X,), "dropout.default"),
    "attention that drops": (
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        (X,),
        "scaled_dot_product_attention.default",
    ),
    "complex numbers": (lambda x: torch.fft.rfft(x), (X,), "_fft_r2c.default"),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_an_entry_does_not_cover_is_opaque(name: str) -> None:
    function, shapes, operator = OPAQUE[name]
    graph = traced(function, inputs_of(shapes))
    assert f"aten.{operator}" in opaque(graph)


# What torch decomposes into something that has no entry.
OPAQUE_DECOMPOSED = {
    "col2im (movement)": "aten.index_put.default",
    "elu (pointwise)": "aten.expm1.default",
    "silu (pointwise)": "aten.log1p.default",
    "instance norm (reductions)": "aten._native_batch_norm_legit.no_stats",
}


@pytest.mark.parametrize("name", ROWS)
def test_entry(name: str) -> None:
    function, shapes = ROWS[name]
    inputs = inputs_of(shapes)
    try:
        graph = traced(function, inputs)
    except (torch.fx.proxy.TraceError, TypeError):  # loops over tensors, assignments to parts of them
        graph = exported(function, inputs)
    assert not opaque(graph)
    assert_computes(graph, function, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dialect", [exported, decomposed, compiled])
@pytest.mark.parametrize("name", ROWS)
def test_entry_in_other_dialects(name: str, dialect: Callable[..., Graph]) -> None:
    function, shapes = ROWS[name]
    inputs = inputs_of(shapes)
    graph = dialect(function, inputs)
    if dialect is decomposed and name in OPAQUE_DECOMPOSED:
        assert OPAQUE_DECOMPOSED[name] in opaque(graph)
    else:
        assert not opaque(graph)
        assert_computes(graph, function, inputs)
