"""Global attention in its forms, and attention whose tokens are chosen from data: all of it is left, and says why.

Letters: B batch, H/W height and width, C channels, N tokens, nH heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.architectures.frame import BOTH, Architecture, left
from tests.architectures.layers import Attention, Mlp, OnChannelsFirst, OnTokens, Residual, block, network

DIM, HEADS = 24, 3


class StripAttention(nn.Module):
    """S2AFormer's strip self-attention: queries and keys of one channel per head, keys and values of a map reduced by
    a strided depthwise convolution. `[B, H, W, C] -> [B, H, W, C]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.proj = (nn.Linear(DIM, n) for n in (HEADS, HEADS, DIM, DIM))
        self.reduce = nn.Conv2d(DIM, DIM, 2, 2, groups=DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = OnChannelsFirst(self.reduce)(x).flatten(1, 2)
        query, key = self.query(x.flatten(1, 2)).transpose(1, 2), self.key(few).transpose(1, 2)
        value = self.value(few).unflatten(2, (HEADS, -1)).transpose(1, 2)
        weights = torch.softmax(query.unsqueeze(-1) @ key.unsqueeze(-2), dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2)).reshape(x.shape)


def s2aformer() -> nn.Module:
    return network(DIM, block(DIM, StripAttention()))


class DualTokenBlock(nn.Module):
    """Convolution for the local part; a few position-aware global tokens take from the downsampled map and give to all
    of its tokens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(
            nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM), nn.BatchNorm2d(DIM), nn.Conv2d(DIM, DIM, 1), nn.GELU()
        )
        self.tokens = nn.Parameter(torch.zeros(1, 7, DIM))
        self.down = nn.Conv2d(DIM, DIM, 2, 2)
        self.take, self.give = Attention(DIM, HEADS), Attention(DIM, HEADS)
        self.norm, self.mlp = nn.LayerNorm(DIM), Residual(DIM, Mlp(DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        small = OnChannelsFirst(self.down)(normed).flatten(1, 2)
        tokens = self.tokens.expand(x.shape[0], -1, -1)
        tokens = tokens + self.take(tokens, small)
        given = self.give(normed.flatten(1, 2), tokens).reshape(x.shape)
        return self.mlp(x + OnChannelsFirst(self.local)(normed) + given)


def dual_token_vit() -> nn.Module:
    return network(DIM, DualTokenBlock(), DualTokenBlock())


class PathMaskedAttention(Attention):
    """Polyline path masked attention: the weight of two pixels is multiplied by the product of the decays along the
    path that joins them, first along rows, then along columns. The decays are predicted from the tokens.
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(DIM, HEADS)
        self.rows, self.columns, self.decays = rows, columns, nn.Linear(DIM, 2)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        query = self.heads(self.query(x)) * self.head_dim**-0.5
        key, value = (self.heads(t) for t in self.key_value(x).chunk(2, dim=-1))
        weights = torch.softmax(self.logits(query, key), dim=-1) * self.path_mask(x).unsqueeze(1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))

    def path_mask(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, N, N]` from the decays of every pixel along its row and its column."""
        along = F.logsigmoid(self.decays(x)).reshape(-1, self.rows, self.columns, 2)
        row, column = along[..., 0].cumsum(2), along[..., 1].cumsum(1)
        across = (row.unsqueeze(3) - row.unsqueeze(2)).abs().neg()  # [B, rows, columns, columns]
        down = (column.unsqueeze(2) - column.unsqueeze(1)).abs().neg()  # [B, rows, rows, columns]
        path = across.unsqueeze(3) + down.unsqueeze(2)  # [B, rows, columns, rows, columns]
        return path.flatten(1, 2).flatten(2).exp()


def ppma() -> nn.Module:
    return network(DIM, block(DIM, OnTokens(PathMaskedAttention(4, 6))))


class UniFormer(nn.Module):
    """Local blocks (a position convolution added to its input; 1 x 1, 5 x 5 depthwise, 1 x 1), then global ones."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.ModuleList(nn.Conv2d(DIM, DIM, 3, padding=1, groups=DIM) for _ in range(2))
        self.local = nn.Sequential(
            nn.BatchNorm2d(DIM),
            nn.Conv2d(DIM, DIM, 1),
            nn.Conv2d(DIM, DIM, 5, padding=2, groups=DIM),
            nn.Conv2d(DIM, DIM, 1),
        )
        self.everywhere = OnTokens(block(DIM, Attention(DIM, HEADS)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2)
        x = x + self.position[0](x)
        x = x + self.local(x)
        x = x + self.position[1](x)
        return self.everywhere(x.permute(0, 2, 3, 1))


def uniformer() -> nn.Module:
    return network(DIM, UniFormer())


class TransFer(nn.Module):
    """Local CNN maps weighted by multi-attention dropping (nothing at inference), then transformer blocks with a class
    token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.local = nn.ModuleList(
            nn.Sequential(nn.Conv2d(DIM, 8, 1), nn.ReLU(), nn.Conv2d(8, 1, 1), nn.Sigmoid()) for _ in range(3)
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.blocks = nn.Sequential(*(block(DIM, Attention(DIM, HEADS)) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.permute(0, 3, 1, 2)
        x = x * torch.cat([local(x) for local in self.local], dim=1).amax(1, keepdim=True)
        tokens = x.flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], dim=1))


def transfer() -> nn.Module:
    return network(DIM, TransFer())


class TemporalFusion(nn.Module):
    """TGBFormer on a clip `[B, T, 3, H, W]`: the key frame's tokens attend those of all frames, and a graph convolution
    joins the frames' regions by the softmax of their similarity.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 4, 4)
        self.attention, self.relations, self.mlp = Attention(DIM, HEADS), nn.Linear(DIM, DIM), Residual(DIM, Mlp(DIM))
        self.head = nn.Linear(DIM, 5)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        frames = clip.shape[1]
        maps = self.embed(clip.flatten(0, 1))
        tokens = maps.flatten(2).transpose(1, 2).reshape(clip.shape[0], -1, DIM)
        regions = F.avg_pool2d(maps, 2).flatten(2).transpose(1, 2).reshape(clip.shape[0], -1, DIM)
        edges = torch.softmax(regions @ regions.transpose(1, 2) * DIM**-0.5, dim=-1)
        regions = regions + torch.relu(self.relations(edges @ regions))
        key_frame = tokens[:, : tokens.shape[1] // frames]
        fused = self.mlp(key_frame + self.attention(key_frame, tokens))
        return self.head(fused.mean(1) + regions.mean(1))


class SparsifiedAttention(Attention):
    """Sparsifiner: low-rank logits predict for every query the keys worth attending; only the strongest are kept."""

    def __init__(self, keep: int = 6) -> None:
        super().__init__(DIM, HEADS)
        self.keep, self.guess = keep, nn.Linear(DIM // HEADS, 2, bias=False)

    def logits(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        guessed = self.guess(query) @ self.guess(key).transpose(-2, -1)
        least = guessed.topk(self.keep, dim=-1).values[..., -1:]
        return (query @ key.transpose(-2, -1)).masked_fill(guessed < least, float("-inf"))


def sparsifiner() -> nn.Module:
    return network(DIM, block(DIM, OnTokens(SparsifiedAttention())))


class RoutedAttention(nn.Module):
    """BiFormer's bi-level routing: every window's mean chooses the windows it resembles most, and the pixels of a
    window attend the pixels of those. `[B, H, W, C] -> [B, H, W, C]`, windows of 4 x 4.
    """

    def __init__(self, chosen: int = 2) -> None:
        super().__init__()
        self.chosen, self.head_dim = chosen, DIM // HEADS
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        rows, columns = height // 4, width // 4
        windows = self.qkv(x).reshape(-1, rows, 4, columns, 4, 3 * DIM).permute(0, 1, 3, 2, 4, 5)
        query, key, value = windows.reshape(-1, rows * columns, 16, 3 * DIM).chunk(3, dim=-1)
        alike = query.mean(2) @ key.mean(2).transpose(1, 2)
        routes = alike.topk(self.chosen, dim=-1).indices  # [B, windows, chosen]
        key, value = self.routed(key, routes), self.routed(value, routes)
        query = query.unflatten(3, (HEADS, -1)).transpose(2, 3)
        weights = torch.softmax(query @ key.transpose(-2, -1) * self.head_dim**-0.5, dim=-1)
        attended = (weights @ value).transpose(2, 3).reshape(-1, rows, columns, 4, 4, DIM)
        return self.proj(attended.permute(0, 1, 3, 2, 4, 5).reshape(x.shape))

    def routed(self, x: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        """`[B, windows, 16, C] -> [B, windows, nH, chosen * 16, d]`: the windows that each window chose."""
        count = x.shape[1]
        index = routes[..., None, None].expand(-1, -1, -1, *x.shape[2:])
        found = x.unsqueeze(1).expand(-1, count, -1, -1, -1).gather(2, index)
        return found.flatten(2, 3).unflatten(3, (HEADS, -1)).transpose(2, 3)


def biformer() -> nn.Module:
    return network(DIM, block(DIM, RoutedAttention()))


GLOBAL = "every token attends|global attention"
ARCHITECTURES = (
    Architecture("S2AFormer", s2aformer, (1, 3, 24, 32), (left("global", reason=GLOBAL),)),
    Architecture("DualToken-ViT", dual_token_vit, (1, 3, 24, 32), (left("global", 4, reason=GLOBAL),)),
    Architecture(
        "PPMA (polyline path mask)",
        ppma,
        (1, 3, 16, 24),
        (left("global", reason="the probabilities are multiplied by a tensor computed from data"),),
    ),
    Architecture("UniFormer", uniformer, (1, 3, 24, 32), (left("global", reason=GLOBAL),), folds=2, exporters=BOTH),
    Architecture("TransFER", transfer, (1, 3, 24, 32), (left("global", 2, reason=GLOBAL),)),
    Architecture("TGBFormer", TemporalFusion, (1, 3, 3, 16, 24), (left("global", 2, reason=GLOBAL),)),
    Architecture(
        "Sparsifiner",
        sparsifiner,
        (1, 3, 24, 32),
        (left("global", reason="attends the same 48 keys; a mask computed from data excludes some"),),
        exporters=BOTH,
    ),
    Architecture(
        "BiFormer",
        biformer,
        (1, 3, 32, 48),
        (left("other", reason="key tokens are chosen from data: they come from GatherElements, at indices that TopK"),),
        clean=False,
    ),
)
