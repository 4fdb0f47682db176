"""Operands as the kernels read them."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

from attnrewrite.functions.spec import FlashWindowAttention, Spec
from attnrewrite.operators.kernel import Step

# Bytes: the widest load of a GPU kernel, of whose multiples its operands begin unless they are parts of wider maps.
_WORD = 16
# Bytes: what kernels of CPUs take for granted of operands that are no parts of wider maps, as torch allocates them.
_LINE = 64


def as_read_by_gpu(spec: Spec, operand: Tensor, dtype: torch.dtype, step: Step = None) -> Tensor:
    """Contiguous, aligned and of this dtype; numbers beyond its range are its last, infinities stay. A part of a wider
    map as `as_read_by_cpu` gives it, aligned to the loads that its kernel makes.
    """
    if step is not None:
        # The kernel's loads are of channels of a head of a pixel, or of pixels of a row.
        is_window = isinstance(spec, FlashWindowAttention)
        run = math.gcd(operand.shape[-1] // spec.num_heads, step) if is_window else operand.shape[-1]
        numbers = _from_first_to_last(spec, operand, step)
        return numbers.clone() if operand.data_ptr() % math.gcd(run * operand.itemsize, _WORD) else numbers
    if operand.dtype != dtype:
        limits = torch.finfo(dtype)
        operand = torch.where(operand.isinf(), operand, operand.clamp(limits.min, limits.max)).to(dtype)
    return _aligned(operand, _WORD)


def as_read_by_cpu(spec: Spec, name: str, operand: Tensor, step: Step, lanes: int) -> Tensor:
    """A part of a wider map as that map's numbers from its first to its last; biases and masks laid out for vectors;
    other operands contiguous and aligned.
    """
    if step is not None:
        return _from_first_to_last(spec, operand, step)
    if isinstance(spec, FlashWindowAttention):
        if name in ("bias", "mask"):
            return _laid_out_before(operand, lanes)
        if name == "relative_position":
            return _laid_out_positions(operand, spec, lanes)
    return _aligned(operand, _LINE)


def _aligned(operand: Tensor, boundary: int) -> Tensor:
    """Contiguous, from a multiple of so many bytes on; a copy where it is not."""
    operand = operand.contiguous()
    return operand.clone() if operand.data_ptr() % boundary else operand


def _from_first_to_last(spec: Spec, part: Tensor, step: int) -> Tensor:
    """A vector of the wider map's numbers from the first of a part to its last, where they lie."""
    shape = part.shape
    if isinstance(spec, FlashWindowAttention):
        count = (math.prod(shape[:-1]) - 1) * step + shape[-1]
    else:
        count = (shape[0] - 1) * step * math.prod(shape[2:]) + math.prod(shape[1:])
    return part.as_strided((count,), (1,))


# Bytes of biases and masks that are kept in the kernels' layout.
_KEPT_BYTES = 64 << 20


class _Kept:
    """terms: biases and masks by where they lie, and how kernels read them. size: of both, in bytes."""

    def __init__(self) -> None:
        self.terms: dict[Any, tuple[Tensor, Tensor]] = {}
        self.size = 0
        self.lock = threading.Lock()


_kept = _Kept()


def _laid_out_before(term: Tensor, lanes: int) -> Tensor:
    """`_laid_out`, or what it returned before for the same numbers: comparing them is cheaper by far."""
    key = (term.data_ptr(), term.shape, term.stride(), lanes)
    kept = _kept.terms.get(key)
    if kept is not None and torch.equal(kept[0], term):
        return kept[1]
    laid_out = _laid_out(term, lanes)
    size = 4 * (term.numel() + laid_out.numel())
    with _kept.lock:
        if kept is None:
            _kept.size += size
        if _kept.size > _KEPT_BYTES:
            _kept.terms.clear()
            _kept.size = size
        if size <= _KEPT_BYTES:
            _kept.terms[key] = (term.clone(), laid_out)
    return laid_out


_LOG2_E = 1.0 / math.log(2.0)
_LOWEST = torch.finfo(torch.float32).min


def _laid_out(term: Tensor, lanes: int) -> Tensor:
    """`lay_out` of lowering/kernels/window_cpu_operands.py on tensors: queries in lanes, powers of two."""
    *outer, queries, keys = term.shape
    width = 1 if queries == 1 else lanes
    # The lowest number there is masks as well; a row of nothing else is a mean of all values, not of none.
    scaled = torch.where(term.isfinite(), (term * _LOG2_E).clamp_(_LOWEST, -_LOWEST), term)
    if queries % width:
        scaled = torch.nn.functional.pad(scaled, (0, 0, 0, -queries % width))
    return scaled.view(*outer, -1, width, keys).transpose(-1, -2).contiguous()


def _laid_out_positions(table: Tensor, spec: FlashWindowAttention, lanes: int) -> Tensor:
    """The same of relative_position: every query coordinate has a matrix [d, key coordinates]."""
    window = spec.geometry.window_size
    keys = window if spec.geometry.keys is None else spec.geometry.keys.window_size
    heads, _, channels = table.shape
    laid_out = table.new_zeros(heads, sum(window), channels, -(-max(keys) // lanes) * lanes)
    row, first = 0, 0
    for extent, length in zip(window, keys, strict=True):
        own = table[:, row : row + extent * length].reshape(heads, extent, length, channels)
        laid_out[:, first : first + extent, :, :length] = own.transpose(2, 3) * (spec.relative_scale * _LOG2_E)
        row, first = row + extent * length, first + extent
    return laid_out
