"""Causal windows: a query attends the tokens of its window up to its own. A mask of -inf stays one, in any spelling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest

from attnrewrite.frontend.onnx import read
from attnrewrite.functions import operands_of
from attnrewrite.verify.exact import verify_exact
from tests.models.onnx_builder import Builder
from tests.models.onnx_moved_blocks import AROUND, CHANNELS, GROUP, HEAD_DIM, HEADS, Layers, open_model
from tests.models.onnx_moved_blocks import SIZE as MAP
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

LATER = np.triu(np.ones((GROUP, GROUP), bool), 1)  # keys behind their query
LOWEST = float(np.finfo(np.float32).min)
SCALE = 60.0  # logits of some hundreds: a penalty of -100 does not hide what it should exclude
TOLERANCE = 1e-4  # their rounding, 300 * 2**-24, through exp
Masking = Callable[[Builder, str], str]


def added(number: float) -> Masking:
    return lambda g, logits: g.add(logits, np.where(LATER, number, 0.0))


def chosen(number: float) -> Masking:
    return lambda g, logits: g.op("Where", g.constant(LATER), g.constant(np.float64(number)), logits)


def computed(g: Builder, logits: str) -> str:
    """Positions compared in the graph."""
    positions = [g.reshape(g.op("Range", *map(g.constant, (0, GROUP, 1))), *shape) for shape in ((1, -1), (-1, 1))]
    return g.op("Where", g.op("Greater", *positions), g.constant(np.float64(-np.inf)), logits)


def by_trilu(g: Builder, logits: str) -> str:
    full = g.constant(np.full((GROUP, GROUP), -np.inf))
    return g.op("Add", logits, g.op("Trilu", full, g.constant(1), upper=1))


def with_a_bias(g: Builder, logits: str) -> str:
    bias = np.random.default_rng(7).normal(size=(HEADS, GROUP, GROUP))
    return g.add(g.add(logits, np.where(LATER, -np.inf, 0.0)), bias)


MASKINGS: dict[str, Masking] = {
    "added": added(-np.inf),
    "chosen": chosen(-np.inf),
    "lowest-chosen": chosen(LOWEST),
    "computed": computed,
    "trilu": by_trilu,
    "with-a-bias": with_a_bias,
}


def causal(masking: Masking, around: str = "windows", *, shortcut: bool = True) -> onnx.ModelProto:
    """One attention in windows whose logits are masked, on `[batch, *SIZE, C]`."""
    way = AROUND[around]
    g, x, layers = open_model(way)
    tokens = attention(g, layers, way.before(g, x), masking)
    y = way.behind(g, tokens)
    return g.model({"y": g.op("Add", x, y) if shortcut else y})


def attention(g: Builder, layers: Layers, x: str, masking: Masking) -> str:
    qkv = g.reshape(layers.linear(x, CHANNELS, 3 * CHANNELS), -1, GROUP, 3, HEADS, HEAD_DIM)
    q, k, v = (g.squeeze(part, 0) for part in g.split(g.transpose(qkv, 2, 0, 3, 1, 4), [1, 1, 1], 0))
    logits = masking(g, g.mul(g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), SCALE))
    out = g.transpose(g.op("MatMul", g.op("Softmax", logits, axis=-1), v), 0, 2, 1, 3)
    return layers.linear(g.reshape(out, -1, GROUP, CHANNELS), CHANNELS, CHANNELS)


def inputs_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    (x,) = model.graph.input
    shape = [d.dim_value or 2 for d in x.type.tensor_type.shape.dim]
    return {x.name: np.random.default_rng(1).normal(size=shape).astype(np.float32)}


@pytest.mark.parametrize("around", ["windows", "shifted", "channels first"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_causal_mask_of_windows_is_exact(masking: str, around: str) -> None:
    model = causal(MASKINGS[masking], around)
    outcome = optimize(model)
    (site,) = outcome.sites
    assert (site.kind, site.verdict, site.mask) == ("window", "rewrite", "constant"), site.reason
    assert site.bias == ("constant" if masking == "with-a-bias" else "none")
    assert not left_over(outcome.graph)
    (node,) = local_ops(outcome.graph)
    bias = operands_of(node)["bias"].constant
    assert bias.shape == (1, HEADS, GROUP, GROUP)
    assert (np.isneginf(bias) == LATER).all()
    inputs = inputs_of(model)
    assert error(run(written(outcome), inputs)["y"], run(model, inputs)["y"]) <= TOLERANCE
    assert all(check.passed for check in verify_exact(read(model), read(written(outcome))))


def test_causal_mask_of_minus_100_excludes_nothing() -> None:
    model = causal(added(-100.0))
    outcome = optimize(model)
    (site,) = outcome.sites
    assert (site.verdict, site.bias, site.mask) == ("rewrite", "constant", "none")
    inputs = inputs_of(model)
    expected = run(model, inputs)["y"]
    assert error(run(written(outcome), inputs)["y"], expected) <= TOLERANCE
    assert error(run(causal(added(-np.inf)), inputs)["y"], expected) > 1e-2


SIZE, WIDTH = 48, 8  # tokens of a sequence, of a block


def sequence(look_back: int, fixed_mask: bool = True) -> onnx.ModelProto:
    """Causal attention in blocks of a sequence `[batch, SIZE, C]`, whose keys begin so many blocks before.

    fixed_mask: behind the query lies nothing; else the mask is that of the block alone, of whatever keys.
    """
    g = Builder()
    x = g.input("x", ["batch", SIZE, CHANNELS])
    layers, keys = Layers(g, WIDTH), WIDTH * (look_back + 1)
    tokens = g.reshape(x, -1, SIZE // WIDTH, WIDTH, CHANNELS)
    padded = g.pad(tokens, [0, look_back, 0, 0], [0, 0, 0, 0])
    pieces = [g.slice(padded, k, k + SIZE // WIDTH, 1) for k in range(look_back + 1)]
    around = g.concat(pieces, 2) if look_back else tokens
    q = heads(g, layers.linear(tokens, CHANNELS, CHANNELS), WIDTH)
    k, v = (heads(g, layers.linear(around, CHANNELS, CHANNELS), keys) for _ in range(2))
    logits = g.mul(g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), HEAD_DIM**-0.5)
    later = np.triu(np.ones((WIDTH, keys), bool), 1 + (keys - WIDTH if fixed_mask else 0))
    weights = g.op("Softmax", g.add(logits, np.where(later, -np.inf, 0.0)), axis=-1)
    out = g.transpose(g.op("MatMul", weights, v), 0, 2, 1, 3)
    return g.model({"y": layers.linear(g.reshape(out, -1, SIZE, CHANNELS), CHANNELS, CHANNELS)})


def heads(g: Builder, x: str, length: int) -> str:
    return g.transpose(g.reshape(x, -1, length, HEADS, HEAD_DIM), 0, 2, 1, 3)


@pytest.mark.parametrize("fixed_mask", [True, False])
@pytest.mark.parametrize("look_back", [0, 1, 2])
def test_causal_blocks_of_a_sequence(look_back: int, fixed_mask: bool) -> None:
    model = sequence(look_back, fixed_mask)
    outcome = optimize(model)
    (site,) = outcome.sites
    assert (site.kind, site.verdict) == ("halo" if look_back else "window", "rewrite"), site.reason
    assert site.mask == "constant"
    if not look_back:
        assert (site.feature_size, site.window_size) == ((SIZE,), (WIDTH,))
    assert not left_over(outcome.graph)
    inputs = inputs_of(model)
    assert error(run(written(outcome), inputs)["y"], run(model, inputs)["y"]) <= 5e-6


def test_causal_attention_over_the_whole_sequence_is_global() -> None:
    """Every query attends another number of keys, the last one all."""
    g = Builder()
    x = g.input("x", ["batch", GROUP, CHANNELS])
    outcome = optimize(g.model({"y": attention(g, Layers(g, GROUP), x, added(-np.inf))}))
    (site,) = outcome.sites
    assert (site.kind, site.verdict) == ("global", "leave")
    assert not outcome.modified


def test_a_mask_that_differs_from_batch_element_to_element_is_no_constant_of_the_windows() -> None:
    """Two batch elements, two masks: no operand of the op holds them."""
    masks = np.stack([np.where(LATER, -np.inf, 0.0), np.where(LATER.T, -np.inf, 0.0)])
    way = AROUND["windows"]
    g, x, layers = open_model(way, 2)

    def masking(g: Builder, logits: str) -> str:
        apart = g.reshape(logits, 2, -1, HEADS, GROUP, GROUP)
        return g.reshape(g.add(apart, masks[:, None, None]), -1, HEADS, GROUP, GROUP)

    outcome = optimize(g.model({"y": way.behind(g, attention(g, layers, way.before(g, x), masking))}))
    (site,) = outcome.sites
    assert (site.verdict, site.reason) == ("leave", "the mask differs between batch elements")


@pytest.mark.parametrize("rank", [3, 4])
def test_causal_attention_operator(rank: int) -> None:
    """ONNX's own Attention (opset 23) with is_causal, in windows."""
    way = AROUND["windows"]
    g = Builder(opset=23)
    x, layers = g.input("x", ["batch", *MAP, CHANNELS]), Layers(g, GROUP)
    tokens = way.before(g, x)
    parts = [layers.linear(tokens, CHANNELS, CHANNELS) for _ in range(3)]
    if rank == 3:
        out = g.op("Attention", *parts, is_causal=1, q_num_heads=HEADS, kv_num_heads=HEADS, scale=SCALE)
    else:
        attended = g.op("Attention", *(heads(g, part, GROUP) for part in parts), is_causal=1, scale=SCALE)
        out = g.reshape(g.transpose(attended, 0, 2, 1, 3), -1, GROUP, CHANNELS)
    model = g.model({"y": way.behind(g, out)})
    outcome = optimize(model)
    (site,) = outcome.sites
    assert (site.kind, site.verdict, site.mask) == ("window", "rewrite", "constant"), site.reason
    assert not left_over(outcome.graph)
    inputs = inputs_of(model)
    assert error(run(written(outcome), inputs)["y"], run(model, inputs)["y"]) <= TOLERANCE
