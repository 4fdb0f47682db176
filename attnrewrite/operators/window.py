"""FlashWindowAttention in torch, forward and backward, without a tensor of all logits.

Some images and heads at a time, their windows gathered by rows: the logits of a chunk fit a cache (a GPU's chunk fills
it). Nothing is saved for the backward but the operands; it computes the weights of a chunk again. A row of logits lies
in one chunk as a whole, so its softmax is taken anew rather than from a log-sum-exp kept by the forward, which then may
be any kernel. Letters as in docs/ops.md; in this file b counts the images of a chunk, h its heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnrewrite.functions.spec import FlashWindowAttention
from attnrewrite.operators.schema import dtype_of, result_shapes
from attnrewrite.operators.tokens import Rows, Tokens, region_penalty, tokens_of

# Bytes of logits that a chunk aims at: part of a second-level cache; on a GPU enough to fill it.
_CPU_LOGITS, _GPU_LOGITS = 2 << 20, 64 << 20


@dataclass(frozen=True)
class Chunk:
    """`images` images from `image` on, `heads` heads from `head` on; the tokens of their windows."""

    image: int
    images: int
    head: int
    heads: int
    queries: Tokens
    keys: Tokens


class Site:
    """One call: its operands as rows, and what every chunk needs to know."""

    def __init__(self, spec: FlashWindowAttention, operands: Mapping[str, Tensor]) -> None:
        self.spec, self.operands = spec, operands
        self.query, self.key, self.value = (operands[name] for name in ("query", "key", "value"))
        self.heads, self.windows = spec.num_heads, spec.geometry.num_windows
        self.head_dim, self.value_dim = (x.shape[-1] // self.heads for x in (self.query, self.value))
        self.own_queries, self.own_keys = spec.geometry.tokens_per_window, spec.geometry.keys_per_window
        self.extra_queries, self.extra_keys = (
            operands[name].shape[2] if name in operands else 0 for name in ("extra_query", "extra_key")
        )
        self.tokens, self.all_keys = self.own_queries + self.extra_queries, self.own_keys + self.extra_keys
        self.rows = {name: Rows(operands[name], self.heads) for name in ("query", "key", "value")}
        self.softmax_dtype = dtype_of(spec.softmax_dtype) if spec.softmax_dtype else self.query.dtype

    def chunks(self) -> Iterator[Chunk]:
        budget = _CPU_LOGITS if self.value.device.type == "cpu" else _GPU_LOGITS
        per_head = max(1, self.windows * self.tokens * self.all_keys * self.softmax_dtype.itemsize)
        images = min(self.value.shape[0], max(1, budget // (per_head * self.heads)))
        heads = max(1, min(self.heads, budget // per_head)) if images == 1 else self.heads
        for image in range(0, self.value.shape[0], images):
            for head in range(0, self.heads, heads):
                count = min(heads, self.heads - head)
                queries, keys = (tokens_of(self.spec, side, head, count) for side in ("query", "key"))
                yield Chunk(image, min(images, self.value.shape[0] - image), head, count, queries, keys)

    def by_head(self, name: str, width: int, chunk: Chunk) -> Tensor | None:
        """A vector [nH*d] as [h, d]."""
        vector = self.operands.get(name)
        return None if vector is None else vector.view(self.heads, width)[chunk.head : chunk.head + chunk.heads]

    def gather(self, name: str, chunk: Chunk) -> Tensor:
        """Queries, keys or values of the chunk, [b*nW*h, N or M, d], the extra ones behind them."""
        width = self.value_dim if name == "value" else self.head_dim
        tokens = chunk.queries if name == "query" else chunk.keys
        padding = None if name == "query" else self.by_head(f"{name}_padding", width, chunk)
        gathered = tokens.gather(self.rows[name], chunk.image, chunk.images, padding)
        extra = self.operands.get(f"extra_{name}")
        if extra is None:
            return gathered
        beside = extra.view(*extra.shape[:3], self.heads, width)[:, :, :, chunk.head : chunk.head + chunk.heads]
        beside = beside if extra.shape[0] == 1 else beside[chunk.image : chunk.image + chunk.images]
        beside = beside.transpose(2, 3).expand(chunk.images, self.windows, -1, -1, -1)
        return torch.cat([gathered, beside.reshape(-1, extra.shape[2], width)], 1)

    def table(self, chunk: Chunk) -> Tensor | None:
        """relative_position of the chunk's heads, [h or 1, R, d]."""
        table = self.operands.get("relative_position")
        if table is None:
            return None
        return (table if table.shape[0] == 1 else table[chunk.head : chunk.head + chunk.heads]).to(self.query.dtype)

    def queries(self, chunk: Chunk) -> tuple[Tensor, Tensor | None]:
        """Queries multiplied by scale, and where the op has relative positions the window's own as they are, apart:
        [b*nW, h, N, d].
        """
        q = self.gather("query", chunk)
        if "relative_position" not in self.operands:
            return q.mul_(self.spec.scale), None
        own = q[:, : self.own_queries].reshape(-1, chunk.heads, self.own_queries, q.shape[-1])
        return q * self.spec.scale, own

    def weights(self, q: Tensor, k: Tensor, unscaled: Tensor | None, chunk: Chunk) -> Tensor:
        """softmax(logits) of scaled queries in the softmax's dtype, [b*nW*h, N, M]."""
        logits = torch.bmm(q, k.transpose(1, 2))
        view = logits.view(chunk.images, self.windows, chunk.heads, self.tokens, self.all_keys)
        if unscaled is not None and (table := self.table(chunk)) is not None:
            relative = relative_logits(self.spec, unscaled, table)
            view[..., : self.own_queries, : self.own_keys] += relative.view(
                chunk.images, self.windows, chunk.heads, self.own_queries, self.own_keys
            )
        view = view.to(self.softmax_dtype)
        for term in self.terms(chunk):
            view += term.to(view.dtype)
        if self.spec.mask_value is not None:
            whole = len(self.spec.runs_of_heads()) == 1
            of = (0, self.heads) if whole else (chunk.head, chunk.heads)
            penalty = region_penalty(self.spec, *of, view.dtype, view.device)
            view[..., : self.own_queries, : self.own_keys] += penalty
        return torch.softmax(view, -1).view(logits.shape)

    def terms(self, chunk: Chunk) -> Iterator[Tensor]:
        """What is added to the chunk's logits [b, nW, h, N, M]."""
        for name in ("bias", "mask", "logit_bias"):
            if name in self.operands:
                yield self.part(name, self.operands[name], chunk)

    def part(self, name: str, whole: Tensor, chunk: Chunk) -> Tensor:
        """Of a term (or its gradient), what the chunk reads, as a view of five axes."""
        if name == "bias":
            return whole[None, :, chunk.head : chunk.head + chunk.heads]
        if name == "mask":
            return whole[None, :, None]
        images = slice(None) if whole.shape[0] == 1 else slice(chunk.image, chunk.image + chunk.images)
        heads = slice(None) if whole.shape[2] == 1 else slice(chunk.head, chunk.head + chunk.heads)
        return whole[images, :, heads]


