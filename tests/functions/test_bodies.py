"""The bodies of the two ops in ONNX Runtime against the NumPy reference: geometries, operands, opsets, dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from attnrewrite.frontend.onnx import read, to_model
from attnrewrite.functions import body_of, overload_of, spec_of
from attnrewrite.functions.spec import DOMAIN, FlashWindowAttention, SlideAttention, Spec
from attnrewrite.graph import Node
from attnrewrite.localattention.geometry import KeyWindows, NeighborhoodGeometry, WindowGeometry
from attnrewrite.lowering.kernels import reference
from tests.passes.rewritten import ranks
from tests.running import error, run

HEADS, HEAD_DIM, VALUE_DIM = 3, 5, 7
EXTRA_TOKENS, ASKING_TOKENS = 3, 2
FLOAT32, FLOAT16 = 2e-6, 4e-3  # of max |reference|: sums of up to 49 terms, each rounded to 2**-24 or 2**-11


@dataclass(frozen=True)
class Case:
    """An op on random operands; optional: the optional operands it has, by name."""

    spec: Spec
    optional: tuple[str, ...] = ()
    batch: int = 2
    dtype: type = np.float32
    shared_rows: bool = False  # learned shifts are the same for every head
    changes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def operands(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        wanted = ("query", "key", "value", *self.optional)
        names = [n for n in self.spec.operands if n in wanted]
        made = {n: rng.normal(size=shape).astype(self.dtype) for n, shape in self.shapes().items()}
        return {n: np.asarray(self.changes.get(n, made[n])).astype(self.dtype) for n in names}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        size = self.spec.geometry.feature_size
        if isinstance(self.spec, FlashWindowAttention):
            geometry = self.spec.geometry
            tokens, keys, windows = geometry.tokens_per_window, geometry.keys_per_window, geometry.num_windows
            per_window = windows if "bias per window" in self.optional else 1
            small = "small mask" in self.optional
            extra = (
                1 if "extra of one image" in self.optional else self.batch,
                1 if "extra of one window" in self.optional else windows,
                EXTRA_TOKENS,
            )
            keys += EXTRA_TOKENS if "extra_key" in self.optional else 0
            tokens += ASKING_TOKENS if "extra_query" in self.optional else 0
            return {
                "query": (self.batch, *(geometry.window_size if self.spec.shared_query else size), HEADS * HEAD_DIM),
                "key": (self.batch, *geometry.key_size, HEADS * HEAD_DIM),
                "value": (self.batch, *geometry.key_size, HEADS * VALUE_DIM),
                "bias": (per_window, HEADS, tokens, keys),
                "mask": (windows, 1 if small else tokens, keys),
                "key_padding": (HEADS * HEAD_DIM,),
                "value_padding": (HEADS * VALUE_DIM,),
                "extra_key": (*extra, HEADS * HEAD_DIM),
                "extra_value": (*extra, HEADS * VALUE_DIM),
                "extra_query": (*extra[:2], ASKING_TOKENS, HEADS * HEAD_DIM),
                "relative_position": (HEADS if "table per head" in self.optional else 1, self.table_rows(), HEAD_DIM),
                "logit_bias": tuple(
                    1 if f"{letter} broadcast" in self.optional else extent
                    for letter, extent in zip("BWHNM", (self.batch, windows, HEADS, tokens, keys), strict=True)
                ),
            }
        slots, kernel = self.spec.geometry.keys_per_query, self.spec.geometry.kernel_size
        heads = 1 if self.shared_rows else HEADS
        keys, pixels = self.spec.geometry.key_size, math.prod(size)
        heads_of_bias = 1 if "bias of all heads" in self.optional else HEADS
        return {
            "query": (self.batch, HEADS * HEAD_DIM, *size),
            "key": (self.batch, HEADS * HEAD_DIM, *keys),
            "value": (self.batch, HEADS * VALUE_DIM, *keys),
            "bias": (heads_of_bias, pixels, slots) if "bias per pixel" in self.optional else (heads_of_bias, slots),
            "key_padding": (HEADS * HEAD_DIM,),
            "value_padding": (HEADS * VALUE_DIM,),
            "key_kernel": (heads * HEAD_DIM, slots, *kernel),
            "key_bias": (heads * HEAD_DIM, slots),
            "value_kernel": (heads * VALUE_DIM, slots, *kernel),
            "value_bias": (heads * VALUE_DIM, slots),
        }

    def table_rows(self) -> int:
        """Rows of the table of relative positions: per axis, or one for every pair of tokens."""
        assert isinstance(self.spec, FlashWindowAttention)
        geometry = self.spec.geometry
        if "full table" in self.optional:
            return geometry.tokens_per_window * geometry.keys_per_window
        keys = geometry.window_size if geometry.keys is None else geometry.keys.window_size
        return sum(w * k for w, k in zip(geometry.window_size, keys, strict=True))

    def evaluate(self) -> np.ndarray:
        return self.outputs()["y"]

    def outputs(self) -> dict[str, np.ndarray]:
        """What the op means: its outputs by the names they have in `model`."""
        if isinstance(self.spec, SlideAttention):
            return {"y": reference.slide_attention(self.spec, self.operands())}
        return dict(zip(("y", "extra"), reference.window_outputs(self.spec, self.operands()), strict=False))

    def model(self, opset: int = 17, *, inline: bool = False, batch: int | str | None = None) -> onnx.ModelProto:
        """A model of the one node; every operand is an input, batch symbolic if it is a string."""
        operands = self.operands()
        names = [n if n in operands else "" for n in self.spec.operands]
        while not names[-1]:
            names.pop()
        outputs = self.outputs()
        node = helper.make_node(
            self.spec.op_type, names, list(outputs), name="op", domain=DOMAIN, **self.spec.attributes()
        )
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        first = self.batch if batch is None else batch

        def declared(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
            batched = name in ("query", "key", "value", *outputs) or (
                name in ("logit_bias", *ASKING) and shape[0] == self.batch > 1
            )
            own = [first, *shape[1:]] if batched else list(shape)
            return helper.make_tensor_value_info(name, kind, own)

        inputs = [declared(n, a.shape) for n, a in operands.items()]
        graph = helper.make_graph([node], "op", inputs, [declared(n, a.shape) for n, a in outputs.items()])
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
        return to_model(read(helper.make_model(graph, opset_imports=imports, ir_version=10)), inline=inline)


def windows(
    size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...] | None = None, padded: bool = False
) -> Spec:
    geometry = WindowGeometry(size, window, (0,) * len(size) if shift is None else shift, padded)
    return FlashWindowAttention(geometry, HEADS, 0.375)


def near(size: tuple[int, ...], kernel: tuple[int, ...], dilation: tuple[int, ...] | None = None) -> Spec:
    return SlideAttention(NeighborhoodGeometry(size, kernel, dilation or (1,) * len(size)), HEADS, 0.375)


def bordered(size: tuple[int, ...], kernel: tuple[int, ...], border: str, **more: tuple[int, ...]) -> Spec:
    dilation = more.pop("dilation", (1,) * len(size))
    return SlideAttention(NeighborhoodGeometry(size, kernel, dilation, border, **more), HEADS, 0.375)


def masked(spec: Spec, value: float) -> Spec:
    assert isinstance(spec, FlashWindowAttention)
    return replace(spec, mask_value=value)


def keyed(spec: Spec, **keys: object) -> Spec:
    """Windows with keys of their own; halo=h: the query's window and h pixels around it."""
    assert isinstance(spec, FlashWindowAttention)
    geometry = spec.geometry
    halo = keys.pop("halo", (0,) * len(geometry.window_size))
    assert isinstance(halo, tuple)
    window = tuple(w + 2 * h for w, h in zip(geometry.window_size, halo, strict=True))
    offset, ones = tuple(-h for h in halo), (1,) * len(halo)
    own = KeyWindows(geometry.feature_size, window, geometry.window_size, offset, ones)
    return replace(spec, geometry=replace(geometry, keys=replace(own, **keys)))  # type: ignore[arg-type]


