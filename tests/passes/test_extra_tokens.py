"""Windows that hold tokens of no map: class, register and summary tokens, joined to the keys of every window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest

from attnrewrite.frontend.onnx import read
from attnrewrite.functions import operands_of
from attnrewrite.verify.exact import verify_exact
from tests.models.onnx_builder import END, Builder
from tests.models.onnx_moved_blocks import AROUND, CHANNELS, GROUP, HEAD_DIM, HEADS, SIZE, WINDOW, Layers
from tests.passes.rewritten import left_over, local_ops, optimize, written
from tests.running import error, run

TOLERANCE = 5e-6
# The model has its extra tokens as rows of windows: those that are read leave the op by a reshape.
AS_ROWS = (" rows", "moves tokens (Reshape)")
WINDOWS = 8


@dataclass(frozen=True)
class Model:
    """One attention in windows whose keys are joined with extra tokens.

    source: where they come from (`tokens`). behind: they follow the window's keys. queries: they ask as well; what they
    attend is dropped, or read: "early" split off at once, "late" behind a per-token operator. norm, bias, mask: a norm
    of all keys; a bias [nH, N, M]; a mask [nW, N, M]. separate: the values' extra tokens are others than the keys'.
    computed: a second input [B, nW, 1, N, M] is added to the logits. reversed: keys and values
    are listed last to first.
    """

    source: str
    behind: bool = False
    queries: bool = False
    norm: bool = False
    bias: bool = False
    mask: bool = False
    around: str = "windows"
    separate: str = ""
    read: str = ""
    computed: bool = False
    batch: int | str = "batch"
    reversed: bool = False

    def onnx(self) -> onnx.ModelProto:
        way, g = AROUND[self.around], Builder()
        x = g.input("x", [self.batch, *((CHANNELS, *SIZE) if way.channels_first else (*SIZE, CHANNELS))])
        layers = Layers(g, GROUP)
        window = way.before(g, x)
        keys = values = self.joined(g, self.tokens(g, x, window, self.source), window)
        if self.separate:
            values = self.joined(g, self.tokens(g, x, window, self.separate), window)
        asking = keys if self.queries else window
        if self.norm:
            keys = values = asking = layers.norm(keys)
            asking = keys if self.queries else layers.norm(window)
        extra = self.count
        q = self.heads(g, layers.linear(asking, CHANNELS, CHANNELS), GROUP + extra * self.queries)
        k, v = (self.heads(g, layers.linear(t, CHANNELS, CHANNELS), GROUP + extra) for t in (keys, values))
        if self.reversed:
            k, v = (g.slice(t, -1, -END, 2, -1) for t in (k, v))
        logits = g.mul(g.op("MatMul", q, g.transpose(k, 0, 1, 3, 2)), HEAD_DIM**-0.5)
        rows = GROUP + extra * self.queries
        if self.bias:
            logits = g.add(logits, layers.weights(HEADS, rows, GROUP + extra))
        if self.mask:
            apart = g.reshape(logits, -1, WINDOWS, HEADS, rows, GROUP + extra)
            masked = np.where(np.random.default_rng(4).random((WINDOWS, 1, rows, GROUP + extra)) < 0.3, -100.0, 0.0)
            logits = g.reshape(g.add(apart, masked), -1, HEADS, rows, GROUP + extra)
        if self.computed:
            added = g.input("added", [self.batch, WINDOWS, 1, rows, GROUP + extra])
            apart = g.reshape(logits, -1, WINDOWS, HEADS, rows, GROUP + extra)
            logits = g.reshape(g.op("Add", apart, added), -1, HEADS, rows, GROUP + extra)
        out = g.transpose(g.op("MatMul", g.op("Softmax", logits, axis=-1), v), 0, 2, 1, 3)
        tokens = g.reshape(out, -1, rows, CHANNELS)
        if self.read != "early":
            tokens = layers.linear(tokens, CHANNELS, CHANNELS)
        outputs = {}
        if self.queries:
            start, first = (0, GROUP) if self.behind else (extra, 0)
            if self.read:
                beside = g.slice(tokens, first, first + extra, 1)
                outputs["extra"] = g.op("Sigmoid", layers.linear(beside, CHANNELS, CHANNELS))
            tokens = g.slice(tokens, start, start + GROUP, 1)
        return g.model({"y": g.op("Add", x, way.behind(g, tokens)), **outputs})

    @property
    def count(self) -> int:
        return {"registers": 3, "registers, scaled": 3, "register": 1, "of the image": 1, "of all images": 2}.get(
            self.source, 1
        )

    def joined(self, g: Builder, extra: str, window: str) -> str:
        return g.concat([window, extra] if self.behind else [extra, window], 1)

    def heads(self, g: Builder, x: str, length: int) -> str:
        return g.transpose(g.reshape(x, -1, length, HEADS, HEAD_DIM), 0, 2, 1, 3)

    def tokens(self, g: Builder, x: str, window: str, source: str) -> str:
        """`[B*nW, T, C]`."""
        rows = g.slice(g.op("Shape", window), 0, 1, 0)
        if source.startswith("register"):
            count = 1 if source == "register" else 3
            table = g.constant(np.random.default_rng(8).normal(size=(1, count, CHANNELS)))
            if source == "registers, scaled":
                repeated = self.tokens(g, x, window, "registers")
                return g.op("Relu", g.mul(repeated, np.random.default_rng(9).normal(size=CHANNELS)))
            return g.op("Expand", table, g.concat([rows, g.constant([count, CHANNELS])], 0))
        if source == "of all images":
            table = g.constant(np.random.default_rng(8).normal(size=(WINDOWS, 2, CHANNELS)))
            images = g.op("Div", rows, g.constant([WINDOWS]))
            shape = g.concat([images, g.constant([WINDOWS, 2, CHANNELS])], 0)
            return g.reshape(g.op("Expand", g.unsqueeze(table, 0), shape), -1, 2, CHANNELS)
        if source == "of the image":
            mean = g.op("Sigmoid", g.op("ReduceMean", x, axes=[1, 2], keepdims=0))
            spread = g.op("Expand", g.reshape(mean, -1, 1, 1, CHANNELS), g.constant([1, WINDOWS, 1, CHANNELS]))
            return g.reshape(spread, -1, 1, CHANNELS)
        pooled = g.op("AveragePool", g.transpose(x, 0, 3, 1, 2), kernel_shape=list(WINDOW), strides=list(WINDOW))
        summaries = g.reshape(g.transpose(pooled, 0, 2, 3, 1), -1, WINDOWS, CHANNELS)
        if source == "of the next window":
            summaries = g.concat([g.slice(summaries, 1, WINDOWS, 1), g.slice(summaries, 0, 1, 1)], 1)
        elif source == "of another image":
            summaries = g.slice(summaries, -1, -10, 0, -1)
        return g.reshape(summaries, -1, 1, CHANNELS)


def inputs_of(model: onnx.ModelProto, batch: int) -> dict[str, np.ndarray]:
    shapes = {i.name: [d.dim_value or batch for d in i.type.tensor_type.shape.dim] for i in model.graph.input}
    return {n: np.random.default_rng(1).normal(size=s).astype(np.float32) for n, s in shapes.items()}


MODELS: dict[str, Model] = {
    "registers": Model("registers"),
    "one-register": Model("register"),
    "registers-behind": Model("registers", behind=True),
    "registers-that-ask": Model("registers", queries=True),
    "registers-that-ask-behind": Model("registers", queries=True, behind=True),
    "registers-of-a-layer": Model("registers, scaled", bias=True),
    "registers-normed": Model("registers", norm=True),
    "registers-and-bias": Model("registers", bias=True),
    "registers-and-mask": Model("registers", mask=True, bias=True),
    "registers-that-ask-and-mask": Model("registers", mask=True, bias=True, queries=True, norm=True),
    "shifted": Model("registers", around="shifted", bias=True),
    "channels-first": Model("registers", around="channels first", queries=True),
    "grid": Model("registers", around="grid"),
    "of-the-image": Model("of the image", norm=True),
    "of-all-images": Model("of all images", bias=True),
    "summary": Model("of the window", bias=True),
    "summary-that-asks": Model("of the window", queries=True),
    "summary-of-the-next-window": Model("of the next window"),
    "register-reversed": Model("register", reversed=True, bias=True),
    "summary-reversed": Model("of the window", reversed=True, behind=True),
    "static-batch-of-the-image-reversed": Model("of the image", reversed=True, batch=2),
    "values-of-others": Model("of the window", separate="of the image"),
    "registers-read": Model("registers", queries=True, read="early"),
    "registers-read-late": Model("registers", queries=True, read="late", bias=True),
    "registers-read-behind": Model(
        "registers", queries=True, behind=True, read="late", mask=True, bias=True, norm=True
    ),
    "one-register-read": Model("register", queries=True, read="early", bias=True),
    "registers-read-shifted": Model("registers", queries=True, around="shifted", bias=True, read="late"),
    "registers-read-channels-first": Model("registers", queries=True, around="channels first", read="early"),
    "registers-read-grid": Model("registers", queries=True, around="grid", read="late"),
    "image-read": Model("of the image", queries=True, read="early"),
    "summary-read": Model("of the window", queries=True, mask=True, read="early"),
    "summary-read-behind": Model("of the window", queries=True, behind=True, bias=True, read="early"),
    "static-batch-read": Model("of the window", queries=True, batch=2, bias=True, read="early"),
    "static-batch-of-one-read": Model("registers", queries=True, batch=1, bias=True, read="early"),
    "computed": Model("registers", bias=True, computed=True),
    "computed-behind": Model("of the window", behind=True, computed=True),
    "computed-and-read": Model("registers", queries=True, bias=True, read="early", computed=True),
    "static-batch": Model("registers", batch=2),
    "static-batch-of-the-image": Model("of the image", batch=2, queries=True),
    "static-batch-summary": Model("of the window", batch=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_extra_tokens_are_operands(name: str) -> None:
    case = MODELS[name]
    model = case.onnx()
    outcome = optimize(model)
    (site,) = outcome.sites
    assert (site.kind, site.verdict) == (AROUND[case.around].kind, "rewrite"), site.reason
    assert (site.feature_size, site.window_size) == (SIZE, WINDOW)
    assert f"{case.count} token{'s' if case.count > 1 else ''} beside each" in site.reason
    assert not [s for s in left_over(outcome.graph) if not s.endswith(AS_ROWS if case.read else " rows")]
    (node,) = local_ops(outcome.graph)
    operands = operands_of(node)
    assert operands["extra_key"].known_shape[2] == operands["extra_value"].known_shape[2] == case.count
    assert len(node.outputs) == 1 + bool(case.read)
    assert not case.read or operands["extra_query"].known_shape[2] == case.count
    for batch in (case.batch,) if isinstance(case.batch, int) else (1, 2, 3):
        inputs = inputs_of(model, batch)
        found, expected = run(written(outcome), inputs), run(model, inputs)
        assert all(error(found[n], expected[n]) <= TOLERANCE for n in expected)
    assert [check.passed for check in verify_exact(read(model), read(written(outcome)))] == [True]


@pytest.mark.parametrize("name", ["registers", "registers-of-a-layer", "registers-normed", "of-all-images"])
def test_registers_are_constants_and_held_once(name: str) -> None:
    """Neither for every image nor, where all have the same, for every window."""
    (node,) = local_ops(optimize(MODELS[name].onnx()).graph)
    key = operands_of(node)["extra_key"]
    assert key.is_constant
    assert key.known_shape == ((1, 1, 3) if name != "of-all-images" else (1, WINDOWS, 2)) + (HEADS * HEAD_DIM,)


@pytest.mark.parametrize(
    ("original", "other"),
    [
        ("summary", "summary-of-the-next-window"),
        ("registers", "registers-and-bias"),
        ("registers", "one-register"),
        ("registers-read", "registers-that-ask"),
        ("registers-that-ask", "registers-read"),
        ("registers-read", "registers-read-late"),
    ],
)
def test_proof_tells_extra_tokens_apart(original: str, other: str) -> None:
    """The op of another model, of the same geometry, is no replacement of this one."""
    (check,) = verify_exact(read(MODELS[original].onnx()), read(written(optimize(MODELS[other].onnx()))))
    assert not check.passed
    assert check.detail


def test_carrier_tokens_in_the_stream_of_blocks_are_tokens_of_the_window() -> None:
    """Carrier and window are one row from block to block, and leave the model as one: nothing of it is on a map."""
    way, g = AROUND["windows"], Builder()
    x = g.input("x", ["batch", *SIZE, CHANNELS])
    layers, case = Layers(g, GROUP + 1), Model("of the window")
    window = way.before(g, x)
    rows = g.concat([case.tokens(g, x, window, case.source), window], 1)
    for _ in range(2):
        rows = layers.block(rows)
    model = g.model({"y": way.behind(g, g.slice(rows, 1, GROUP + 1, 1)), "rows": rows})
    outcome = optimize(model)
    for site in outcome.sites:
        assert (site.kind, site.verdict, site.window_size) == ("window", "rewrite", (GROUP + 1,)), site.reason
        assert site.feature_size == (WINDOWS * (GROUP + 1),)
    assert len(local_ops(outcome.graph)) == 2
    inputs = inputs_of(model, 2)
    found, expected = run(written(outcome), inputs), run(model, inputs)
    assert all(error(found[n], expected[n]) <= TOLERANCE for n in ("y", "rows"))


def test_what_a_lone_token_attends_is_read_where_the_attention_ends_or_not_at_all() -> None:
    """Behind a Linear over the whole row a lone token's place could not be told from a feature: rows they stay."""
    model = Model("of the window", queries=True, read="late").onnx()
    outcome = optimize(model)
    (site,) = outcome.sites
    assert (site.verdict, site.window_size) == ("rewrite", (GROUP + 1,))
    inputs = inputs_of(model, 2)
    found, expected = run(written(outcome), inputs), run(model, inputs)
    assert all(error(found[n], expected[n]) <= TOLERANCE for n in expected)


def test_computed_logits_of_rows_that_nobody_reads_are_left() -> None:
    """What is added to the window's own rows is a piece of a tensor, which no view of it is."""
    outcome = optimize(Model("registers", queries=True, behind=True, computed=True).onnx())
    (site,) = outcome.sites
    assert site.verdict == "leave"
    assert "added to the logits in an order that no transpose undoes" in site.reason


def test_extra_tokens_of_another_image_are_left() -> None:
    outcome = optimize(Model("of another image", batch=2).onnx())
    (site,) = outcome.sites
    assert site.verdict == "leave"
    assert "the windows hold 1 token that is not on the map" in site.reason
    assert "differ from batch element to batch element" in site.reason
