"""torch.compile with attnrewrite: no graph breaks, training, buffers written to, other people's backends."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from attnrewrite import dynamo
from tests.test_modules import IMAGE, scaled_error, swin


class Seen:
    """A backend that runs the graph it is given, and remembers it."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, module, example_inputs):
        self.graphs.append(module)
        return module.forward

    def operators(self) -> list[int]:
        """How many of our operators each graph calls."""
        return [
            sum("attnrewrite" in str(n.target) for n in g.graph.nodes if n.op == "call_function") for g in self.graphs
        ]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_one_graph_with_both_windows():
    model, x, seen = swin(), torch.randn(IMAGE), Seen()
    compiled = torch.compile(model, backend=dynamo.rewriting(seen), fullgraph=True)
    with torch.no_grad():
        assert scaled_error(compiled(x), model(x)) < 1e-5
    assert seen.operators() == [2]


def test_parameters_are_read_at_every_call():
    model, x, seen = swin(), torch.randn(IMAGE), Seen()
    compiled = torch.compile(model, backend=dynamo.rewriting(seen))
    with torch.no_grad():
        compiled(x)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        assert scaled_error(compiled(x), model(x)) < 1e-5
    assert len(seen.graphs) == 1


def test_gradients():
    model, x = swin(), torch.randn(IMAGE)
    gradients = []
    for module in (model, torch.compile(model, backend=dynamo.rewriting(Seen()))):
        model.zero_grad()
        module(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert (found - expected).abs().max() <= 1e-4 * max(g.abs().max() for g in gradients[0])


@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast(where):
    """Weights that autocast converts follow the parameters, and the ops are no further off than autocast itself is."""
    model, x, seen = swin(), torch.randn(IMAGE), Seen()

    def run(image):
        with torch.autocast("cpu", torch.bfloat16):
            return model(image)

    compiled = torch.compile(run if where == "inside" else model, backend=dynamo.rewriting(seen))
    outside = torch.autocast("cpu", torch.bfloat16, enabled=where == "around")
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            with outside:
                found = compiled(x)
            expected, reference = run(x), copy.deepcopy(model).double()(x.double())
        assert found.dtype == expected.dtype == torch.bfloat16
        assert scaled_error(found.double(), reference) < max(4 * scaled_error(expected.double(), reference), 2**-7)
    with outside:
        compiled(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert seen.operators() == [2, 2]  # without gradients, and with


@pytest.mark.parametrize("off", [True, False])
def test_attention_in_float32_beside_autocast(off):
    """Where nothing else is left of the region in which autocast was off, or between its end and the attention."""

    def attend(x):
        def windows(y):
            return y.view(2, 2, 4, 2, 4, 2, 8).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, 2, 16, 8)

        query, key, value = windows(x * 1.5), windows(x * 0.7 + 1), windows(x.sin())
        return ((query @ key.mT).softmax(-1) @ value).view(2, 2, 2, 2, 4, 4, 8).permute(0, 1, 4, 2, 5, 3, 6).flatten(-2)

    def run(x, weight):
        with torch.autocast("cpu", torch.bfloat16):
            low = x @ weight
            if off:
                with torch.autocast("cpu", enabled=False):
                    attended = attend(x)
                return attended, low @ weight
        return attend(x), low

    seen, given = Seen(), (torch.randn(2, 8, 8, 16), torch.randn(16, 16))
    found = torch.compile(run, backend=dynamo.rewriting(seen))(*given)
    assert seen.operators() == [1]
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16]
    assert [scaled_error(a, b) < 1e-5 for a, b in zip(found, run(*given), strict=True)] == [True, True]


def test_a_mask_written_to_is_compiled_anew():
    model, x, seen = swin(), torch.randn(IMAGE), Seen()
    compiled = torch.compile(model, backend=dynamo.rewriting(seen))
    mask = next(b for n, b in model.named_buffers() if "mask" in n and b.is_floating_point())
    with torch.no_grad():
        before = compiled(x)
        mask.mul_(0.01)
        expected = model(x)
        assert scaled_error(compiled(x), expected) < 1e-5
        assert scaled_error(before, expected) > 1e-4
    assert len(seen.graphs) == 2


def test_norms_in_training_do_not_compile_anew():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.swin = nn.BatchNorm2d(3), swin()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.swin(self.norm(x))

    torch.manual_seed(0)
    model, seen = Block().train(), Seen()
    compiled = torch.compile(model, backend=dynamo.rewriting(seen))
    for _ in range(3):
        compiled(torch.randn(IMAGE)).sum().backward()
    assert seen.operators() == [2]
    assert int(model.norm.num_batches_tracked) == 3


def test_changing_batch():
    model, seen = swin(), Seen()
    compiled = torch.compile(model, backend=dynamo.rewriting(seen))
    with torch.no_grad():
        for batch in (2, 5, 3):
            x = torch.randn(batch, *IMAGE[1:])
            torch._dynamo.mark_dynamic(x, 0)
            assert scaled_error(compiled(x), model(x)) < 1e-5
    assert seen.operators() == [2]


def test_what_is_no_local_attention_goes_on_untouched():
    model, x, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), torch.randn(3, 4), Seen()
    compiled = torch.compile(model, backend=dynamo.rewriting(seen))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert seen.operators() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["backend", "pre_grad_custom_pass"])
def test_inductor(place):
    """Inductor compiles C++ for the rest: half a minute each."""
    model, x = swin(), torch.randn(IMAGE)
    if place == "backend":
        compiled = torch.compile(model, backend="attnrewrite", fullgraph=True)
    else:
        compiled = torch.compile(model, options={place: dynamo.GraphPass()})
    with torch.no_grad():
        compiled(x)
        with torch.profiler.profile() as profile:
            assert scaled_error(compiled(x), model(x)) < 1e-5
    assert sum(e.count for e in profile.key_averages() if e.key == "attnrewrite::flash_window_attention") == 2
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