def by_head(spec: Spec, *shifts: tuple[int, ...]) -> Spec:
    """Windows whose groups of heads have these shifts."""
    assert isinstance(spec, FlashWindowAttention)
    return replace(spec, geometry=replace(spec.geometry, shift_size=shifts[0]), head_shifts=shifts)


SHIFTED = windows((8, 12), (4, 4), (2, 2))
PLAIN = windows((8, 12), (4, 4))
HALVED = {"feature_size": (4, 6), "window_size": (2, 2), "stride": (2, 2)}
DOUBLED = {"feature_size": (16, 24), "window_size": (8, 8), "stride": (8, 8)}
PADS = ("key_padding", "value_padding")
RELATIVE = ("relative_position",)
EXTRA = ("extra_key", "extra_value")
ASKING = ("extra_query", *EXTRA)
LEARNED = ("key_kernel", "key_bias", "value_kernel", "value_bias")

CASES: dict[str, Case] = {
    "windows": Case(windows((8, 12), (4, 4))),
    "windows-of-one-axis": Case(windows((21,), (7,))),
    "windows-of-one-axis-shifted": Case(masked(windows((21,), (7,), (3,)), -100.0), ("bias",)),
    "windows-of-three-axes": Case(masked(windows((4, 6, 10), (2, 3, 5), (1, 1, 2)), -100.0), ("bias",)),
    "windows-of-three-axes-padded": Case(windows((3, 5, 7), (2, 3, 4), (1, 0, 2), True), PADS),
    "shifted-with-mask": Case(masked(SHIFTED, -100.0), ("bias",)),
    "shifted-excluding": Case(masked(SHIFTED, -np.inf), ("bias",)),
    "shifted-without-mask": Case(SHIFTED),
    "shifted-on-one-axis": Case(masked(windows((8, 12), (4, 4), (0, 3)), -100.0)),
    "rectangular": Case(masked(windows((6, 20), (2, 5), (1, 3)), -100.0), ("bias",)),
    "whole-rows": Case(masked(windows((8, 12), (4, 12), (2, 0)), -100.0)),
    "a-window-per-pixel": Case(windows((3, 5), (1, 1))),
    "one-window": Case(windows((3, 5), (3, 5)), ("bias", "mask")),
    "bias-per-window": Case(SHIFTED, ("bias", "bias per window")),
    "mask-as-tensor": Case(SHIFTED, ("mask",)),
    "mask-and-bias-per-window": Case(masked(SHIFTED, -5.0), ("bias", "bias per window", "mask")),
    "padded": Case(windows((7, 10), (4, 4))),
    "padded-with-vectors": Case(windows((7, 10), (4, 4)), PADS),
    "padded-value-alone": Case(windows((7, 10), (4, 4)), ("value_padding",)),
    "padded-on-one-axis": Case(windows((8, 10), (4, 4), (2, 2)), PADS),
    "pad-then-shift": Case(masked(windows((7, 10), (4, 4), (2, 2), True), -100.0), ("bias",)),
    "pad-then-shift-with-vectors": Case(masked(windows((7, 10), (4, 4), (2, 2), True), -100.0), PADS),
    "shift-then-pad": Case(masked(windows((7, 10), (4, 4), (2, 2)), -100.0), ("bias",)),
    "shift-then-pad-with-vectors": Case(masked(windows((7, 10), (4, 4), (2, 1)), -100.0), ("bias", *PADS)),
    "map-smaller-than-its-window": Case(windows((3, 5), (4, 4)), PADS),
    "unscaled": Case(replace(SHIFTED, scale=1.0)),  # type: ignore[type-var]
    "softmax-in-double": Case(replace(masked(SHIFTED, -100.0), softmax_dtype=TensorProto.DOUBLE), ("bias",)),  # type: ignore[type-var]
    "shift-per-head": Case(by_head(PLAIN, (0, 0), (2, 1), (2, 1))),
    "shift-per-head-with-mask": Case(masked(by_head(PLAIN, (1, 3), (0, 0), (2, 2)), -100.0), ("bias",)),
    "shift-per-head-with-tensors": Case(by_head(PLAIN, (0, 0), (0, 0), (2, 2)), ("bias", "bias per window", "mask")),
    "shift-per-head-all-alike": Case(masked(by_head(PLAIN, (2, 2), (2, 2), (2, 2)), -100.0)),
    "shift-per-head-padded": Case(masked(by_head(windows((7, 10), (4, 4)), (0, 0), (2, 2), (2, 0)), -5.0), PADS),
    "shift-per-head-of-padded": Case(by_head(windows((7, 10), (4, 4), padded=True), (2, 2), (0, 0), (2, 1)), PADS),
    "shift-per-head-of-a-halo": Case(by_head(keyed(PLAIN, halo=(2, 1)), (2, 2), (0, 0), (0, 1)), PADS),
    "shift-per-head-relative": Case(by_head(PLAIN, (0, 0), (2, 2), (2, 2)), ("table per head", *RELATIVE, *EXTRA)),
    "halo": Case(keyed(PLAIN, halo=(2, 1)), ("bias",)),
    "halo-with-vectors": Case(keyed(PLAIN, halo=(2, 2)), ("bias", *PADS)),
    "halo-with-mask": Case(keyed(PLAIN, halo=(2, 2)), ("mask",)),
    "halo-with-mask-of-keys": Case(keyed(PLAIN, halo=(2, 2)), ("mask", "small mask")),
    "halo-wrapping": Case(keyed(PLAIN, halo=(2, 2), border="wrap")),
    "halo-of-edges": Case(keyed(PLAIN, halo=(2, 2), border="edge")),
    "halo-reflecting": Case(keyed(PLAIN, halo=(2, 2), border="reflect")),
    "halo-before-alone": Case(keyed(windows((21,), (7,)), window_size=(14,), offset=(-7,))),
    "halo-of-three-axes": Case(keyed(windows((4, 6, 10), (2, 3, 5)), halo=(1, 0, 2)), PADS),
    "halo-shifted": Case(keyed(SHIFTED, halo=(2, 1)), PADS),
    "halo-padded-then-shifted": Case(keyed(windows((7, 10), (4, 4), (2, 2), True), halo=(2, 1)), PADS),
    "halo-shifted-then-padded": Case(keyed(windows((7, 10), (4, 4), (2, 2)), halo=(2, 1)), PADS),
    "keys-dilated": Case(keyed(PLAIN, window_size=(2, 2), dilation=(2, 2))),
    "keys-downsampled": Case(keyed(PLAIN, **HALVED), ("bias",)),
    "queries-pooled": Case(keyed(PLAIN, **DOUBLED), ("bias",)),
    "queries-pooled-shifted": Case(keyed(SHIFTED, **DOUBLED), ("bias",)),
    "shared-query": Case(replace(PLAIN, shared_query=True), ("bias",)),  # type: ignore[type-var]
    "shared-query-shifted": Case(replace(masked(SHIFTED, -100.0), shared_query=True), ("bias",)),  # type: ignore[type-var]
    "relative": Case(SHIFTED, RELATIVE),
    "relative-scaled": Case(replace(masked(SHIFTED, -100.0), relative_scale=0.5), ("bias", *RELATIVE)),  # type: ignore[type-var]
    "relative-per-head": Case(windows((6, 20), (2, 5)), ("table per head", *RELATIVE)),
    "relative-padded": Case(windows((7, 10), (4, 4)), ("mask", *PADS, *RELATIVE)),
    "relative-of-one-axis": Case(windows((21,), (7,)), RELATIVE),
    "relative-of-three-axes": Case(windows((4, 6, 10), (2, 3, 5)), RELATIVE),
    "relative-of-three-axes-per-head": Case(windows((4, 6, 10), (2, 3, 5)), ("table per head", *RELATIVE)),
    "relative-full-table": Case(windows((6, 20), (2, 5)), ("full table", *RELATIVE)),
    "relative-full-table-per-head": Case(windows((6, 20), (2, 5)), ("full table", "table per head", *RELATIVE)),
    "relative-halo": Case(keyed(PLAIN, halo=(2, 1)), ("mask", *RELATIVE)),
    "relative-halo-per-head": Case(keyed(PLAIN, halo=(2, 1)), ("table per head", *RELATIVE)),
    "relative-shared-query": Case(replace(PLAIN, shared_query=True), RELATIVE),  # type: ignore[type-var]
    "computed-mask": Case(SHIFTED, ("bias", "logit_bias", "H broadcast")),
    "computed-bias": Case(masked(SHIFTED, -100.0), ("logit_bias", "B broadcast", "W broadcast")),
    "computed-for-keys": Case(keyed(PLAIN, halo=(2, 2)), ("logit_bias", "W broadcast", "H broadcast", "N broadcast")),
    "extra-keys": Case(PLAIN, EXTRA),
    "extra-keys-of-all-images": Case(SHIFTED, ("extra of one image", *EXTRA)),
    "extra-keys-of-all-windows": Case(masked(SHIFTED, -100.0), ("bias", "extra of one window", *EXTRA)),
    "extra-keys-everywhere-alike": Case(
        windows((7, 10), (4, 4)), ("mask", "bias", "extra of one image", "extra of one window", *PADS, *EXTRA)
    ),
    "extra-keys-of-a-halo": Case(keyed(PLAIN, halo=(2, 1)), ("bias", "mask", *EXTRA)),
    "extra-keys-and-relative": Case(masked(SHIFTED, -100.0), ("logit_bias", "M broadcast", *RELATIVE, *EXTRA)),
    "extra-queries": Case(PLAIN, ASKING),
    "extra-queries-alone": Case(PLAIN, ("bias", "extra_query")),
    "extra-queries-of-all-windows": Case(
        masked(SHIFTED, -100.0), ("bias", "extra of one image", "extra of one window", *ASKING)
    ),
    "extra-queries-and-padding": Case(windows((7, 10), (4, 4)), ("mask", "bias", *PADS, *ASKING)),
    "extra-queries-of-a-halo": Case(keyed(PLAIN, halo=(2, 1)), ("bias", "small mask", "mask", *ASKING)),
    "extra-queries-and-relative": Case(masked(SHIFTED, -100.0), ("logit_bias", "N broadcast", *RELATIVE, *ASKING)),
    "computed-everything": Case(windows((7, 10), (4, 4)), ("mask", "logit_bias", *RELATIVE)),
    "k3": Case(near((7, 11), (3, 3))),
    "k5-dilated": Case(near((13, 11), (5, 5), (2, 2)), ("bias",)),
    "k7": Case(near((9, 11), (7, 7))),
    "k3-by-5": Case(near((7, 11), (3, 5), (1, 2)), ("bias",)),
    "k1": Case(near((3, 5), (1, 1))),
    "kernel-larger-than-the-map": Case(near((2, 3), (5, 7))),
    "one-axis": Case(near((13,), (5,), (2,)), ("bias",)),
    "three-axes": Case(near((3, 5, 4), (3, 3, 1))),
    "excluded": Case(bordered((7, 11), (3, 3), "exclude"), ("bias",)),
    "excluded-dilated": Case(bordered((7, 11), (3, 5), "exclude", dilation=(3, 2)), ("bias", "bias per pixel")),
    "inward": Case(bordered((7, 11), (3, 5), "inward"), ("bias", "bias per pixel")),
    "inward-dilated": Case(bordered((7, 11), (3, 3), "inward", dilation=(2, 3)), ("bias", "bias of all heads")),
    "inward-even": Case(bordered((7, 11), (4, 2), "inward")),
    "inward-on-one-axis": Case(bordered((7, 11), (3, 3), "exclude,inward")),
    "inward-of-three-axes": Case(bordered((3, 5, 4), (3, 3, 2), "inward"), ("bias", "bias per pixel")),
    "replicated": Case(bordered((7, 11), (3, 5), "replicate")),
    "reflected": Case(bordered((7, 11), (5, 5), "reflect", dilation=(2, 1)), ("bias",)),
    "reflected-twice": Case(bordered((2, 3), (7, 9), "reflect")),
    "wrapped": Case(bordered((7, 11), (5, 3), "wrap", dilation=(1, 2)), ("bias",)),
    "wrapped-along-the-rows": Case(bordered((7, 11), (3, 3), "zero,wrap")),
    "padded-with-vectors-around": Case(bordered((7, 11), (3, 3), "constant"), PADS),
    "padded-with-vectors-on-one-axis": Case(bordered((7, 11), (3, 3), "constant,replicate"), ("bias", *PADS)),
    "even": Case(bordered((7, 11), (2, 4), "zero")),
    "causal": Case(bordered((13,), (5,), "exclude", offset=(-4,))),
    "causal-rows": Case(bordered((7, 11), (3, 3), "exclude,inward", offset=(-2, -1))),
    "off-centre": Case(bordered((7, 11), (3, 3), "zero", offset=(0, 1)), ("bias", "bias per pixel")),
    "strided": Case(bordered((4, 5), (3, 3), "zero", stride=(2, 2), key_size=(8, 10)), ("bias",)),
    "strided-excluded": Case(bordered((4, 5), (2, 3), "exclude", stride=(2, 2), key_size=(7, 9), offset=(0, -1))),
    "strided-inward": Case(bordered((4, 4), (3, 3), "inward", stride=(2, 3), key_size=(8, 10)), ("bias",)),
    "strided-wrapped": Case(bordered((4, 4), (3, 3), "wrap", stride=(2, 3), key_size=(8, 10))),
    "all-inside": Case(bordered((5, 9), (3, 3), "zero", key_size=(7, 11), offset=(0, 0))),
    "every-query-two-pixels": Case(bordered((8,), (2,), "zero", stride=(2,), key_size=(16,), offset=(0,))),
    "learned": Case(near((7, 11), (3, 3)), LEARNED),
    "learned-shared-by-heads": Case(near((7, 11), (3, 3)), ("bias", *LEARNED), shared_rows=True),
    "learned-keys-alone": Case(near((7, 11), (3, 3)), ("key_kernel",)),
    "learned-values-dilated": Case(near((7, 11), (3, 3), (2, 2)), ("value_kernel", "value_bias")),
    "bias-on-the-key": Case(near((7, 11), (3, 3)), ("key_bias",)),
    "bias-on-the-key-shared": Case(near((7, 11), (3, 3)), ("key_bias",), shared_rows=True),
    "learned-of-one-axis": Case(near((13,), (3,)), LEARNED),
}


