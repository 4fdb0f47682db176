"""Architectures that attend inside windows or neighbourhoods, each in the spelling of its own implementation.

Letters: B batch, H/W height/width, N tokens, C channels, nH heads, d head_dim. All take an image [B, 3, H, W].
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.architectures.frame import BOTH, DYNAMO, Architecture, left, rewritten


def inward(extent: int, kernel: int, dilation: int) -> torch.Tensor:
    """int64 [extent, kernel]: positions a pixel attends along one axis; near the border the neighbourhood moves inside,
    in steps of the dilation (NAT, DiNAT).
    """
    position = torch.arange(extent)
    group, place = position % dilation, position // dilation
    members = (extent - group + dilation - 1) // dilation
    start = (place - kernel // 2).clamp(min=0).minimum(members - kernel)
    return (start[:, None] + torch.arange(kernel)) * dilation + group[:, None]


class MultiScaleNeighborhood(nn.Module):
    """A2Mamba's adaptive multi-scale attention: half of the heads attend a plain neighbourhood, half a dilated one.

    Both have the inward border; what they gather is gated and joined.
    """

    def __init__(self, size: tuple[int, int], dim: int, kernel: int = 3, dilation: int = 2) -> None:
        super().__init__()
        self.size, self.num_heads = size, 2
        self.qkv, self.proj, self.gate = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.scales = (1, dilation)
        for scale in self.scales:
            rows, columns = (inward(extent, kernel, scale) for extent in size)
            near = rows[:, None, :, None] * size[1] + columns[None, :, None, :]
            self.register_buffer(f"near{scale}", near.reshape(size[0] * size[1], kernel * kernel))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, height, width, dim = x.shape
        head_dim = dim // (2 * self.num_heads)
        gathered = []
        parts = self.qkv(x).reshape(batch, height * width, 3, 2, self.num_heads, head_dim)
        for part, scale in enumerate(self.scales):
            q, k, v = parts[:, :, :, part].permute(2, 0, 3, 1, 4)  # [B, nH, N, d]
            near = getattr(self, f"near{scale}")
            k, v = k[:, :, near], v[:, :, near]  # [B, nH, N, K, d]
            weights = (q.unsqueeze(3) * head_dim**-0.5 @ k.transpose(3, 4)).softmax(dim=-1)
            gathered.append((weights @ v).squeeze(3).transpose(1, 2).reshape(batch, height, width, dim // 2))
        return self.proj(torch.cat(gathered, dim=-1) * F.silu(self.gate(x)))


class A2Mamba(nn.Module):
    """A2Mamba: blocks of a depthwise position encoding, multi-scale attention and a gated feed-forward part
    (arXiv 2507.16624); without its state-space part, which has no attention.
    """

    def __init__(self, size: tuple[int, int] = (40, 56), dim: int = 16, depth: int = 2) -> None:
        super().__init__()
        grid = (size[0] // 4, size[1] // 4)
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.positions = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, groups=dim) for _ in range(depth))
        self.mixers = nn.ModuleList(MultiScaleNeighborhood(grid, dim) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        for position, norm, mixer in zip(self.positions, self.norms, self.mixers, strict=True):
            x = (x + position(x)).permute(0, 2, 3, 1)
            x = (x + mixer(norm(x))).permute(0, 3, 1, 2)
        return x


class AttentionConvolution(nn.Module):
    """TiC's multi-head self-attention convolution: the k x k window of every output position attends within itself, and
    a weighted sum over its k^2 results is the output there.

    With stride = kernel_size the windows do not overlap; `whole` then keeps all k^2 results instead of their sum.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int, whole: bool = False, num_heads: int = 3) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.num_heads, self.whole = kernel_size, stride, num_heads, whole
        self.qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)
        self.reduce = nn.Parameter(torch.randn(kernel_size**2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, dim, height, width = x.shape
        padding = 0 if self.stride == self.kernel_size else self.kernel_size // 2
        windows = F.unfold(self.qkv(x), self.kernel_size, padding=padding, stride=self.stride)
        windows = windows.reshape(batch, 3, self.num_heads, dim // self.num_heads, self.kernel_size**2, -1)
        q, k, v = windows.permute(1, 0, 5, 2, 4, 3)  # [B, L, nH, k^2, d]
        out = (q @ k.transpose(3, 4) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        out = out.permute(0, 2, 4, 3, 1)  # [B, nH, d, k^2, L]
        if self.whole:
            columns = out.reshape(batch, dim * self.kernel_size**2, -1)
            return self.proj(F.fold(columns, (height, width), self.kernel_size, stride=self.stride))
        summed = (out * self.reduce[:, None]).sum(dim=3)
        rows = (height + 2 * padding - self.kernel_size) // self.stride + 1
        return self.proj(summed.reshape(batch, dim, rows, -1))


class TiC(nn.Module):
    """TiC: a classifier whose convolutions are self-attention convolutions (arXiv 2310.04134)."""

    def __init__(self, dim: int = 12, whole: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.first = AttentionConvolution(dim, 4, 4, whole=True) if whole else AttentionConvolution(dim, 3, 1)
        self.second = AttentionConvolution(dim, 2, 2, whole=True) if whole else AttentionConvolution(dim, 3, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        x = x + self.first(x)
        return self.second(F.gelu(x))


def partition(x: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """[B, H, W, C] -> [B * nW, N, C]"""
    batch, height, width, dim = x.shape
    x = x.reshape(batch, height // window[0], window[0], width // window[1], window[1], dim)
    return x.transpose(2, 3).reshape(-1, window[0] * window[1], dim)


def merge(x: torch.Tensor, window: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """[B * nW, N, C] -> [B, H, W, C]"""
    x = x.reshape(-1, size[0] // window[0], size[1] // window[1], *window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, *size, x.shape[-1])


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_heads: int, bias: object = 0) -> torch.Tensor:
    """Multi-head attention within rows of a batch: [B * nW, N, C], twice [B * nW, M, C] -> [B * nW, N, C]."""
    q, k, v = (t.reshape(t.shape[0], t.shape[1], num_heads, -1).transpose(1, 2) for t in (q, k, v))
    out = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias).softmax(dim=-1) @ v
    return out.transpose(1, 2).flatten(2)


class FactorizedAttention(nn.Module):
    """FaViT's factorised attention: the channels in groups, each a scale of its own.

    The first group attends in windows, the second on a dilated grid, the third in windows whose keys and values are
    averages of 2 x 2 pixels.
    """

    def __init__(self, dim: int, window: tuple[int, int] = (4, 4)) -> None:
        super().__init__()
        self.window, self.group = window, dim // 3
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(1, 2, 16, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, window = (x.shape[1], x.shape[2]), self.window
        q, k, v = (t.split(self.group, dim=-1) for t in self.qkv(x).chunk(3, dim=-1))
        near = windowed(*(partition(t[0], window) for t in (q, k, v)), 2, self.bias)
        far = windowed(*(dilated(t[1], window) for t in (q, k, v)), 2)
        pooled = [F.avg_pool2d(t[2].permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1) for t in (k, v)]
        coarse = windowed(partition(q[2], window), *(partition(t, (2, 2)) for t in pooled), 2)
        return self.proj(
            torch.cat([merge(near, window, size), undilated(far, window, size), merge(coarse, window, size)], dim=-1)
        )


def dilated(x: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
    """[B, H, W, C] -> [B * nW, N, C]: the pixels of a window lie H/h rows and W/w columns apart."""
    batch, height, width, dim = x.shape
    x = x.reshape(batch, window[0], height // window[0], window[1], width // window[1], dim)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, window[0] * window[1], dim)


def undilated(x: torch.Tensor, window: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    x = x.reshape(-1, size[0] // window[0], size[1] // window[1], *window, x.shape[-1])
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, *size, x.shape[-1])


class FaViT(nn.Module):
    """FaViT: factorised attention in a plain block, with a depthwise convolution in the feed-forward part
    (arXiv 2312.08614).
    """

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.norm, self.attention = nn.LayerNorm(dim), FactorizedAttention(dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.depthwise = nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).permute(0, 2, 3, 1)
        x = x + self.attention(self.norm(x))
        hidden = self.depthwise(self.up(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.down(F.gelu(hidden))


class STViT(nn.Module):
    """STViT: in every window few semantic tokens, the averages of its cells, gather from the window's tokens; attend
    each other everywhere; and are read back by the window's tokens (arXiv 2303.08685).
    """

    def __init__(self, dim: int = 24, window: int = 6, cells: int = 2) -> None:
        super().__init__()
        self.window, self.cells, self.num_heads = window, cells, 3
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.gather_q, self.gather_kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.inner, self.inner_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.back_q, self.back_kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        pooled = F.avg_pool2d(x, self.window // self.cells).permute(0, 2, 3, 1)
        x = x.permute(0, 2, 3, 1)
        size, cells = (x.shape[1], x.shape[2]), (pooled.shape[1], pooled.shape[2])
        window, small = (self.window,) * 2, (self.cells,) * 2
        k, v = self.gather_kv(self.norms[0](partition(x, window))).chunk(2, dim=-1)
        semantic = partition(pooled, small)
        semantic = semantic + windowed(self.gather_q(self.norms[1](semantic)), k, v, self.num_heads)
        whole = merge(semantic, small, cells).flatten(1, 2)
        q, k, v = self.inner(self.norms[2](whole)).chunk(3, dim=-1)
        whole = whole + self.inner_out(windowed(q, k, v, self.num_heads))
        k, v = (partition(t.reshape(-1, *cells, t.shape[-1]), small) for t in self.back_kv(whole).chunk(2, dim=-1))
        q = partition(self.back_q(x), window)
        return x + self.proj(merge(windowed(q, k, v, self.num_heads), window, size))


class AgentWindows(nn.Module):
    """Agent attention in windows, as in Agent-Swin: the queries of a window are averaged to a few agents, the agents
    gather from the window's keys, and the window's queries read the agents; a bias for each of the two, and a depthwise
    convolution of the values inside each window.
    """

    def __init__(self, dim: int, window: int, cells: int, num_heads: int = 3, convolved: bool = True) -> None:
        super().__init__()
        self.window, self.cells, self.num_heads = window, cells, num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.gather_bias = nn.Parameter(torch.randn(1, num_heads, cells**2, window**2))
        self.read_bias = nn.Parameter(torch.randn(1, num_heads, window**2, cells**2))
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if convolved else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, window = (x.shape[1], x.shape[2]), (self.window,) * 2
        dim = x.shape[3]
        q, k, v = self.qkv(partition(x, window)).chunk(3, dim=-1)
        agents = F.avg_pool2d(q.transpose(1, 2).reshape(-1, dim, *window), self.window // self.cells)
        agents = agents.flatten(2).transpose(1, 2)
        found = windowed(agents, k, v, self.num_heads, self.gather_bias)
        out = windowed(q, agents, found, self.num_heads, self.read_bias)
        if self.depthwise is not None:
            out = out + self.depthwise(v.transpose(1, 2).reshape(-1, dim, *window)).flatten(2).transpose(1, 2)
        return merge(self.proj(out), window, size)


class AgentSwin(nn.Module):
    """Agent-Swin: two blocks of agent attention in windows, the second of shifted ones (arXiv 2312.08874)."""

    def __init__(self, dim: int = 24, convolved: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.blocks = nn.ModuleList(AgentWindows(dim, 6, 2, convolved=convolved) for _ in range(2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).permute(0, 2, 3, 1)
        x = x + self.blocks[0](self.norms[0](x))
        shifted = self.blocks[1](torch.roll(self.norms[1](x), (-3, -3), (1, 2)))
        return x + torch.roll(shifted, (3, 3), (1, 2))


class AgentGlobal(nn.Module):
    """Agent attention over the whole map, as in Agent-DeiT and Agent-PVT."""

    def __init__(self, dim: int = 24) -> None:
        super().__init__()
        self.stem, self.num_heads = nn.Conv2d(3, dim, 8, 8), 3
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        grid = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        q = self.q(x)
        k, v = self.kv(x).chunk(2, dim=-1)
        shape = (x.shape[0], x.shape[2], *grid)
        agents = F.adaptive_avg_pool2d(q.transpose(1, 2).reshape(shape), (2, 2)).flatten(2).transpose(1, 2)
        found = windowed(agents, k, v, self.num_heads)
        out = windowed(q, agents, found, self.num_heads)
        return self.proj(out + self.depthwise(v.transpose(1, 2).reshape(shape)).flatten(2).transpose(1, 2))


class LocalAttender(nn.Module):
    """UPLiFT's local attender: for every pixel weights over fixed offsets, predicted from a guide.

    The values at these offsets are shifted copies of the padded map, stacked.
    """

    OFFSETS = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))

    def __init__(self, guide_dim: int) -> None:
        super().__init__()
        self.predict = nn.Sequential(
            nn.Conv2d(guide_dim, guide_dim, 1), nn.GELU(), nn.Conv2d(guide_dim, len(self.OFFSETS), 1)
        )

    def forward(self, value: torch.Tensor, guide: torch.Tensor) -> torch.Tensor:
        weights = self.predict(guide).softmax(dim=1)
        padded = F.pad(value, (1, 1, 1, 1), mode="replicate")
        height, width = value.shape[2:]
        shifted = [padded[:, :, 1 + r : 1 + r + height, 1 + c : 1 + c + width] for r, c in self.OFFSETS]
        return (weights.unsqueeze(2) * torch.stack(shifted, dim=1)).sum(dim=1)


class Uplift(nn.Module):
    """UPLiFT: features upsampled by a factor of two, then refined by a local attender guided by the image."""

    def __init__(self, dim: int = 12, guide_dim: int = 8) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, dim, 8, 8)
        self.guides = nn.ModuleList([nn.Conv2d(3, guide_dim, 4, 4), nn.Conv2d(3, guide_dim, 2, 2)])
        self.attenders = nn.ModuleList(LocalAttender(guide_dim) for _ in range(2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.backbone(image)
        for guide, attender in zip(self.guides, self.attenders, strict=True):
            x = attender(F.interpolate(x, scale_factor=2, mode="nearest"), guide(image))
        return x


def tic_overlapping() -> nn.Module:
    """Windows of 3 x 3 around every position, then around every second one."""
    return TiC()


def tic_apart() -> nn.Module:
    """Windows side by side, whose results are put back in their places."""
    return TiC(whole=True)


class CrossShaped(nn.Module):
    """CSWin's cross-shaped windows: half of the channels attend columns of stripes, half rows of them, each added to a
    depthwise convolution of its values inside every stripe (arXiv 2107.00652).
    """

    def __init__(self, dim: int = 24, stripe: int = 2) -> None:
        super().__init__()
        self.stem, self.stripe = nn.Conv2d(3, dim, 4, 4), stripe
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.local = nn.ModuleList(nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2) for _ in range(2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image).permute(0, 2, 3, 1)
        size = (x.shape[1], x.shape[2])
        halves = []
        for half, window in enumerate(((size[0], self.stripe), (self.stripe, size[1]))):
            parts = [t.chunk(2, dim=-1)[half] for t in self.qkv(self.norm(x)).chunk(3, dim=-1)]
            q, k, v = (partition(t, window) for t in parts)
            local = self.local[half](v.transpose(1, 2).reshape(-1, v.shape[2], *window)).flatten(2).transpose(1, 2)
            halves.append(merge(windowed(q, k, v, 2) + local, window, size))
        return x + self.proj(torch.cat(halves, dim=-1))


def agent_swin_plain() -> nn.Module:
    """Without the convolution of the values, which would keep the windows of these."""
    return AgentSwin(convolved=False)


ARCHITECTURES = (
    Architecture(
        "A2Mamba",
        A2Mamba,
        (1, 3, 40, 56),
        tuple(
            rewritten(
                "neighborhood", 2, num_heads=2, feature_size=(10, 14), kernel_size=(3, 3), dilation=d, border="inward"
            )
            for d in ((1, 1), (2, 2))
        ),
        folds=2,
        exporters=BOTH,
    ),
    Architecture(
        "TiC (MSA-Conv)",
        tic_overlapping,
        (1, 3, 32, 48),
        (left("other", 2, reason="windows overlap"),),
        variant="overlapping",
    ),
    Architecture(
        "TiC (MSA-Conv)",
        tic_apart,
        (1, 3, 32, 48),
        (
            rewritten("window", num_heads=3, feature_size=(8, 12), window_size=(4, 4)),
            rewritten("window", num_heads=3, feature_size=(8, 12), window_size=(2, 2)),
        ),
        variant="apart",
        exporters=(DYNAMO,),
        fails={"torchscript": "col2im"},
    ),
    Architecture(
        "FaViT",
        FaViT,
        (1, 3, 48, 64),
        (
            rewritten("window", num_heads=2, feature_size=(12, 16), window_size=(4, 4), bias="constant"),
            rewritten("grid", num_heads=2, feature_size=(12, 16), window_size=(4, 4), dilation=(3, 4)),
            rewritten("window", num_heads=2, feature_size=(12, 16), window_size=(4, 4), bias="none"),
        ),
        exporters=BOTH,
    ),
    Architecture(
        "STViT (token sparsification)",
        STViT,
        (1, 3, 48, 72),
        (
            rewritten("window", 2, num_heads=3),
            left("global", reason="each of the 24 queries attends the same 24 keys"),
        ),
    ),
    Architecture(
        "Agent Attention",
        agent_swin_plain,
        (1, 3, 48, 72),
        (rewritten("window", 4, num_heads=3, bias="constant"),),
        variant="windows",
    ),
    Architecture(
        "Agent Attention",
        AgentSwin,
        (1, 3, 48, 72),
        (rewritten("window", 4, num_heads=3, bias="constant"),),
        variant="windows with a convolution of the values",
        beside=True,
    ),
    Architecture(
        "deployed: CSWin",
        CrossShaped,
        (1, 3, 48, 64),
        (
            rewritten("stripe", feature_size=(12, 16), window_size=(12, 2), num_heads=2),
            rewritten("stripe", feature_size=(12, 16), window_size=(2, 16), num_heads=2),
        ),
        exporters=BOTH,
        beside=True,
    ),
    Architecture(
        "Agent Attention",
        AgentGlobal,
        (1, 3, 48, 64),
        (
            left("global", reason="each of the 4 queries attends the same 48 keys"),
            left("global", reason="each of the 48 queries attends the same 4 keys"),
        ),
        variant="global",
    ),
    Architecture("UPLiFT", Uplift, (1, 3, 48, 64), (rewritten("outlook", 2, kernel_size=(3, 3), border="replicate"),)),
)
