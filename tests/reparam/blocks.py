"""Published blocks with re-parameterised branches, as they are trained. Shapes: maps are [B, C, H, W]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F


def conv_bn(inputs: int, outputs: int, kernel: int | tuple[int, int], **options: object) -> nn.Sequential:
    """Convolution without bias, then BatchNorm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs))


def centred(kernel: int, dilation: int = 1) -> int:
    """The padding that keeps a map's size."""
    return dilation * (kernel // 2)


class AsymmetricConv(nn.Module):
    """ACNet's block: k x k, k x 1 and 1 x k summed. Source: https://arxiv.org/abs/1908.03930, section 3.

    Padding less than k // 2 is written as there: the narrow kernels read a cropped map.
    """

    def __init__(self, channels: int, kernel: int = 3, padding: int = 1, stride: int = 1) -> None:
        super().__init__()
        beyond = padding - kernel // 2
        self.crop = max(-beyond, 0)
        outer = max(beyond, 0)
        self.square = conv_bn(channels, channels, kernel, padding=padding, stride=stride)
        self.tall = conv_bn(
            channels, channels, (kernel, 1), padding=(padding if not self.crop else 0, outer), stride=stride
        )
        self.wide = conv_bn(
            channels, channels, (1, kernel), padding=(outer, padding if not self.crop else 0), stride=stride
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.crop
        narrow, low = (x[..., c:-c], x[..., c:-c, :]) if c else (x, x)
        return torch.relu(self.square(x) + self.tall(narrow) + self.wide(low))


class NormAndPad(nn.Module):
    """BatchNorm, then a border of what it makes of zero: what a border of zeros before it would have given."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.norm, self.padding = nn.BatchNorm2d(channels), padding

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, p, norm = self.norm(x), self.padding, self.norm
        if not p:
            return y
        border = norm.bias - norm.running_mean * norm.weight / torch.sqrt(norm.running_var + norm.eps)
        border = border.view(1, -1, 1, 1)
        y = F.pad(y, [p] * 4)
        y[:, :, :p, :] = border
        y[:, :, -p:, :] = border
        y[:, :, :, :p] = border
        y[:, :, :, -p:] = border
        return y


class IdentityBased(nn.Module):
    """A 1 x 1 convolution whose kernel is the identity plus what was learned."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, channels, 1, 1))
        self.register_buffer("identity", torch.eye(channels)[:, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight + self.identity)


class DiverseBranch(nn.Module):
    """DBB: k x k; 1 x 1; 1 x 1 then k x k; 1 x 1 then average pooling. https://arxiv.org/abs/2103.13425, figure 2."""

    def __init__(self, channels: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        pad = kernel // 2
        self.origin = conv_bn(channels, channels, kernel, padding=pad, stride=stride)
        self.pointwise = conv_bn(channels, channels, 1, stride=stride)
        self.sequence = nn.Sequential(
            IdentityBased(channels),
            NormAndPad(channels, pad),
            *conv_bn(channels, channels, kernel, stride=stride),
        )
        self.average = nn.Sequential(
            nn.Conv2d(channels, channels, 1, bias=False),
            NormAndPad(channels, pad),
            nn.AvgPool2d(kernel, stride),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.origin(x) + self.pointwise(x) + self.sequence(x) + self.average(x))


class LargeKernelBlock(nn.Module):
    """RepLKNet's block: BatchNorm, 1 x 1, depthwise k x k beside 5 x 5, 1 x 1, shortcut. https://arxiv.org/abs/2203.06717."""

    def __init__(self, channels: int, kernel: int = 31, small: int = 5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.expand = conv_bn(channels, channels, 1)
        self.large = conv_bn(channels, channels, kernel, padding=centred(kernel), groups=channels)
        self.small = conv_bn(channels, channels, small, padding=centred(small), groups=channels)
        self.project = conv_bn(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.expand(self.norm(x)))
        y = torch.relu(self.large(y) + self.small(y))
        return x + self.project(y)


class DilatedBranches(nn.Module):
    """UniRepLKNet: a depthwise kernel beside smaller dilated ones. https://arxiv.org/abs/2311.15599, section 3.1."""

    def __init__(
        self,
        channels: int,
        kernel: int = 13,
        kernels: Sequence[int] = (5, 7, 3, 3, 3),
        dilations: Sequence[int] = (1, 2, 3, 4, 5),
    ) -> None:
        super().__init__()
        every = [(kernel, 1), *zip(kernels, dilations, strict=True)]
        self.branches = nn.ModuleList(
            conv_bn(channels, channels, k, padding=centred(k, d), dilation=d, groups=channels) for k, d in every
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(sum((branch(x) for branch in self.branches[1:]), self.branches[0](x)))


class ParallelLinears(nn.Module):
    """[B, C] -> [B, C]: BatchNorm into a linear layer, two beside it, one of them through a wider space."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.first = nn.BatchNorm1d(channels), nn.Linear(channels, channels)
        self.second = nn.Linear(channels, channels, bias=False)
        self.widen, self.narrow = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.first(self.norm(x)) + self.second(x) + self.narrow(self.widen(x)))