def named(case: Case) -> dict[str, np.ndarray]:
    return case.operands()


@pytest.mark.parametrize("inline", [False, True], ids=["function", "inline"])
@pytest.mark.parametrize("name", CASES)
def test_body_computes_what_the_op_means(name: str, inline: bool) -> None:
    case = CASES[name]
    found, expected = run(case.model(inline=inline), named(case)), case.outputs()
    assert found.keys() == expected.keys()
    assert all(error(found[n], expected[n]) <= FLOAT32 for n in expected)


SOME = (
    "halo-with-vectors",
    "shared-query-shifted",
    "shift-then-pad-with-vectors",
    "mask-and-bias-per-window",
    "extra-queries-of-all-windows",
    "shift-per-head-padded",
    "k5-dilated",
    "learned-shared-by-heads",
    "inward",
)


@pytest.mark.parametrize("opset", range(13, 24))
@pytest.mark.parametrize("name", SOME)
def test_bodies_are_written_in_the_opset_of_the_file(name: str, opset: int) -> None:
    case = CASES[name]
    model = case.model(opset)
    onnx.checker.check_model(model)
    assert [i.version for f in model.functions for i in f.opset_import] == [opset]
    assert error(run(model, named(case))["y"], case.evaluate()) <= FLOAT32


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("inline", [False, True], ids=["function", "inline"])
@pytest.mark.parametrize("name", SOME)
def test_symbolic_batch(name: str, inline: bool, batch: int) -> None:
    case = replace(CASES[name], batch=batch)
    found, expected = run(case.model(batch="B", inline=inline), named(case)), case.outputs()
    assert all(error(found[n], expected[n]) <= FLOAT32 for n in expected)


