"""Attention as PyTorch's own modules and idioms write it, in windows, through the exporters; near misses beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn import functional as F

from attnrewrite.verify.numeric import verify_models
from tests.architectures.frame import BOTH
from tests.models.build import ModelCase, exported
from tests.passes.rewritten import left_over, optimize, written

DIM, HEADS, SIZE = 24, 3, 4
TOKENS = SIZE * SIZE
SCALE = (DIM // HEADS) ** -0.5


class Windows(nn.Module):
    """x + attention within windows of 4 x 4, `[B, 8, 12, C]`; `attend` computes on the windows `[B*nW, N, C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.register_buffer("bias", torch.randn(TOKENS, TOKENS))
        self.register_buffer("later", torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1))

    def forward(self, x: Any) -> Any:
        windows = self.norm(x).reshape(-1, 2, SIZE, 3, SIZE, DIM).permute(0, 1, 3, 2, 4, 5).reshape(-1, TOKENS, DIM)
        merged = self.attend(windows).reshape(-1, 2, 3, SIZE, SIZE, DIM).permute(0, 1, 3, 2, 4, 5)
        return x + merged.reshape(-1, 8, 12, DIM)

    def attend(self, windows: Any) -> Any:
        raise NotImplementedError


class Module(Windows):
    """nn.MultiheadAttention. mask: what it adds or excludes; weights: whether it returns the probabilities as well."""

    def __init__(self, *, batch_first: bool, weights: bool = False, mask: str = "") -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first)
        self.batch_first, self.weights, self.mask = batch_first, weights, mask

    def attend(self, windows: Any) -> Any:
        mask = {"": None, "float": self.bias, "bool": self.later}[self.mask]
        tokens = windows if self.batch_first else windows.transpose(0, 1)
        attended = self.attention(tokens, tokens, tokens, need_weights=self.weights, attn_mask=mask)[0]
        return attended if self.batch_first else attended.transpose(0, 1)


class Written(Windows):
    """query, key, value `[B*nW, N, nH, d]` of one Linear; `how` attends."""

    def __init__(self, how: Callable[[Written, Any, Any, Any], Any]) -> None:
        super().__init__()
        self.qkv, self.proj, self.how = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), how

    def attend(self, windows: Any) -> Any:
        parts = [p.reshape(-1, TOKENS, HEADS, DIM // HEADS) for p in self.qkv(windows).chunk(3, dim=-1)]
        return self.proj(self.how(self, *parts).reshape(-1, TOKENS, DIM))


def ellipsis(self: Written, q: Any, k: Any, v: Any) -> Any:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = torch.einsum("...nd,...md->...nm", q * SCALE, k).softmax(-1)
    return torch.einsum("...nm,...md->...nd", weights, v).transpose(1, 2)


def heads_last(self: Written, q: Any, k: Any, v: Any) -> Any:
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(SCALE).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v)


def baddbmm(self: Written, q: Any, k: Any, v: Any) -> Any:
    q, k, v = (t.transpose(1, 2).reshape(-1, TOKENS, DIM // HEADS) for t in (q, k, v))
    weights = torch.baddbmm(self.bias.expand(q.shape[0], -1, -1), q, k.transpose(1, 2), alpha=SCALE).softmax(-1)
    return torch.bmm(weights, v).reshape(-1, HEADS, TOKENS, DIM // HEADS).transpose(1, 2)


def fused(self: Written, q: Any, k: Any, v: Any) -> Any:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).transpose(1, 2)


def fused_causal(self: Written, q: Any, k: Any, v: Any) -> Any:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def exponentials(self: Written, q: Any, k: Any, v: Any) -> Any:
    logits = torch.einsum("bnhd,bmhd->bhnm", q * SCALE, k)
    weights = (logits - logits.max(-1, keepdim=True)[0]).exp()
    return torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)


def logsumexp(self: Written, q: Any, k: Any, v: Any) -> Any:
    logits = torch.einsum("bnhd,bmhd->bhnm", q * SCALE, k)
    return torch.einsum("bhnm,bmhd->bnhd", (logits - logits.logsumexp(-1, keepdim=True)).exp(), v)


SPELLINGS: dict[str, Callable[[], Windows]] = {
    "module-batch-first": lambda: Module(batch_first=True),
    "module-batch-first-weights": lambda: Module(batch_first=True, weights=True, mask="bool"),
    "module-tokens-first": lambda: Module(batch_first=False, mask="float"),
    "module-tokens-first-weights": lambda: Module(batch_first=False, weights=True),
    "einsum-ellipsis": lambda: Written(ellipsis),
    "einsum-heads-last": lambda: Written(heads_last),
    "baddbmm": lambda: Written(baddbmm),
    "sdpa-mask": lambda: Written(fused),
    "sdpa-causal": lambda: Written(fused_causal),
    "softmax-of-exponentials": lambda: Written(exponentials),
    "softmax-by-logsumexp": lambda: Written(logsumexp),
}
OPSETS = {"torchscript": 17, "dynamo": 23}


def model_of(name: str, build: Callable[[], Windows], exporter: str, *, dynamic_batch: bool = True) -> Path:
    case = ModelCase(build, (2, 8, 12, DIM), 1, sources=(Path(__file__),))
    return exported(f"attention_{name}", exporter, opset=OPSETS[exporter], dynamic_batch=dynamic_batch, case=case)


def cases() -> list[object]:
    """The second exporter by default where it writes something else: for nn.MultiheadAttention."""
    return [
        pytest.param(name, exporter, marks=[pytest.mark.slow] * (exporter == "dynamo" and "tokens-first" not in name))
        for name in SPELLINGS
        for exporter in BOTH
    ]


@pytest.mark.parametrize(("name", "exporter"), cases())
def test_attention_in_windows_is_rewritten(name: str, exporter: str, tmp_path: Path) -> None:
    path = model_of(name, SPELLINGS[name], exporter)
    outcome = optimize(path)
    (site,) = outcome.sites
    assert (site.kind, site.verdict, site.num_heads) == ("window", "rewrite", HEADS), site.reason
    assert (site.feature_size, site.window_size, site.shift_size) == ((8, 12), (SIZE, SIZE), (0, 0))
    assert not left_over(outcome.graph)
    (tmp_path / "rewritten.onnx").write_bytes(written(outcome).SerializeToString())
    verification = verify_models(path, tmp_path / "rewritten.onnx", trials=3)
    assert verification.passed, verification.explain_failure()


class LookBack(nn.Module):
    """Blocks of 8 of a sequence `[B, 40, C]` that attend themselves and the block before, the heads folded into the
    batch; before the first block there is nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        outside = torch.zeros(5, 1, 16, dtype=torch.bool)
        outside[0, :, :8] = True
        self.register_buffer("outside", outside)

    def forward(self, x: Any) -> Any:
        parts = [p.reshape(-1, 40, HEADS, DIM // HEADS).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1)]
        q, k, v = (p.reshape(-1, 5, 8, DIM // HEADS) for p in parts)
        k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, 0))[:, :-1], t], dim=2) for t in (k, v))
        logits = torch.einsum("bwnd,bwmd->bwnm", q * SCALE, k).masked_fill(self.outside, -torch.inf)
        attended = torch.einsum("bwnm,bwmd->bwnd", logits.softmax(-1), v).reshape(-1, 40, DIM // HEADS)
        return self.proj(attended.reshape(-1, HEADS, 40, DIM // HEADS).transpose(1, 2).reshape(-1, 40, DIM))


def test_blocks_that_look_back_with_heads_in_the_batch() -> None:
    case = ModelCase(LookBack, (2, 40, DIM), 1, sources=(Path(__file__),))
    outcome = optimize(exported("attention_look_back", "torchscript", opset=17, dynamic_batch=True, case=case))
    (site,) = outcome.sites
    assert (site.kind, site.verdict, site.num_heads) == ("halo", "rewrite", HEADS), site.reason
    assert (site.feature_size, site.window_size, site.key_window_size) == ((40,), (8,), (16,))
    assert not left_over(outcome.graph)


class NextWindow(Module):
    """The keys are those of the window before."""

    def attend(self, windows: Any) -> Any:
        before = torch.roll(windows, 1, 0)
        return self.attention(windows, before, before, need_weights=False)[0]


def summed_by_queries(self: Written, q: Any, k: Any, v: Any) -> Any:
    weights = torch.einsum("bnhd,bmhd->bhnm", q * SCALE, k).exp()
    return torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-2, keepdim=True), v)


NEAR_MISSES: dict[str, tuple[Callable[[], Windows], str]] = {
    "next-window": (lambda: NextWindow(batch_first=True), ""),
    "over-queries": (lambda: Written(summed_by_queries), "the softmax does not run over the keys that are summed"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left(name: str) -> None:
    build, reason = NEAR_MISSES[name]
    outcome = optimize(model_of(name, build, "torchscript", dynamic_batch=False))
    (site,) = outcome.sites
    assert site.verdict == "leave"
    assert reason in site.reason
    assert not outcome.modified
