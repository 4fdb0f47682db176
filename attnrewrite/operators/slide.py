"""SlideAttention in torch, forward and backward: some images and heads at a time, one neighbour after the other.

The largest tensors of a chunk are its logits and its maps: no copy of keys or values for every neighbour, neither
saved nor made. The backward computes the weights again. Predicted logits and weights run as the op's body, chunk by
chunk as well. Letters as in docs/ops.md; in this file b counts the images of a chunk, h its heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnrewrite.functions.spec import SlideAttention
from attnrewrite.operators import general
from attnrewrite.operators.neighbours import excluded_slots, neighbourhood_of
from attnrewrite.operators.schema import dtype_of, result_shapes

# Bytes of one map of a chunk, part of a second-level cache; on a GPU enough to fill it.
_CPU_MAP, _GPU_MAP = 1 << 19, 64 << 20


@dataclass(frozen=True)
class Chunk:
    """`images` images from `image` on, `heads` heads from `head` on."""

    image: int
    images: int
    head: int
    heads: int

    @property
    def of_images(self) -> slice:
        return slice(self.image, self.image + self.images)

    @property
    def of_heads(self) -> slice:
        return slice(self.head, self.head + self.heads)


def _chunks(spec: SlideAttention, value: Tensor, bytes_per_head: int) -> Iterator[Chunk]:
    """bytes_per_head: of the largest map of one image and head."""
    batch, budget = value.shape[0], _CPU_MAP if value.device.type == "cpu" else _GPU_MAP
    images = min(batch, max(1, budget // (bytes_per_head * spec.num_heads)))
    heads = max(1, min(spec.num_heads, budget // bytes_per_head)) if images == 1 else spec.num_heads
    for image in range(0, batch, images):
        for head in range(0, spec.num_heads, heads):
            yield Chunk(image, min(images, batch - image), head, min(heads, spec.num_heads - head))


class Source:
    """Keys or values of a chunk: their map, and how each slot reads it."""

    def __init__(self, spec: SlideAttention, name: str, operands: Mapping[str, Tensor], chunk: Chunk) -> None:
        self.spec, self.name, self.chunk = spec, name, chunk
        geometry, whole = spec.geometry, operands[name]
        self.width = whole.shape[1] // spec.num_heads
        self.map = _heads_of(whole, spec, chunk)
        self.reading = neighbourhood_of(geometry, whole.device)
        vector = operands.get(f"{name}_padding")
        self.padding = None if vector is None else vector.view(spec.num_heads, self.width)[chunk.of_heads]
        self.kernel = self._by_channel(operands.get(f"{name}_kernel"))  # [h*d, K, *kernel_size]
        self.bias = self._by_channel(operands.get(f"{name}_bias"))  # [h*d, K]

    def _by_channel(self, rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        if rows.shape[0] == self.width:
            return rows.repeat(self.chunk.heads, *[1] * (rows.dim() - 1))
        return rows[self.chunk.head * self.width :][: self.chunk.heads * self.width]

    def slots(self) -> Iterator[Tensor]:
        """[b, h, d, *S] for every slot; valid until the next one is asked for."""
        if self.kernel is None:
            read = self.reading.slots(self.reading.extended(self.map, self.padding))
        else:
            read = (self.convolved(self.map, self.kernel[:, j : j + 1]) for j in range(self.kernel.shape[1]))
        for j, slot in enumerate(read):
            yield slot if self.bias is None else slot + self.spread(self.bias[:, j])

    def spread(self, vector: Tensor) -> Tensor:
        """[h*d] as [1, h, d, 1 ...]."""
        return vector.view(1, self.chunk.heads, self.width, *[1] * (self.map.dim() - 3))

    def convolved(self, feature_map: Tensor, weight: Tensor) -> Tensor:
        """The map under one learned kernel [h*d, 1, *kernel_size]."""
        geometry = self.spec.geometry
        if not geometry.is_plain or geometry.border != "zero":
            raise ValueError(f"shift kernels need a centred neighbourhood of zero border, got {geometry}")
        flat = feature_map.flatten(1, 2)
        axes = flat.dim() - 2
        padding, ones = [-o for o in geometry.offset], [1] * axes
        found = torch.convolution(
            flat, weight, None, ones, padding, list(geometry.dilation), False, [0] * axes, flat.shape[1]
        )
        return found.view(feature_map.shape)


class SourceGradient:
    """The gradient of a `Source`, slot by slot."""

    def __init__(self, source: Source, sums: Mapping[str, Tensor]) -> None:
        self.source, self.sums = source, sums
        name = source.name
        self.of_bias = self._rows(f"{name}_bias", source.bias)
        self.of_kernel = self._rows(f"{name}_kernel", source.kernel)
        wanted = name in sums or f"{name}_padding" in sums or f"{name}_kernel" in sums
        self.of_map: Tensor | None = None
        self._views: Iterator[Tensor] | None = None
        if wanted and source.kernel is None:
            self.of_map = source.map.new_zeros(*source.map.shape[:3], *source.reading.extent)
            self._views = source.reading.slots(self.of_map)
        elif wanted:
            self.of_map = torch.zeros_like(source.map)

    def _rows(self, name: str, rows: Tensor | None) -> Tensor | None:
        return torch.zeros_like(rows, dtype=self.sums[name].dtype) if rows is not None and name in self.sums else None

    def add(self, slot: int, weight: Tensor, factor: Tensor) -> None:
        """The gradient weight [b, h, 1, *S] * factor [b, h, d, *S] of the slot's key or value; slots in their order."""
        if self._views is not None and self.of_bias is None:
            next(self._views).addcmul_(weight, factor)
            return
        grad = weight * factor
        if self.of_bias is not None:
            summed = grad.sum((0, *range(3, grad.dim())), dtype=self.of_bias.dtype)
            self.of_bias[:, slot] += summed.view(-1)
        if self._views is not None:
            next(self._views).add_(grad)
        elif self.of_map is not None:
            self._through_kernel(slot, grad)

    def _through_kernel(self, slot: int, grad: Tensor) -> None:
        source = self.source
        assert source.kernel is not None and self.of_map is not None
        own = source.map.detach().requires_grad_()
        weight = source.kernel[:, slot : slot + 1].detach().requires_grad_()
        with torch.enable_grad():
            found = source.convolved(own, weight)
        of_map, of_weight = torch.autograd.grad(found, (own, weight), grad)
        self.of_map += of_map
        if self.of_kernel is not None:
            self.of_kernel[:, slot : slot + 1] += of_weight

    def finish(self) -> None:
        """Add what was collected to the sums."""
        source, chunk, name = self.source, self.source.chunk, self.source.name
        if self.of_map is not None and name in self.sums:
            returned = self.of_map if source.kernel is not None else source.reading.returned(self.of_map)
            target = self.sums[name]
            target.view(target.shape[0], -1, source.width, *target.shape[2:])[chunk.of_images, chunk.of_heads] = (
                returned
            )
        vector = self.sums.get(f"{name}_padding")
        if vector is not None and source.padding is not None and source.reading.outside is not None:
            assert self.of_map is not None
            vector.view(-1, source.width)[chunk.of_heads] += source.reading.sum_outside(self.of_map)
        for rows, what in ((self.of_bias, "bias"), (self.of_kernel, "kernel")):
            if rows is not None:
                target = self.sums[f"{name}_{what}"]
                if target.shape[0] == source.width:
                    target += rows.view(chunk.heads, *target.shape).sum(0)
                else:
                    target[chunk.head * source.width :][: rows.shape[0]] += rows