@pytest.mark.parametrize("softmax_dtype", [0, TensorProto.FLOAT])
@pytest.mark.parametrize("name", [*SOME, "shifted-excluding", "pad-then-shift"])
def test_float16(name: str, softmax_dtype: int) -> None:
    case = CASES[name]
    case = replace(case, spec=replace(case.spec, softmax_dtype=softmax_dtype), dtype=np.float16)  # type: ignore[type-var]
    found = run(case.model(), named(case))["y"]
    assert found.dtype == np.float16
    assert error(found, case.evaluate()) <= FLOAT16


@pytest.mark.parametrize("name", ["shifted-with-mask", "k3"])
def test_a_softmax_in_float32_survives_logits_that_float16_cannot_tell_apart(name: str) -> None:
    """Logits around 2000 step by 1 or 2 in float16: in float32 the weights are those of the reference."""
    case = CASES[name]
    bias = np.full(case.shapes()["bias"], 2000.0) + np.arange(case.shapes()["bias"][-1]) * 0.25
    case = replace(
        case, dtype=np.float16, optional=("bias",), changes={"query": case.operands()["query"] * 0, "bias": bias}
    )
    wide = replace(case, spec=replace(case.spec, softmax_dtype=TensorProto.FLOAT))  # type: ignore[type-var]
    expected = wide.evaluate()
    assert error(run(wide.model(), named(wide))["y"], expected) <= FLOAT16
    np.testing.assert_array_equal(expected, case.evaluate())


