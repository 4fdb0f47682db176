"""Windows beside another kind of mixing: linear attention, downsampled keys, grids, scales, chosen tokens.

Letters: B batch, H/W height and width, C channels, N tokens per window, nH heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from examples.models.swin import WindowAttention, window_merge, window_partition
from tests.architectures.frame import BOTH, Architecture, left, rewritten
from tests.architectures.layers import Attention, Mean, Mlp, OnChannelsFirst, OnTokens, Residual, ToMap, block, network

DIM, HEADS, MAP, WINDOW = 24, 3, (8, 12), (4, 4)


class InWindows(nn.Module):
    """Window attention with relative position bias on a channels-last map."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = WindowAttention(DIM, WINDOW, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        return window_merge(self.attention(window_partition(x, WINDOW), None), WINDOW, (height, width))


class LinearAttention(nn.Module):
    """L2ViT's: ReLU features of query and key, keys summed with values first; then a depthwise convolution of the
    values concentrates it locally. `[B, H, W, C] -> [B, H, W, C]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.local = nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        query, key, value = self.qkv(x.flatten(1, 2)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = torch.relu(query), torch.relu(key)
        normal = query @ key.sum(2, keepdim=True).transpose(-2, -1) + 1e-2
        attended = query @ (key.transpose(-2, -1) @ value) / normal
        attended = attended.transpose(1, 2).flatten(2).unflatten(1, (height, width))
        return self.proj(attended + OnChannelsFirst(self.local)(attended))


def l2vit() -> nn.Module:
    return network(DIM, block(DIM, InWindows()), block(DIM, LinearAttention()))


class MaformerBlock(nn.Module):
    """Multi-scale aggregation: window attention of all tokens; a Linear over the tokens that leaves a few; and a fusion
    in which the former attend the latter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.windows = nn.LayerNorm(DIM), InWindows()
        self.fewer = nn.Linear(MAP[0] * MAP[1], 6)
        self.fuse, self.mlp = Attention(DIM, HEADS), Residual(DIM, Mlp(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        local = self.windows(normed)
        few = self.fewer(normed.flatten(1, 2).transpose(1, 2)).transpose(1, 2)
        fused = self.fuse(local.flatten(1, 2), few).unflatten(1, x.shape[1:3])
        return self.mlp(x + local + fused)


def maformer() -> nn.Module:
    return network(DIM, MaformerBlock(), MaformerBlock())


class DynamicPositionBias(nn.Module):
    """CrossFormer's: an MLP over the offset of two tokens of a group gives each head's bias `[nH, N, N]`."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2, 8),
            nn.LayerNorm(8),
            nn.ReLU(),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.ReLU(),
            nn.Linear(8, HEADS),
        )
        reach = (torch.arange(1 - rows, rows), torch.arange(1 - columns, columns))
        self.register_buffer("offsets", torch.cartesian_prod(*reach).float(), persistent=False)
        tokens = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
        difference = tokens[:, None] - tokens[None] + torch.tensor([rows - 1, columns - 1])
        self.register_buffer("index", difference[..., 0] * (2 * columns - 1) + difference[..., 1], persistent=False)

    def forward(self) -> torch.Tensor:
        return self.mlp(self.offsets)[self.index].permute(2, 0, 1)


class CrossFormerAttention(nn.Module):
    """Short-distance groups are windows; long-distance ones take every `interval`-th row and column."""

    def __init__(self, long: bool) -> None:
        super().__init__()
        self.long, self.head_dim = long, DIM // HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.bias = DynamicPositionBias(*WINDOW)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width, dim = x.shape[1:]
        rows, columns = WINDOW
        if self.long:
            groups = x.reshape(-1, rows, height // rows, columns, width // columns, dim).permute(0, 2, 4, 1, 3, 5)
        else:
            groups = x.reshape(-1, height // rows, rows, width // columns, columns, dim).permute(0, 1, 3, 2, 4, 5)
        tokens = groups.reshape(-1, rows * columns, dim)
        qkv = self.qkv(tokens).reshape(-1, rows * columns, 3, HEADS, self.head_dim).permute(2, 0, 3, 1, 4)
        logits = (qkv[0] * self.head_dim**-0.5) @ qkv[1].transpose(-2, -1) + self.bias()
        attended = self.proj((torch.softmax(logits, -1) @ qkv[2]).transpose(1, 2).flatten(2))
        attended = attended.reshape(-1, height // rows, width // columns, rows, columns, dim)
        order = (0, 3, 1, 4, 2, 5) if self.long else (0, 1, 3, 2, 4, 5)
        return attended.permute(order).reshape(-1, height, width, dim)


class CrossScaleEmbedding(nn.Module):
    """CrossFormer's CEL: patches of several sizes at one stride, their embeddings side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(3, width, size, stride=4, padding=(size - 4) // 2) for size, width in ((4, 12), (8, 6), (16, 6))
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.cat([conv(image) for conv in self.convolutions], dim=1).permute(0, 2, 3, 1)


def crossformer() -> nn.Module:
    blocks = (block(DIM, CrossFormerAttention(long=False)), block(DIM, CrossFormerAttention(long=True)))
    return nn.Sequential(CrossScaleEmbedding(), *blocks, nn.LayerNorm(DIM), Mean(), nn.Linear(DIM, 5))


class DuoFormer(nn.Module):
    """Tokens of two stages of a CNN at one place (one of the coarse stage, four of the fine) attend one another, then
    the coarse tokens of all places do. `[B, P, 1 + 4, C]` is the stream of blocks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = ToMap(DIM, 4), nn.Conv2d(DIM, DIM, 2, 2)
        self.position = nn.Parameter(torch.zeros(1, 1, 5, DIM))
        self.scales = nn.ModuleList(block(DIM, OverScales()) for _ in range(2))
        self.patches = block(DIM, Attention(DIM, HEADS))
        self.head = nn.Sequential(nn.LayerNorm(DIM), Mean(), nn.Linear(DIM, 5))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        fine = self.fine(image)
        height, width = fine.shape[1] // 2, fine.shape[2] // 2
        coarse = OnChannelsFirst(self.coarse)(fine).reshape(-1, height * width, 1, DIM)
        fine = fine.reshape(-1, height, 2, width, 2, DIM).permute(0, 1, 3, 2, 4, 5).reshape(-1, height * width, 4, DIM)
        x = torch.cat([coarse, fine], dim=2) + self.position
        for scales in self.scales:
            x = scales(x)
        return self.head(self.patches(x[:, :, 0]))


class OverScales(nn.Module):
    """Attention among the tokens of one place: `[B, P, S, C] -> [B, P, S, C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(DIM, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x.flatten(0, 1)).reshape(-1, *x.shape[1:])


class HybridScaleAttention(nn.Module):
    """SG-Former's: one group of heads in windows of the full map, the other over keys merged by a convolution.

    What the queries draw from every key is its significance, which orders the tokens for the self-guided attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dim = DIM // 2
        self.split, self.proj = nn.Linear(DIM, 2 * self.dim), nn.Linear(DIM, DIM)
        self.qkv, self.query, self.key_value = (nn.Linear(self.dim, n * self.dim) for n in (3, 1, 2))
        self.merge = nn.Conv2d(self.dim, self.dim, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        one, other = self.split(x).chunk(2, dim=-1)
        query, key, value = self.heads(self.qkv(window_partition(one, WINDOW)), 3)
        near = window_merge(self.attend(query, key, value), WINDOW, (height, width))
        merged = OnChannelsFirst(self.merge)(other).flatten(1, 2)
        (query,), (key, value) = self.heads(self.query(other.flatten(1, 2)), 1), self.heads(self.key_value(merged), 2)
        far = self.attend(query, key, value).unflatten(1, (height, width))
        return self.proj(torch.cat([near, far], dim=-1))

    def heads(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        return x.reshape(x.shape[0], x.shape[1], count, 2, self.dim // 2).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(query @ key.transpose(-2, -1) * (self.dim // 2) ** -0.5, -1)
        return (weights @ value).transpose(1, 2).flatten(2)


class SelfGuidedAttention(nn.Module):
    """SG-Former's token reallocation: the tokens are sorted by significance, the less significant half is merged four
    to one, and all attend what remains. `[B, N, C] -> [B, N, C]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.significance, self.merge, self.attention = nn.Linear(DIM, 1), nn.Linear(4, 1), Attention(DIM, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        order = self.significance(x).squeeze(-1).topk(tokens, dim=1).indices
        ordered = x.gather(1, order.unsqueeze(-1).expand(-1, -1, x.shape[2]))
        kept, rest = ordered[:, : tokens // 2], ordered[:, tokens // 2 :]
        few = self.merge(rest.transpose(1, 2).unflatten(2, (-1, 4))).squeeze(-1).transpose(1, 2)
        return self.attention(x, torch.cat([kept, few], dim=1))


def sgformer() -> nn.Module:
    return network(DIM, block(DIM, HybridScaleAttention()), block(DIM, OnTokens(SelfGuidedAttention())))


class SuperTokens(nn.Module):
    """Super token attention: pixels belong, by soft weights, to the super tokens of the 3 x 3 cells around their own;
    the super tokens attend one another; and every pixel gets its share back. `[B, C, H, W] -> [B, C, H, W]`.

    The weights serve three times: to make the super tokens, to norm them, and to spread the result.
    """

    def __init__(self, size: tuple[int, int], cell: int = 4) -> None:
        super().__init__()
        self.size, self.cell = size, cell
        self.attention = Attention(DIM, HEADS)
        self.register_buffer("spread", torch.eye(9).reshape(9, 1, 3, 3), persistent=False)

    def around(self, x: torch.Tensor) -> torch.Tensor:
        """The 3 x 3 cells around every cell: `[B, C, h, w] -> [B, C, 9, h * w]`."""
        batch, channels, height, width = x.shape
        shifted = F.conv2d(x.reshape(-1, 1, height, width), self.spread, padding=1)
        return shifted.reshape(batch, channels, 9, height * width)

    def gathered(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The sum of what nine cells hold for a cell: `[B, C * 9, h * w] -> [B, C, h, w]`."""
        sums = F.conv_transpose2d(x.reshape(-1, 9, height, width), self.spread, padding=1)
        return sums.reshape(x.shape[0], -1, height, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, dim, cell = x.shape[0], DIM, self.cell
        rows, columns = (extent // cell for extent in self.size)
        pixels = x.reshape(batch, dim, rows, cell, columns, cell).permute(0, 2, 4, 3, 5, 1)
        pixels = pixels.reshape(batch, rows * columns, cell * cell, dim)
        centres = F.adaptive_avg_pool2d(x, (rows, columns))
        near = self.around(centres).permute(0, 3, 1, 2)
        weights = torch.softmax(pixels @ near * dim**-0.5, dim=-1)  # [B, cells, pixels, 9]
        total = self.gathered(weights.sum(2).transpose(1, 2), rows, columns)
        sums = pixels.transpose(-1, -2) @ weights  # [B, cells, C, 9]
        centres = self.gathered(sums.permute(0, 2, 3, 1).reshape(batch, dim * 9, -1), rows, columns) / (total + 1e-6)
        tokens = self.attention(centres.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(-1, dim, rows, columns)
        near = self.around(tokens).permute(0, 3, 1, 2)
        pixels = near @ weights.transpose(-1, -2)  # [B, cells, C, pixels]
        return pixels.reshape(batch, rows, columns, dim, cell, cell).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def super_tokens() -> nn.Module:
    return network(DIM, block(DIM, OnChannelsFirst(SuperTokens(MAP))))


GLOBAL = "every token attends|global attention"


class SparseAttention(Attention):
    """ART's sparse attention: tokens an interval apart attend each other, the map padded to a multiple of it and the
    padded tokens masked (arXiv 2210.01427). `[B, H, W, C] -> [B, H, W, C]`.
    """

    def __init__(self, interval: int) -> None:
        super().__init__(DIM, HEADS)
        self.interval = interval

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, dim = x.shape
        step = self.interval
        below, right = -height % step, -width % step
        rows, columns = (height + below) // step, (width + right) // step
        x = F.pad(x, (0, 0, 0, right, 0, below))
        padded = F.pad(torch.zeros(1, height, width, 1), (0, 0, 0, right, 0, below), value=1.0)
        groups = [t.reshape(-1, rows, step, columns, step, t.shape[3]).permute(0, 2, 4, 1, 3, 5) for t in (x, padded)]
        tokens, padded = (t.reshape(-1, rows * columns, t.shape[5]) for t in groups)
        self.mask = torch.zeros_like(padded).masked_fill(padded > 0, -1e9).transpose(1, 2)
        out = super().forward(tokens).reshape(batch, step, step, rows, columns, dim).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, height + below, width + right, dim)[:, :height, :width]

    def logits(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        logits = query @ key.transpose(-2, -1)
        groups = (-1, len(self.mask), *logits.shape[1:])
        return (logits.reshape(groups) + self.mask[:, None]).reshape(-1, *groups[2:])


def art() -> nn.Module:
    return network(DIM, block(DIM, SparseAttention(3)))


ARCHITECTURES = (
    Architecture("L2ViT", l2vit, (1, 3, 32, 48), (rewritten("window", feature_size=MAP, window_size=WINDOW),)),
    Architecture(
        "MAFormer",
        maformer,
        (1, 3, 32, 48),
        (rewritten("window", 2, feature_size=MAP, window_size=WINDOW), left("global", 2, reason=GLOBAL)),
    ),
    Architecture(
        "CrossFormer",
        crossformer,
        (1, 3, 32, 48),
        (
            rewritten("window", feature_size=MAP, window_size=WINDOW, dilation=(1, 1), bias="constant"),
            rewritten("grid", feature_size=MAP, window_size=WINDOW, dilation=(2, 3), bias="constant"),
        ),
        exporters=BOTH,
    ),
    Architecture(
        "DuoFormer",
        DuoFormer,
        (1, 3, 32, 48),
        (rewritten("window", 2, feature_size=(24, 5), window_size=(1, 5)), left("global", reason=GLOBAL)),
        clean=False,
    ),
    Architecture(
        "SG-Former",
        sgformer,
        (1, 3, 32, 48),
        (
            rewritten("window", feature_size=MAP, window_size=WINDOW),
            left("global", 2, reason=GLOBAL),  # the tokens chosen by TopK are the keys of all
        ),
    ),
    Architecture(
        "Super Token Sampling",
        super_tokens,
        (1, 3, 32, 48),
        (left("other", reason="have 3 uses"), left("global", reason=GLOBAL)),
        clean=False,
    ),
    Architecture(
        "deployed: ART",
        art,
        (1, 3, 32, 52),
        (rewritten("grid", feature_size=(9, 15), window_size=(3, 5), dilation=(3, 3), num_heads=3),),
        exporters=BOTH,
    ),
)