def relative_logits(spec: FlashWindowAttention, query: Tensor, table: Tensor) -> Tensor:
    """relative_scale * sum_a query[n] . R_a[n_a, m_a], [G, h, N, M]; query [G, h, N, d], table [h or 1, R, d]."""
    rows, heads, tokens, width = query.shape
    geometry = spec.geometry
    window = geometry.window_size
    keys = window if geometry.keys is None else geometry.keys.window_size
    count = math.prod(keys)
    if table.shape[1] != sum(w * k for w, k in zip(window, keys, strict=True)):
        window, keys = (tokens,), (count,)
    total, start = None, 0
    for axis, (extent, length) in enumerate(zip(window, keys, strict=True)):
        before, behind = math.prod(window[:axis]), math.prod(window[axis + 1 :])
        own = table[:, start : start + extent * length].view(-1, extent, length, width).expand(heads, -1, -1, -1)
        start += extent * length
        apart = query.reshape(rows, heads, before, extent, behind, width)
        part = torch.einsum("ghbwcd,hwkd->ghbwck", apart, own).reshape(rows, heads, tokens, length)
        spread = [length if a == axis else 1 for a in range(len(keys))]
        part = part.reshape(rows, heads, tokens, *spread)
        total = part if total is None else total + part
    assert total is not None
    total = total.reshape(rows, heads, tokens, count)
    return total if spec.relative_scale == 1.0 else total * spec.relative_scale