def test_a_row_of_minus_infinity_is_not_a_number() -> None:
    mask = np.zeros((6, 16, 16))
    mask[2, 5] = -np.inf
    case = Case(SHIFTED, ("mask",), changes={"mask": mask})
    expected = case.evaluate()
    assert np.isnan(expected).any()
    assert error(run(case.model(), named(case))["y"], expected) <= FLOAT32


def test_neighbours_outside_the_map_take_part_with_zeros() -> None:
    """A map of one pixel: eight of the nine keys are zero vectors."""
    case = Case(near((1, 1), (3, 3)), batch=1)
    operands = case.operands()
    query, key, value = (operands[n].reshape(HEADS, -1).astype(np.float64) for n in ("query", "key", "value"))
    weight = np.exp(0.375 * (query * key).sum(1))
    expected = (weight / (weight + 8))[:, None] * value
    assert error(run(case.model(), operands)["y"].reshape(HEADS, -1), expected) <= FLOAT32


@pytest.mark.parametrize("name", CASES)
def test_no_tensor_has_more_than_five_axes(name: str) -> None:
    case = CASES[name]
    assert ranks(case.model(inline=True, batch="B")) <= max(5, len(case.operands()["query"].shape))


@pytest.mark.parametrize("name", CASES)
def test_bodies_use_operators_of_opset_17(name: str) -> None:
    model = CASES[name].model(23, inline=True)
    assert all(onnx.defs.has(n.op_type, max_inclusive_version=17) for n in model.graph.node)


