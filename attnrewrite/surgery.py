"""Change what a model computes: window attention replaced by Slide Attention, to be trained.

    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=True)
    for replaced in windows_to_slide(model, stages=(0, 1)):
        print(replaced)

This is no rewrite of the same function, as everything else in this package is: it happens only where it is called, and
the model needs training afterwards. It is how Slide-Transformer makes Slide-Swin of Swin,
https://arxiv.org/abs/2304.04237: Slide Attention in the first stages, shifted windows in the later ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnrewrite.errors import UserError
from attnrewrite.localattention.geometry import Sizes, by
from attnrewrite.nn import SlideAttention

# What a block of window attention between maps may consist of, for SlideBlock to take its place.
_BLOCK_PARTS = frozenset({"norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2"})


@dataclass(frozen=True)
class Replaced:
    """One attention that was replaced. name: of the module in the model. stage: counted by channel widths, from 0.
    window_size, kernel_size: in pixels.
    """

    name: str
    stage: int
    dim: int
    num_heads: int
    window_size: Sizes
    kernel_size: Sizes

    def __str__(self) -> str:
        change = f"{by(self.window_size)} windows -> {by(self.kernel_size)} neighbourhoods"
        return f"{self.name} (stage {self.stage}, {self.dim} channels, {self.num_heads} heads): {change}"


class SlideBlock(nn.Module):
    """The block of a window attention with Slide Attention in its place, `[B, H, W, C] -> [B, H, W, C]`.

    Keeps the block's norms, MLP and stochastic depth, and their names in the state_dict.
    """

    norm1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module, attention: SlideAttention) -> None:
        super().__init__()
        for name in ("norm1", "drop_path1", "norm2", "mlp", "drop_path2"):
            setattr(self, name, getattr(block, name, nn.Identity()))
        self.attn = attention

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        result: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return result

    def set_input_size(self, *args: object, **keywords: object) -> None:
        """timm tells its blocks the size of their map; this one takes any."""


def windows_to_slide(
    model: nn.Module, stages: Iterable[int] = (0, 1), kernel_size: int = 3, *, deformed: bool = True
) -> tuple[Replaced, ...]:
    """Replace the window attention of these stages by Slide Attention, in place, and say what was replaced.

    Window attention is found by its parts: a projection `qkv`, `proj`, `num_heads` and a
    `relative_position_bias_table`, in a module that shifts and partitions the map itself (torchvision) or in a block
    that does so for it (timm). Stages are counted by channel widths, the narrowest first. The new modules take over the
    projections and, for the offsets of the neighbourhood, the relative position biases; their learned shifts, for
    which see `deformed` of attnrewrite.nn.SlideAttention, start as none. Dropout within the attention is left out.
    Raises UserError where no window attention of these stages is found, with the reasons why others were left.
    """
    found, left = _window_attentions(model)
    widths = sorted({_dim(attention) for _, attention, _ in found})
    stages = sorted(stages)
    wanted = {widths[s] for s in stages if 0 <= s < len(widths)}
    replaced = []
    for name, attention, block_name in found:
        dim = _dim(attention)
        if dim not in wanted:
            continue
        slide = _slide_of(attention, kernel_size, deformed)
        new: nn.Module = slide
        if block_name is not None:
            block = model.get_submodule(block_name)
            new = SlideBlock(block, slide)
            new.training = block.training
        _put(model, name if block_name is None else block_name, new)
        size = _window_of(attention)
        replaced.append(Replaced(name, widths.index(dim), dim, attention.num_heads, size, slide.kernel_size))
    if not replaced:
        reasons = "; ".join(left) or "no further module has qkv, proj and a relative position bias table"
        there = f"; there are stages 0 to {len(widths) - 1}" if widths else ""
        raise UserError(f"no window attention was found in stages {stages}{there}: {reasons}")
    return tuple(replaced)


# A module that is known by what it has.
_Attention = Any

_Found = tuple[str, _Attention, str | None]


def _window_attentions(model: nn.Module) -> tuple[list[_Found], list[str]]:
    """(name, module, name of the block that partitions for it or None) of each that can be replaced; why others not."""
    found: list[_Found] = []
    left: list[str] = []
    for name, module in model.named_modules():
        if not hasattr(module, "relative_position_bias_table") and not hasattr(module, "logit_scale"):
            continue
        if not isinstance(getattr(module, "qkv", None), nn.Linear) or not hasattr(module, "proj"):
            continue
        reason, block_name = _place(model, name, module)
        if reason:
            left.append(f"{name or 'the model'}: {reason}")
        else:
            found.append((name, module, block_name))
    return found, left


def _place(model: nn.Module, name: str, module: _Attention) -> tuple[str, str | None]:
    """Why the attention is not replaced, or nothing, and the block that has to be replaced with it."""
    if hasattr(module, "logit_scale"):
        return "it divides by the norms of query and key (Swin V2), which Slide Attention does not", None
    if module.qkv.out_features != 3 * module.qkv.in_features:
        return "its heads are wider than its map, so its projections do not fit", None
    rows = math.prod(2 * w - 1 for w in _window_of(module))
    if tuple(module.relative_position_bias_table.shape) != (rows, module.num_heads):
        return f"its table is not one of relative positions in {by(_window_of(module))} windows", None
    if not name:
        return "it is the model itself, which cannot be replaced in place", None
    if hasattr(module, "shift_size"):
        return "", None
    block_name, _, own = name.rpartition(".")
    block = model.get_submodule(block_name)
    parts = {n for n, _ in block.named_children()}
    partitions = hasattr(block, "shift_size") and hasattr(block, "window_size")
    if not partitions or own != "attn" or not {"norm1", "norm2", "mlp"} <= parts <= _BLOCK_PARTS or not block_name:
        return "the block around it is none of norm, attention, norm and MLP that shifts and partitions its map", None
    if any(parameter for parameter in block.parameters(recurse=False)):
        return "the block around it has parameters of its own", None
    return "", block_name


def _dim(attention: _Attention) -> int:
    return int(attention.qkv.in_features)


def _window_of(attention: _Attention) -> Sizes:
    window = attention.window_size
    return (int(window),) * 2 if isinstance(window, int) else tuple(int(w) for w in window)


def _slide_of(attention: _Attention, kernel_size: int, deformed: bool) -> SlideAttention:
    """Slide Attention with the projections and position biases of a window attention."""
    window = _window_of(attention)
    slide = SlideAttention(
        _dim(attention),
        attention.num_heads,
        (kernel_size,) * len(window),
        qkv_bias=attention.qkv.bias is not None,
        deformed=deformed,
        scale=getattr(attention, "scale", None),
    )
    with torch.no_grad():
        slide.qkv.load_state_dict(attention.qkv.state_dict())
        slide.proj.weight.copy_(attention.proj.weight)
        slide.proj.bias.copy_(attention.proj.bias if attention.proj.bias is not None else torch.zeros(()))
        slide.position_bias.copy_(_position_bias(attention.relative_position_bias_table, window, slide.kernel_size))
    like = attention.qkv.weight
    return slide.to(device=like.device, dtype=like.dtype).train(attention.training)


def _position_bias(table: Tensor, window: Sizes, kernel: Sizes) -> Tensor:
    """The biases of a neighbourhood's offsets, [nH, K]; 0 for those that are not found in a window.

    Row n - m of the table belongs to query n and key m, and slot j lies j - kernel // 2 behind its query.
    """
    offsets = [k // 2 - i for k, i in zip(kernel, np.indices(kernel).reshape(len(kernel), -1), strict=True)]
    inside = np.logical_and.reduce([abs(o) < w for o, w in zip(offsets, window, strict=True)])
    row = np.zeros(math.prod(kernel), np.int64)
    for offset, extent in zip(offsets, window, strict=True):
        row = row * (2 * extent - 1) + np.clip(offset, 1 - extent, extent - 1) + extent - 1
    rows = table.detach()[torch.from_numpy(row).to(table.device)]
    return (rows * torch.from_numpy(inside).to(table.device)[:, None]).T


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
