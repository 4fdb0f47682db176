"""Local attention as modules: windows and neighbourhoods of any feature map, on the operators of `attnrewrite`.

    attend = FlashWindowAttention(96, num_heads=3, window_size=7, shift_size=3)
    attend(torch.randn(2, 56, 80, 96)).shape       # [2, 56, 80, 96]; any height and width, any batch
    slide = SlideAttention(96, num_heads=3, kernel_size=3)
    slide(torch.randn(2, 56, 80, 96)).shape        # the same; train it, then slide.fold()

Maps are channels-last, [B, *S, C], with as many spatial axes S as the sizes have: one, two (a single number means two
equal ones) or three. Both modules train and run on every device and dtype of torch, within torch.autocast and
torch.compile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import attnrewrite.operators  # noqa: F401 - registers the operators
from attnrewrite.localattention.geometry import Sizes

Size = int | Sequence[int]

# Added to the logit of two tokens that the cyclic shift brought together, as in Swin.
_MASK_VALUE = -100.0


def _sizes(size: Size, axes: int = 2) -> Sizes:
    return (size,) * axes if isinstance(size, int) else tuple(size)


def _checked_map(x: Tensor, dim: int, axes: int) -> None:
    if x.dim() != axes + 2 or x.shape[-1] != dim:
        raise ValueError(f"the map must have {axes} spatial axes and {dim} channels at the end, got {tuple(x.shape)}")


class _Attention(nn.Module):
    """Projections in front of and behind the attention, with the parameter names that vision transformers have.

    scale: of the logits; None: head_dim ** -0.5.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, scale: float | None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the heads must divide the channels, got {dim=}, {num_heads=}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)