def test_keys_and_values_are_never_copied_for_every_neighbour() -> None:
    """The largest tensors of a SlideAttention body are the logits, nH and not nH*d times k^2 maps."""
    case = CASES["k7"]
    (node,) = read(case.model()).nodes
    body = body_of(node, 17)
    largest = max(math.prod(int(e) for e in o.shape or ()) for n in body.nodes for o in n.outputs)  # type: ignore[arg-type]
    assert largest == 2 * HEADS * 49 * 9 * 11


# The node and the values it stands for.


@pytest.mark.parametrize("name", CASES)
def test_the_attributes_of_a_node_are_the_spec(name: str) -> None:
    case = CASES[name]
    (node,) = case.model().graph.node
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert type(case.spec).from_attributes(attributes) == case.spec
    (read_back,) = read(case.model()).nodes
    assert spec_of(read_back) == case.spec


def test_an_attribute_is_a_float32_and_stays_one() -> None:
    """A scale of 1/sqrt(5) is rounded once; reading and writing again changes nothing."""
    case = Case(replace(SHIFTED, scale=5**-0.5))  # type: ignore[type-var]
    (first,) = read(case.model()).nodes
    (second,) = read(to_model(read(case.model()))).nodes
    assert spec_of(first).scale == spec_of(second).scale == float(np.float32(5**-0.5))
    assert overload_of(first) == overload_of(second)


