"""Memory of training: the peak of forward and backward above the operands, beside the chain that people write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from attnrewrite.functions.spec import FlashWindowAttention, SlideAttention, Spec  # noqa: E402
from attnrewrite.localattention.geometry import NeighborhoodGeometry, WindowGeometry  # noqa: E402
from attnrewrite.operators.schema import call  # noqa: E402

BATCH, SIZE, CHANNELS, HEADS, WINDOW, SHIFT = 32, 56, 96, 3, 7, 3  # the first stage of Swin-T
HEAD_DIM, TOKENS = CHANNELS // HEADS, WINDOW**2


def peak(function: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator hands out at most, above what it had handed out before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def test_peaks_are_counted() -> None:
    """Two tensors at once, then one of them and a third."""

    def allocate() -> None:
        a = torch.ones(1000)
        b = torch.ones(500)
        del a
        torch.ones(100) + b[:100]

    assert 6000 <= peak(allocate) < 8000


def windows_of(x: Any) -> Any:
    """The eager chain's roll and partition, [B, H, W, C] -> [B*nW, nH, N, d]."""
    side = SIZE // WINDOW
    x = torch.roll(x, (-SHIFT, -SHIFT), (1, 2)).view(-1, side, WINDOW, side, WINDOW, CHANNELS)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, TOKENS, HEADS, HEAD_DIM).transpose(1, 2)


def eager_windows(spec: FlashWindowAttention, query: Any, key: Any, value: Any, bias: Any) -> Any:
    q, k, v = (windows_of(x) for x in (query, key, value))
    logits = (q * spec.scale) @ k.transpose(-2, -1) + bias
    mask = torch.zeros(spec.geometry.num_windows, 1, TOKENS, TOKENS)
    mask.masked_fill_(torch.from_numpy(spec.geometry.crosses_regions()[:, None]), -100.0)
    weights = (logits.view(-1, *mask.shape[:1], HEADS, TOKENS, TOKENS) + mask).flatten(0, 1).softmax(-1)
    side = SIZE // WINDOW
    merged = (weights @ v).transpose(1, 2).reshape(-1, side, side, WINDOW, WINDOW, CHANNELS).permute(0, 1, 3, 2, 4, 5)
    return torch.roll(merged.reshape(-1, SIZE, SIZE, CHANNELS), (SHIFT, SHIFT), (1, 2))


def step(compute: Callable[[], Any], operands: tuple[Any, ...]) -> Callable[[], None]:
    """Forward and backward."""

    def run() -> None:
        for operand in operands:
            operand.grad = None
        result = compute()
        result.backward(torch.ones(()).expand(result.shape))

    return run


def operator(spec: Spec, **operands: Any) -> Callable[[], Any]:
    overload, args, keywords = call(spec, operands)
    return lambda: overload(*args, **keywords)


def test_training_windows_takes_less_than_half_the_memory_of_the_eager_chain() -> None:
    geometry = WindowGeometry((SIZE, SIZE), (WINDOW, WINDOW), (SHIFT, SHIFT))
    spec = FlashWindowAttention(geometry, HEADS, HEAD_DIM**-0.5, -100.0)
    maps = [torch.randn(BATCH, SIZE, SIZE, CHANNELS, requires_grad=True) for _ in range(3)]
    bias = torch.randn(1, HEADS, TOKENS, TOKENS, requires_grad=True)
    ours = operator(spec, **dict(zip(("query", "key", "value"), maps, strict=True)), bias=bias)
    with torch.no_grad():
        few = [m[:1] for m in maps]
        one = operator(spec, **dict(zip(("query", "key", "value"), few, strict=True)), bias=bias)
        torch.testing.assert_close(one(), eager_windows(spec, *few, bias), rtol=0.0, atol=1e-5)
    operands = (*maps, bias)
    eager = peak(step(lambda: eager_windows(spec, *maps, bias), operands))
    for operand in operands:
        operand.grad = None
    assert peak(step(ours, operands)) < eager / 2


def test_training_neighbourhoods_takes_a_tenth_of_the_memory_of_unfold() -> None:
    kernel, batch = 7, 2
    spec = SlideAttention(NeighborhoodGeometry((SIZE, SIZE), (kernel, kernel), (1, 1)), HEADS, HEAD_DIM**-0.5)
    maps = [torch.randn(batch, CHANNELS, SIZE, SIZE, requires_grad=True) for _ in range(3)]

    def unfolded() -> Any:
        query, key, value = maps
        slots = (batch, HEADS, HEAD_DIM, kernel**2, SIZE**2)
        keys, values = (functional.unfold(x, kernel, padding=kernel // 2).view(slots) for x in (key, value))
        logits = (query.view(batch, HEADS, HEAD_DIM, 1, SIZE**2) * spec.scale * keys).sum(2, keepdim=True)
        return (logits.softmax(3) * values).sum(3).view(query.shape)

    ours = operator(spec, **dict(zip(("query", "key", "value"), maps, strict=True)))
    with torch.no_grad():
        torch.testing.assert_close(ours(), unfolded(), rtol=0.0, atol=1e-5)
    eager = peak(step(unfolded, tuple(maps)))
    for operand in maps:
        operand.grad = None
    assert peak(step(ours, tuple(maps))) < eager / 10
