"""What the models here share: the parts around the attention, and random parameters for testing.

Feature maps are channels-last `[B, H, W, C]` between blocks. Letters: B batch, H/W height/width, C channels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Mlp(nn.Sequential):
    """Linear, GELU, Linear over the channels: `[..., C] -> [..., C]`."""

    def __init__(self, dim: int, ratio: float = 4.0) -> None:
        hidden = int(dim * ratio)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class PatchEmbed(nn.Module):
    """Image `[B, 3, H, W]` to tokens `[B, ceil(H/p), ceil(W/p), C]`: a convolution of stride p, then LayerNorm."""

    def __init__(self, dim: int, patch_size: int = 4, in_channels: int = 3) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        height, width, p = image.shape[2], image.shape[3], self.patch_size
        if height % p or width % p:
            image = F.pad(image, (0, -width % p, 0, -height % p))
        return self.norm(self.proj(image).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Every 2 x 2 patch of tokens into one: `[B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2C]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1], x.shape[2]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        patches = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(patches, dim=-1)))


class ClassifierHead(nn.Module):
    """LayerNorm, mean over the map, Linear: `[B, H, W, C] -> [B, num_classes]`."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(x).mean(dim=(1, 2)))


def softmax(logits: torch.Tensor, dim: int, dtype: torch.dtype | None) -> torch.Tensor:
    """Softmax over `dim`, computed in `dtype` where one is given (float32 in half-precision models)."""
    if dtype is None:
        return torch.softmax(logits, dim)
    return torch.softmax(logits.to(dtype), dim).to(logits.dtype)


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every trainable parameter and running statistic a random value, in place; returns the model.

    A fresh model hides wrong rewrites: bias tables and layer scales start at zero, weights of std 0.02 make every
    softmax flat. Here weights keep unit variance, so the logits vary by about 1; fixed parameters (requires_grad=False)
    stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.requires_grad:
                    continue
                if isinstance(module, nn.Linear | nn.Conv2d) and name == "weight":
                    parameter.copy_(normal(parameter) * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(normal(parameter) * 0.2)
            if (
                isinstance(module, nn.BatchNorm2d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                module.running_mean.copy_(normal(module.running_mean) * 0.2)
                module.running_var.copy_(normal(module.running_var).abs() + 0.5)
    return model