def test_every_specialisation_has_an_overload_of_its_own() -> None:
    nodes: list[Node] = [read(case.model()).nodes[0] for case in CASES.values()]
    nodes += [read(replace(CASES[n], dtype=np.float16).model()).nodes[0] for n in SOME]
    nodes += [read(replace(CASES[n], batch=3).model()).nodes[0] for n in SOME]
    nodes += [read(CASES[n].model(batch="B")).nodes[0] for n in SOME]
    overloads = [overload_of(n) for n in nodes]
    assert len(set(overloads)) == len(overloads)
    assert overload_of(read(CASES["k3"].model()).nodes[0]) == overload_of(nodes[list(CASES).index("k3")])


def test_nodes_of_one_specialisation_share_a_function() -> None:
    case = CASES["shifted-with-mask"]
    model = case.model()
    twice = onnx.ModelProto()
    twice.CopyFrom(model)
    del twice.functions[:]
    twice.graph.node.append(model.graph.node[0])
    twice.graph.node[1].name, twice.graph.node[1].output[0] = "again", "z"
    twice.graph.node[1].overload = twice.graph.node[0].overload = ""
    output = onnx.ValueInfoProto()
    output.CopyFrom(model.graph.output[0])
    output.name = "z"
    twice.graph.output.append(output)
    written = to_model(read(twice))
    assert len(written.functions) == 1
    found = run(written, named(case))
    np.testing.assert_array_equal(found["y"], found["z"])
    inlined = run(to_model(read(twice), inline=True), named(case))
    np.testing.assert_array_equal(inlined["y"], found["y"])
    np.testing.assert_array_equal(inlined["z"], found["y"])