class FlashWindowAttention(_Attention):
    """Attention within windows, `[B, *S, dim] -> [B, *S, dim]`: shift, padding, partition and merge included.

    window_size, shift_size: pixels, one number or one for each spatial axis; 0 <= shift < window. A map that is no
    multiple of the window is padded at the end, and an axis that one window covers is not shifted, as in torchvision.
    relative_position: whether a table of `prod(2 * window_size - 1)` biases per head is learned and added to the
    logits. Parameters have the names and shapes of Swin's, so state_dicts of timm's and torchvision's window attention
    load (strict=False where they hold the index as well). Raises ValueError for sizes that do not fit.
    Source: Swin Transformer, https://arxiv.org/abs/2103.14030.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Size = 7,
        shift_size: Size = 0,
        *,
        qkv_bias: bool = True,
        relative_position: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, scale)
        self.window_size = _sizes(window_size)
        self.shift_size = _sizes(shift_size, len(self.window_size))
        pairs = list(zip(self.window_size, self.shift_size, strict=False))
        if len(self.shift_size) != len(self.window_size) or any(not 0 <= s < w for w, s in pairs):
            raise ValueError(f"a shift must be at least 0 and below the window, got {window_size=}, {shift_size=}")
        self.relative_position_bias_table: nn.Parameter | None = None
        if relative_position:
            rows = math.prod(2 * w - 1 for w in self.window_size)
            self.relative_position_bias_table = nn.Parameter(
                nn.init.trunc_normal_(torch.empty(rows, num_heads), std=0.02)
            )
            index = torch.from_numpy(_relative_positions(self.window_size))
            self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        _checked_map(x, self.dim, len(self.window_size))
        size = x.shape[1:-1]
        query, key, value = self.qkv(x).split(self.dim, -1)
        padded = any(extent % window for extent, window in zip(size, self.window_size, strict=True))
        bias_of_qkv = self.qkv.bias if padded else None
        shift = [s if extent > w else 0 for s, extent, w in zip(self.shift_size, size, self.window_size, strict=True)]
        attended = torch.ops.attnrewrite.flash_window_attention(
            query,
            key,
            value,
            self.bias(),
            # A zero that padding puts in front of the projection is its bias behind it.
            key_padding=None if bias_of_qkv is None else bias_of_qkv[self.dim : 2 * self.dim],
            value_padding=None if bias_of_qkv is None else bias_of_qkv[2 * self.dim :],
            num_heads=self.num_heads,
            scale=self.scale,
            feature_size=list(size),
            window_size=list(self.window_size),
            shift_size=shift,
            shift_padded=padded,
            mask_value=_MASK_VALUE if any(shift) else None,
        )
        return self.proj(attended)

    def bias(self) -> Tensor | None:
        """What is added to the logits, [1, nH, N, N], or None."""
        if self.relative_position_bias_table is None:
            return None
        index = self.get_buffer("relative_position_index")
        tokens = math.prod(self.window_size)
        rows = self.relative_position_bias_table[index.view(-1)].view(tokens, tokens, -1)
        return rows.permute(2, 0, 1)[None]

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, shift_size={self.shift_size}"


def _relative_positions(window: Sizes) -> np.ndarray:
    """int64 [N, N]: the row of the bias table for query token n and key token m, of their offset n - m."""
    places = np.indices(window).reshape(len(window), -1)
    offsets = places[:, :, None] - places[:, None, :]
    flat = np.zeros(offsets.shape[1:], np.int64)
    for offset, extent in zip(offsets, window, strict=True):
        flat = flat * (2 * extent - 1) + offset + extent - 1
    return flat


class DeformedShift(nn.Module):
    """Shift kernels [head_dim, K, *kernel_size] of SlideAttention and their biases [head_dim, K].

    In training the sum of two paths: fixed kernels that are one at the place of their slot, which shift the map by one
    neighbour each, and learned ones over the same neighbourhood, zero at first. A convolution with the sum is the sum
    of the convolutions, so both paths run as one. `fold` keeps the sum alone.
    """

    def __init__(self, head_dim: int, kernel_size: Sizes) -> None:
        super().__init__()
        slots = math.prod(kernel_size)
        one_hot = torch.eye(slots).view(1, slots, *kernel_size).repeat(head_dim, *[1] * (len(kernel_size) + 1))
        self.register_buffer("shift", one_hot)
        self.weight = nn.Parameter(torch.zeros_like(one_hot))
        self.bias = nn.Parameter(torch.zeros(head_dim, slots))

    @property
    def is_folded(self) -> bool:
        return "shift" not in dict(self.named_buffers(recurse=False))

    def forward(self) -> tuple[Tensor, Tensor]:
        return (self.weight if self.is_folded else self.weight + self.get_buffer("shift")), self.bias

    @torch.no_grad()
    def fold(self) -> None:
        """Make the sum of both paths the one kernel; `shift` is gone from the state_dict then."""
        if not self.is_folded:
            self.weight.add_(self.get_buffer("shift"))
            self.shift = None


class SlideAttention(_Attention):
    """Attention of every pixel to the neighbourhood around it, `[B, *S, dim] -> [B, *S, dim]`; zeros lie outside.

    kernel_size: odd, one number or one for each spatial axis. deformed: whether keys and values are read through
    learned shift kernels (`DeformedShift`, the same for all heads) rather than as they are; shared_shift: whether
    values are read through those of the keys. position_bias [nH, K] is added to the logits.
    After training `fold()` leaves one kernel of each. Raises ValueError for sizes that do not fit.
    Source: Slide-Transformer, https://arxiv.org/abs/2304.04237.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: Size = 3,
        *,
        qkv_bias: bool = True,
        deformed: bool = True,
        shared_shift: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias, scale)
        self.kernel_size = _sizes(kernel_size)
        if any(k < 1 or k % 2 == 0 for k in self.kernel_size):
            raise ValueError(f"a neighbourhood needs odd sizes to have a middle, got {kernel_size=}")
        self.position_bias = nn.Parameter(torch.zeros(num_heads, math.prod(self.kernel_size)))
        self.key_shift = DeformedShift(self.head_dim, self.kernel_size) if deformed else None
        self.value_shift: DeformedShift | None = None
        if deformed:
            self.value_shift = self.key_shift if shared_shift else DeformedShift(self.head_dim, self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        axes = len(self.kernel_size)
        _checked_map(x, self.dim, axes)
        # Moved once and together: kernels read the parts of a channels-first map where they lie.
        query, key, value = self.qkv(x).movedim(-1, 1).contiguous().split(self.dim, 1)
        of_keys = (None, None) if self.key_shift is None else self.key_shift()
        of_values = (None, None) if self.value_shift is None else self.value_shift()
        attended = torch.ops.attnrewrite.slide_attention(
            query,
            key,
            value,
            self.position_bias,
            *of_keys,
            *of_values,
            num_heads=self.num_heads,
            scale=self.scale,
            feature_size=list(x.shape[1:-1]),
            kernel_size=list(self.kernel_size),
        )
        return self.proj(attended.movedim(1, -1))

    def fold(self) -> SlideAttention:
        """Merge the two paths of the shifts for inference, in place; the result is the same function."""
        for shift in (self.key_shift, self.value_shift):
            if shift is not None:
                shift.fold()
        return self

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}"