def forward(spec: FlashWindowAttention, operands: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The op's results (docs/ops.md). Raises ValueError where an operand's shape is not the op's."""
    shapes = result_shapes(spec, operands)
    value = operands["value"]
    results = tuple(value.new_empty(shape) for shape in shapes)
    if not value.numel():
        return results
    site = Site(spec, operands)
    pixels = math.prod(spec.geometry.feature_size)
    out = results[0].view(-1, pixels, site.heads, site.value_dim)
    for chunk in site.chunks():
        (q, unscaled), k, v = site.queries(chunk), site.gather("key", chunk), site.gather("value", chunk)
        attended = torch.bmm(site.weights(q, k, unscaled, chunk).to(v.dtype), v)
        of_image, of_head = _ranges(chunk)
        to_map = _map_queries(chunk, spec)
        to_map.put_back(attended[:, : site.own_queries], chunk.images, out[of_image, :, of_head])
        if site.extra_queries:
            beside = attended[:, site.own_queries :].view(chunk.images, site.windows, chunk.heads, -1, site.value_dim)
            target = results[1].view(*results[1].shape[:3], site.heads, site.value_dim)
            target[of_image, :, :, of_head] = beside.transpose(2, 3)
    return results


def _ranges(chunk: Chunk) -> tuple[slice, slice]:
    return slice(chunk.image, chunk.image + chunk.images), slice(chunk.head, chunk.head + chunk.heads)


def _map_queries(chunk: Chunk, spec: FlashWindowAttention) -> Tokens:
    """Where the output's tokens lie on the map; shared queries have none of their own."""
    if not spec.shared_query:
        return chunk.queries
    return tokens_of(replace(spec, shared_query=False), "query", chunk.head, chunk.heads)


class Gradients:
    """The gradients that are wanted, being added up: maps in their own dtype, small operands in float32 at least."""

    def __init__(self, site: Site, wanted: Sequence[str]) -> None:
        self.site, self.wanted = site, wanted
        self.sums: dict[str, Tensor] = {}
        for name in wanted:
            operand = site.operands[name]
            whole = name in ("query", "key", "value")  # every element is written once
            small = torch.promote_types(operand.dtype, torch.float32)
            make = torch.empty if whole else torch.zeros
            self.sums[name] = make(operand.shape, dtype=operand.dtype if whole else small, device=operand.device)

    def results(self) -> list[Tensor]:
        return [self.sums[name].to(self.site.operands[name].dtype) for name in self.wanted]

    def add_tokens(self, name: str, grad: Tensor, chunk: Chunk) -> None:
        """The gradient of gathered queries, keys or values: to the map, its padding and the extra ones."""
        site, tokens = self.site, chunk.queries if name == "query" else chunk.keys
        own = site.own_queries if name == "query" else site.own_keys
        width, inner = grad.shape[-1], grad[:, :own]
        of_image, of_head = _ranges(chunk)
        if name in self.sums:
            whole = self.sums[name].view(site.value.shape[0], -1, site.heads, width)
            tokens.put_back(inner, chunk.images, whole[of_image, :, of_head])
        if f"{name}_padding" in self.sums and tokens.has_padding:
            self.sums[f"{name}_padding"].view(site.heads, width)[of_head] += tokens.sum_outside(inner, chunk.images)
        if f"extra_{name}" in self.sums:
            whole = self.sums[f"extra_{name}"]
            beside = grad[:, own:].reshape(chunk.images, site.windows, chunk.heads, -1, width).transpose(2, 3)
            target = whole.view(*whole.shape[:3], site.heads, width)[:, :, :, of_head]
            target = target if whole.shape[0] == 1 else target[of_image]
            target += _summed_to(beside, target.shape, whole.dtype)

    def add_term(self, name: str, grad: Tensor, chunk: Chunk) -> None:
        """The gradient of the logits [b, nW, h, N, M], to one of the terms added to them."""
        if name in self.sums:
            target = self.site.part(name, self.sums[name], chunk)
            target += _summed_to(grad, target.shape, target.dtype)


def _summed_to(grad: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The gradient of something of this shape that was spread to grad's."""
    axes = [a for a, (full, own) in enumerate(zip(grad.shape, shape, strict=True)) if own == 1 and full != 1]
    return grad.sum(axes, keepdim=True, dtype=dtype) if axes else grad


def backward(
    spec: FlashWindowAttention, operands: Mapping[str, Tensor], grads: Sequence[Tensor | None], wanted: Sequence[str]
) -> list[Tensor]:
    """Gradients of the operands named `wanted`, for those of the results; None: of a result that nobody reads."""
    site = Site(spec, operands)
    sums = Gradients(site, wanted)
    if not site.value.numel():
        return [sum_.zero_() for sum_ in sums.results()]
    rows = None if grads[0] is None else Rows(grads[0], site.heads)
    for chunk in site.chunks():
        (q, unscaled), k, v = site.queries(chunk), site.gather("key", chunk), site.gather("value", chunk)
        if rows is None:
            arrived = q.new_zeros(q.shape[0], site.own_queries, site.value_dim)
        else:
            arrived = _map_queries(chunk, spec).gather(rows, chunk.image, chunk.images, None)
        if site.extra_queries:
            arrived = torch.cat([arrived, _beside(site, grads[1], chunk, arrived)], 1)
        weights = site.weights(q, k, unscaled, chunk)
        low = weights.to(v.dtype)
        if {"value", "value_padding", "extra_value"} & set(wanted):
            sums.add_tokens("value", torch.bmm(low.transpose(1, 2), arrived), chunk)
        grad = torch.bmm(arrived, v.transpose(1, 2)).to(weights.dtype)
        grad = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
        view = grad.view(chunk.images, site.windows, chunk.heads, site.tokens, site.all_keys)
        for name in ("bias", "mask", "logit_bias"):
            sums.add_term(name, view, chunk)
        grad = grad.to(q.dtype)
        if {"key", "key_padding", "extra_key"} & set(wanted):
            sums.add_tokens("key", torch.bmm(grad.transpose(1, 2), q), chunk)
        through_table = _through_table(site, sums, unscaled, grad, chunk)
        if {"query", "extra_query"} & set(wanted):
            of_query = torch.bmm(grad, k).mul_(spec.scale)
            if through_table is not None:
                of_query[:, : site.own_queries] += through_table.reshape(-1, site.own_queries, q.shape[-1])
            sums.add_tokens("query", of_query, chunk)
    return sums.results()


def _beside(site: Site, grad: Tensor | None, chunk: Chunk, like: Tensor) -> Tensor:
    """The second result's gradient [B, nW, T, nH*dv] as rows [b*nW*h, T, dv]."""
    if grad is None:
        return like.new_zeros(like.shape[0], site.extra_queries, site.value_dim)
    of_image, of_head = _ranges(chunk)
    apart = grad.reshape(*grad.shape[:3], site.heads, site.value_dim)[of_image, :, :, of_head]
    return apart.transpose(2, 3).reshape(like.shape[0], site.extra_queries, site.value_dim)


def _through_table(site: Site, sums: Gradients, unscaled: Tensor | None, grad: Tensor, chunk: Chunk) -> Tensor | None:
    """The query's gradient by way of the relative positions, [b*nW, h, N, d]; their own is added to its sum."""
    table = site.table(chunk)
    if table is None or unscaled is None:
        return None
    own = unscaled.detach().requires_grad_()
    table = table.detach().requires_grad_()
    with torch.enable_grad():
        relative = relative_logits(site.spec, own, table)
    arrived = grad[:, : site.own_queries, : site.own_keys].reshape(relative.shape)
    of_query, of_table = torch.autograd.grad(relative, (own, table), arrived)
    if "relative_position" in sums.sums:
        whole = sums.sums["relative_position"]
        target = whole if whole.shape[0] == 1 else whole[chunk.head : chunk.head + chunk.heads]
        target += of_table
    return of_query
