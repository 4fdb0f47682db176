"""Architectures whose attention is global, depends on data, or runs its softmax over something else than keys.

Letters: B batch, H/W height/width, N tokens, C channels, nH heads, d head_dim. All take an image [B, 3, H, W].
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.architectures.frame import BOTH, Architecture, left


def heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[B, N, C] -> [B, nH, N, d]"""
    return x.reshape(x.shape[0], -1, num_heads, x.shape[2] // num_heads).transpose(1, 2)


def merged(x: torch.Tensor) -> torch.Tensor:
    """[B, nH, N, d] -> [B, N, C]"""
    return x.transpose(1, 2).reshape(x.shape[0], -1, x.shape[1] * x.shape[3])


class Tokens(nn.Module):
    """Image to tokens [B, N, C] with a learned position each; with a class token in front if asked for."""

    def __init__(self, dim: int, size: tuple[int, int], patch: int = 8, class_token: bool = False) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)
        count = (size[0] // patch) * (size[1] // patch) + class_token
        self.position = nn.Parameter(torch.randn(1, count, dim))
        self.class_token = nn.Parameter(torch.randn(1, 1, dim)) if class_token else None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.proj(image).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return x + self.position


class Attention(nn.Module):
    """Multi-head attention of every query token to every key token."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, query: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        q = heads(self.q(query), self.num_heads)
        k, v = (heads(t, self.num_heads) for t in self.kv(memory).chunk(2, dim=-1))
        return self.proj(merged(self.weights(q, k).softmax(dim=-1) @ v))

    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.transpose(2, 3) * q.shape[-1] ** -0.5


class Mlp(nn.Sequential):
    def __init__(self, dim: int) -> None:
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class EViT(nn.Module):
    """EViT: the tokens that the class token looks at most are kept, the others fused into one (arXiv 2202.07800)."""

    def __init__(self, size: tuple[int, int] = (48, 64), dim: int = 24, keep: int = 20) -> None:
        super().__init__()
        self.num_heads, self.keep = 3, keep
        self.tokens = Tokens(dim, size, class_token=True)
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim)
        self.last = Attention(dim, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.tokens(image)
        q, k, v = (heads(t, self.num_heads) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + self.proj(merged(weights @ v))
        attentive = weights[:, :, 0, 1:].mean(dim=1)  # [B, N - 1]
        kept = attentive.topk(self.keep, dim=1).indices.sort(dim=1).values[..., None].expand(-1, -1, x.shape[2])
        rest = 1 - torch.zeros_like(attentive).scatter(1, kept[..., 0], 1.0)
        fused = (x[:, 1:] * (attentive * rest)[..., None]).sum(dim=1, keepdim=True)
        x = torch.cat([x[:, :1], x[:, 1:].gather(1, kept), fused], dim=1)
        x = x + self.mlp(x)
        return x + self.last(x, x)


class IaRed2(nn.Module):
    """IA-RED2: an interpreter scores every token, uninformative ones are dropped at run time (arXiv 2106.12620)."""

    def __init__(self, size: tuple[int, int] = (48, 64), dim: int = 24, keep: int = 24) -> None:
        super().__init__()
        self.keep = keep
        self.tokens = Tokens(dim, size)
        self.policy_token = nn.Linear(dim, 8)
        self.policy_patch = nn.Linear(dim, 8)
        self.one, self.two = Attention(dim, 3), Attention(dim, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.tokens(image)
        x = x + self.one(x, x)
        policy = self.policy_token(x.mean(dim=1, keepdim=True))
        score = torch.sigmoid((self.policy_patch(x) * policy).sum(dim=-1))
        kept = score.topk(self.keep, dim=1).indices[..., None].expand(-1, -1, x.shape[2])
        x = x.gather(1, kept)
        return x + self.two(x, x)


class FcaFormer(nn.Module):
    """FcaFormer: later blocks also attend to tokens merged from the blocks before them (arXiv 2211.07198)."""

    def __init__(self, size: tuple[int, int] = (48, 64), dim: int = 24, depth: int = 3) -> None:
        super().__init__()
        self.grid = (size[0] // 8, size[1] // 8)
        self.tokens = Tokens(dim, size)
        self.blocks = nn.ModuleList(Attention(dim, 3) for _ in range(depth))
        self.scales = nn.ParameterList(nn.Parameter(torch.randn(dim)) for _ in range(depth))
        self.merge = nn.ModuleList(nn.Conv2d(dim, dim, 3, 2, 1, groups=dim) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.tokens(image)
        cross: list[torch.Tensor] = []
        for attention, norm, scale, merge in zip(self.blocks, self.norms, self.scales, self.merge, strict=True):
            y = norm(x)
            memory = torch.cat([y, *(c * scale for c in cross)], dim=1)
            x = x + attention(y, memory)
            cross.append(merge(x.transpose(1, 2).reshape(x.shape[0], -1, *self.grid)).flatten(2).transpose(1, 2))
        return x


class BinaryAttention(nn.Module):
    """BinaryAttention: the logits are products of the signs of query and key, scaled by their mean size, plus a bias
    over positions.
    """

    def __init__(self, size: tuple[int, int] = (48, 64), dim: int = 24) -> None:
        super().__init__()
        self.tokens = Tokens(dim, size)
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        count = size[0] * size[1] // 64
        self.bias = nn.Parameter(torch.randn(1, 3, count, count))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.tokens(image)
        q, k, v = (heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        q, k = (t.sign() * t.abs().mean(dim=-1, keepdim=True) for t in (q, k))
        return x + self.proj(merged((q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + self.bias).softmax(dim=-1) @ v))


class Dhvt(nn.Module):
    """DHVT: a sequence of overlapping convolutions as patch embedding, head tokens beside the patches, and depthwise
    convolution in the feed-forward part (arXiv 2210.05958).
    """

    def __init__(self, dim: int = 24, num_heads: int = 3) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.stem = nn.Sequential(nn.Conv2d(3, dim // 2, 3, 4, 1), nn.GELU(), nn.Conv2d(dim // 2, dim, 3, 2, 1))
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.head_embed = nn.Linear(dim // num_heads, dim)
        self.head_position = nn.Parameter(torch.randn(1, num_heads, dim))
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.depthwise = nn.Conv2d(2 * dim, 2 * dim, 3, 1, 1, groups=2 * dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        grid = x.shape[2:]
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        y = self.norm(x)
        chunks = y.reshape(y.shape[0], y.shape[1], self.num_heads, -1).mean(dim=1)
        y = torch.cat([y, F.gelu(self.head_embed(chunks)) + self.head_position], dim=1)
        y = self.attention(y, y)
        y, head_tokens = y[:, : x.shape[1]], y[:, x.shape[1] :]
        x = x + torch.cat([y[:, :1] + head_tokens.mean(dim=1, keepdim=True), y[:, 1:]], dim=1)
        hidden = self.up(x[:, 1:])
        hidden = hidden + self.depthwise(hidden.transpose(1, 2).reshape(x.shape[0], -1, *grid)).flatten(2).transpose(
            1, 2
        )
        return torch.cat([x[:, :1], x[:, 1:] + self.down(F.gelu(hidden))], dim=1)


class LookupViT(nn.Module):
    """LookupViT: few compressed tokens gather from all tokens, work among themselves, and hand back what they found,
    through the same products of queries and keys read the other way (arXiv 2407.12753).
    """

    def __init__(self, size: tuple[int, int] = (48, 64), dim: int = 24) -> None:
        super().__init__()
        self.num_heads = 3
        self.grid = (size[0] // 8, size[1] // 8)
        self.tokens = Tokens(dim, size)
        self.q, self.kv, self.gathered = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.inner, self.back, self.out = Attention(dim, 3), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.tokens(image)
        few = F.avg_pool2d(x.transpose(1, 2).reshape(x.shape[0], -1, *self.grid), (3, 4)).flatten(2).transpose(1, 2)
        q = heads(self.q(few), self.num_heads)
        k, v = (heads(t, self.num_heads) for t in self.kv(x).chunk(2, dim=-1))
        products = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        few = few + self.gathered(merged(products.softmax(dim=-1) @ v))
        few = few + self.inner(few, few)
        found = heads(self.back(few), self.num_heads)
        return x + self.out(merged(products.transpose(2, 3).softmax(dim=-1) @ found))


class GaussianMixtureMask(nn.Module):
    """RetNet through convolution: the logits are weighted by a mask of Gaussians over the distance of the two tokens,
    which is dense: every key keeps some weight.
    """

    def __init__(self, size: tuple[int, int] = (48, 64), dim: int = 24, gaussians: int = 3) -> None:
        super().__init__()
        self.num_heads = 3
        self.tokens = Tokens(dim, size)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        rows, columns = torch.meshgrid(torch.arange(size[0] // 8), torch.arange(size[1] // 8), indexing="ij")
        at = torch.stack([rows.flatten(), columns.flatten()]).float()
        self.register_buffer("distance", ((at[:, :, None] - at[:, None, :]) ** 2).sum(0))  # [N, N]
        self.width, self.weight = nn.Parameter(torch.rand(gaussians) * 4 + 1), nn.Parameter(torch.rand(gaussians))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.tokens(image)
        q, k, v = (heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        mixture = (self.weight[:, None, None] * torch.exp(-self.distance / (2 * self.width[:, None, None] ** 2))).sum(0)
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 * mixture
        return x + self.proj(merged(logits.softmax(dim=-1) @ v))


class CroCo(nn.Module):
    """CroCo v2: an encoder with 2-D rotary positions over each of two views, a decoder whose tokens of the first view
    attend those of the second (arXiv 2211.10408). The second view is the first one mirrored.
    """

    def __init__(self, size: tuple[int, int] = (48, 64), dim: int = 24) -> None:
        super().__init__()
        self.num_heads = 3
        self.patch = nn.Conv2d(3, dim, 8, 8)
        self.qkv, self.proj, self.mlp = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), Mlp(dim)
        self.cross, self.norm = Attention(dim, 3), nn.LayerNorm(dim)
        rows, columns = torch.meshgrid(torch.arange(size[0] // 8), torch.arange(size[1] // 8), indexing="ij")
        half = dim // self.num_heads // 2
        frequency = 100.0 ** -(torch.arange(0, half, 2) / half)
        angles = [at.flatten()[:, None] * frequency for at in (rows, columns)]
        angle = torch.cat([torch.cat([a, a], dim=1) for a in angles], dim=1)  # [N, d]
        self.register_buffer("cosine", angle.cos())
        self.register_buffer("sine", angle.sin())

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        pieces = x.chunk(4, dim=-1)
        turned = torch.cat([-pieces[1], pieces[0], -pieces[3], pieces[2]], dim=-1)
        return x * self.cosine + turned * self.sine

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        q, k, v = (heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        weights = (self.rotated(q) @ self.rotated(k).transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)
        x = x + self.proj(merged(weights @ v))
        return x + self.mlp(x)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        one, two = self.encode(image), self.encode(image.flip(3))
        return one + self.cross(self.norm(one), two)


class VisualDependency(nn.Module):
    """Visual Dependency Transformers: reversed attention, where every key token hands its value to the queries it
    chooses, so the softmax runs over the queries (arXiv 2304.03282).
    """

    def __init__(self, size: tuple[int, int] = (48, 64), dim: int = 24) -> None:
        super().__init__()
        self.num_heads = 3
        self.tokens = Tokens(dim, size)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.message = nn.Linear(dim, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.tokens(image)
        q, k, v = (heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        sent = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-2)
        v = v * torch.sigmoid(self.message(x)).transpose(1, 2)[..., None]
        return x + self.proj(merged(sent @ v))


class LocalLinearAttention(nn.Module):
    """Local linear attention: for every query a weighted linear regression of the values on the keys, read at the
    query; the weights are a softmax, used for means and for the covariance of the keys.
    """

    def __init__(self, size: tuple[int, int] = (32, 48), dim: int = 12) -> None:
        super().__init__()
        self.num_heads = 3
        self.tokens = Tokens(dim, size)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.tokens(image)
        q, k, v = (heads(t, self.num_heads) for t in self.qkv(x).chunk(3, dim=-1))
        weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1)
        mean_key, mean_value = weights @ k, weights @ v
        towards = ((q - mean_key).unsqueeze(3) * (k.unsqueeze(2) - mean_key.unsqueeze(3))).sum(-1)  # [B, nH, N, M]
        slope = (weights * towards) @ v / (1 + (weights * towards**2).sum(-1, keepdim=True))
        return x + self.proj(merged(mean_value + slope))


class UniFormerV2(nn.Module):
    """UniFormerV2: a ViT over the frames of a video, with local temporal convolution before it, and a global block in
    which one learned query gathers from all tokens of all frames (arXiv 2211.09552). Input [B, 3, T, H, W].
    """

    def __init__(self, size: tuple[int, int] = (32, 48), dim: int = 24) -> None:
        super().__init__()
        self.tokens = Tokens(dim, size, class_token=True)
        self.temporal = nn.Conv3d(dim, dim, (3, 1, 1), padding=(1, 0, 0), groups=dim)
        self.grid = (size[0] // 8, size[1] // 8)
        self.norm, self.attention, self.mlp = nn.LayerNorm(dim), Attention(dim, 3), Mlp(dim)
        self.query = nn.Parameter(torch.randn(1, 1, dim))
        self.gather, self.join = Attention(dim, 3), nn.Linear(dim, 10)

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        batch, frames = video.shape[0], video.shape[2]
        x = self.tokens(video.transpose(1, 2).flatten(0, 1))
        dim = x.shape[2]
        first, patches = x[:, :1], x[:, 1:]
        maps = patches.reshape(batch, frames, *self.grid, dim).permute(0, 4, 1, 2, 3)
        patches = patches + self.temporal(maps).permute(0, 2, 3, 4, 1).reshape(patches.shape)
        x = torch.cat([first, patches], dim=1)
        y = self.norm(x)
        x = x + self.attention(y, y)
        x = x + self.mlp(x)
        memory = x.reshape(batch, -1, dim)
        return self.join(self.gather(self.query.expand(batch, -1, -1), memory))


GLOBAL = "each of the 48 queries attends the same 48 keys"
TWICE = "the attention probabilities have 2 uses"
LOGITS_TWICE = "the logits are used elsewhere as well"

ARCHITECTURES = (
    Architecture(
        "EViT (token reorganisation), IA-RED2",
        EViT,
        (1, 3, 48, 64),
        (
            left("global", reason="each of the 49 queries attends the same 49 keys"),
            left("global", reason="each of the 22 queries attends the same 22 keys"),
        ),
        variant="EViT",
        exporters=BOTH,
    ),
    Architecture(
        "EViT (token reorganisation), IA-RED2",
        IaRed2,
        (1, 3, 48, 64),
        (left("global", reason=GLOBAL), left("global", reason="each of the 24 queries attends the same 24 keys")),
        variant="IA-RED2",
    ),
    Architecture(
        "FcaFormer",
        FcaFormer,
        (1, 3, 48, 64),
        tuple(
            left("global", reason=f"each of the 48 queries attends the same {keys} keys", num_heads=3)
            for keys in (48, 60, 72)
        ),
        exporters=BOTH,
    ),
    Architecture("BinaryAttention", BinaryAttention, (1, 3, 48, 64), (left("global", reason=GLOBAL),)),
    Architecture(
        "Small-dataset hybrid (DHVT)",
        Dhvt,
        (1, 3, 48, 64),
        (left("global", reason="each of the 52 queries attends the same 52 keys"),),
    ),
    Architecture(
        "LookupViT",
        LookupViT,
        (1, 3, 48, 64),
        (
            left("global", reason="each of the 4 queries attends the same 48 keys"),
            left("global", reason="each of the 4 queries attends the same 4 keys"),
            left("global", reason="each of the 48 queries attends the same 4 keys"),
        ),
        exporters=BOTH,
    ),
    Architecture(
        "RetNet through convolution (GMM mask)", GaussianMixtureMask, (1, 3, 48, 64), (left("global", reason=GLOBAL),)
    ),
    Architecture("CroCo v2", CroCo, (1, 3, 48, 64), (left("global", 3, reason=GLOBAL),), exporters=BOTH),
    Architecture(
        "Visual Dependency Transformers",
        VisualDependency,
        (1, 3, 48, 64),
        (left("other", reason="the softmax does not run over the keys that are summed"),),
    ),
    Architecture(
        "Local Linear Attention",
        LocalLinearAttention,
        (1, 3, 32, 48),
        (left("other", reason="the attention probabilities have 4 uses"),),
    ),
    Architecture(
        "UniFormerV2",
        UniFormerV2,
        (1, 3, 2, 32, 48),
        (
            left("global", reason="each of the 25 queries attends the same 25 keys"),
            left("global", reason="the one query attends all 50 keys"),
        ),
    ),
)