def _heads_of(feature_map: Tensor, spec: SlideAttention, chunk: Chunk) -> Tensor:
    """[B, nH*d, *S] -> [b, h, d, *S]."""
    channels, *spatial = feature_map.shape[1:]
    apart = feature_map[chunk.of_images].reshape(chunk.images, spec.num_heads, channels // spec.num_heads, *spatial)
    return apart[:, chunk.of_heads]


def _bias_of(spec: SlideAttention, bias: Tensor, chunk: Chunk) -> Tensor:
    """[1|nH, K] or [1|nH, P, K] (or its gradient) as a view that is added to logits [b, h, K, *S]."""
    own = bias if bias.shape[0] == 1 else bias[chunk.of_heads]
    size = spec.geometry.feature_size
    if own.dim() == 2:
        return own[None, :, :].view(1, *own.shape, *[1] * len(size))
    return own.transpose(1, 2).view(1, own.shape[0], -1, *size)


def _weights(
    spec: SlideAttention, query: Tensor, keys: Source, operands: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """softmax(logits) over the slots, [b, h, K, *S], of a scaled query [b, h, d, *S]."""
    logits = query.new_empty(*query.shape[:2], spec.geometry.keys_per_query, *query.shape[3:])
    for j, slot in enumerate(keys.slots()):
        logits[:, :, j] = (query * slot).sum(2)
    logits = logits.to(dtype)
    if "bias" in operands:
        logits += _bias_of(spec, operands["bias"], keys.chunk).to(dtype)
    if "exclude" in spec.geometry.borders:
        logits.masked_fill_(excluded_slots(spec.geometry, query.device), -math.inf)
    return torch.softmax(logits, 2)


def _scaled_query(spec: SlideAttention, operands: Mapping[str, Tensor], chunk: Chunk) -> Tensor:
    return _heads_of(operands["query"], spec, chunk) * spec.scale


def _map_bytes(spec: SlideAttention, operands: Mapping[str, Tensor]) -> int:
    """Of the largest map of one image and head."""
    value = operands["value"]
    widths = [operands[n].shape[1] // spec.num_heads for n in ("query", "value") if n in operands]
    per_slot = 1 if not spec.predicted else spec.geometry.keys_per_query
    pixels = max(math.prod(spec.geometry.feature_size), math.prod(neighbourhood_of(spec.geometry, value.device).extent))
    return max(1, max(widths) * pixels * value.element_size() * per_slot)


def _softmax_dtype(spec: SlideAttention, value: Tensor) -> torch.dtype:
    return dtype_of(spec.softmax_dtype) if spec.softmax_dtype else value.dtype


def forward(spec: SlideAttention, operands: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The op's result (docs/ops.md). Raises ValueError where an operand's shape is not the op's."""
    (shape,) = result_shapes(spec, operands)
    value = operands["value"]
    result = value.new_empty(shape)
    if not result.numel():
        return (result,)
    whole = result.view(shape[0], spec.num_heads, -1, *shape[2:])
    for chunk in _chunks(spec, value, _map_bytes(spec, operands)):
        if spec.predicted:
            part, own = _part(spec, operands, chunk)
            (found,) = general.run(part, own)
            whole[chunk.of_images, chunk.of_heads] = found.view(chunk.images, chunk.heads, -1, *shape[2:])
            continue
        keys, values = (Source(spec, name, operands, chunk) for name in ("key", "value"))
        query = _scaled_query(spec, operands, chunk)
        weights = _weights(spec, query, keys, operands, _softmax_dtype(spec, value)).to(value.dtype)
        total = query.new_zeros(*query.shape[:2], values.width, *query.shape[3:])
        for j, slot in enumerate(values.slots()):
            total.addcmul_(weights[:, :, j : j + 1], slot)
        whole[chunk.of_images, chunk.of_heads] = total
    return (result,)


def backward(
    spec: SlideAttention, operands: Mapping[str, Tensor], grads: Sequence[Tensor | None], wanted: Sequence[str]
) -> list[Tensor]:
    """Gradients of the operands named `wanted`, for that of the result."""
    (arrived,), value = grads, operands["value"]
    assert arrived is not None
    sums: dict[str, Tensor] = {}
    for name in wanted:
        operand = operands[name]
        small = torch.promote_types(operand.dtype, torch.float32)
        whole = name in ("query", "key", "value", "logits")  # every element is written once
        sums[name] = torch.zeros(operand.shape, dtype=operand.dtype if whole else small, device=operand.device)
    for chunk in _chunks(spec, value, _map_bytes(spec, operands)) if arrived.numel() else ():
        if spec.predicted:
            _predicted_backward(spec, operands, arrived, sums, chunk)
        else:
            _backward(spec, operands, _heads_of(arrived, spec, chunk), sums, chunk)
    return [sums[name].to(operands[name].dtype) for name in wanted]


def _backward(
    spec: SlideAttention, operands: Mapping[str, Tensor], arrived: Tensor, sums: Mapping[str, Tensor], chunk: Chunk
) -> None:
    keys, values = (Source(spec, name, operands, chunk) for name in ("key", "value"))
    of_keys, of_values = SourceGradient(keys, sums), SourceGradient(values, sums)
    query = _scaled_query(spec, operands, chunk)
    weights = _weights(spec, query, keys, operands, _softmax_dtype(spec, query))
    low, of_weights = weights.to(query.dtype), query.new_empty(weights.shape)
    for j, slot in enumerate(values.slots()):
        of_weights[:, :, j] = (arrived * slot).sum(2)
        of_values.add(j, low[:, :, j : j + 1], arrived)
    of_values.finish()
    of_logits = torch._softmax_backward_data(of_weights.to(weights.dtype), weights, 2, weights.dtype)
    if "bias" in sums:
        target = _bias_of(spec, sums["bias"], chunk)
        axes = [a for a, e in enumerate(target.shape) if e == 1 and of_logits.shape[a] != 1]
        target += of_logits.sum(axes, keepdim=True, dtype=target.dtype) if axes else of_logits
    of_logits = of_logits.to(query.dtype)
    of_query = torch.zeros_like(query)
    for j, slot in enumerate(keys.slots()):
        weight = of_logits[:, :, j : j + 1]
        of_query.addcmul_(weight, slot)
        of_keys.add(j, weight, query)
    of_keys.finish()
    if "query" in sums:
        whole = sums["query"]
        apart = whole.view(whole.shape[0], spec.num_heads, -1, *whole.shape[2:])
        apart[chunk.of_images, chunk.of_heads] = of_query * spec.scale


# -- predicted logits and weights -------------------------------------------------------------------------------------


def _part(
    spec: SlideAttention, operands: Mapping[str, Tensor], chunk: Chunk
) -> tuple[SlideAttention, dict[str, Tensor]]:
    """The same op for the images and heads of a chunk."""
    own: dict[str, Tensor] = {}
    for name, operand in operands.items():
        if name in ("value", "logits"):
            own[name] = _heads_of(operand, spec, chunk).flatten(1, 2)
        elif name == "bias":
            own[name] = operand[chunk.of_heads]
        else:
            own[name] = operand.view(spec.num_heads, -1)[chunk.of_heads].reshape(-1)
    return replace(spec, num_heads=chunk.heads), own


def _predicted_backward(
    spec: SlideAttention, operands: Mapping[str, Tensor], arrived: Tensor, sums: Mapping[str, Tensor], chunk: Chunk
) -> None:
    part, own = _part(spec, operands, chunk)
    leaves = {name: operand.detach().requires_grad_(name in sums) for name, operand in own.items()}
    with torch.enable_grad():
        (found,) = general.run(part, leaves)
    names = [name for name in own if name in sums]
    grad = _heads_of(arrived, spec, chunk).flatten(1, 2)
    for name, of_leaf in zip(names, torch.autograd.grad(found, [leaves[n] for n in names], grad), strict=True):
        if name in ("value", "logits"):
            whole = sums[name]
            apart = whole.view(whole.shape[0], spec.num_heads, -1, *whole.shape[2:])
            apart[chunk.of_images, chunk.of_heads] = of_leaf.view(chunk.images, chunk.heads, -1, *whole.shape[2:])
        elif name == "bias":
            sums[name][chunk.of_heads] += of_leaf
        else:
            sums[name].view(spec.num_heads, -1)[chunk.of_heads] += of_leaf.view(chunk.heads, -1)
