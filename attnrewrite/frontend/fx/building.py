"""What the entries of the ATen table write with: nodes of the graph view, symbolic sizes included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from attnrewrite.dims import Dim, Extent, NonAffine, Shape, product, static
from attnrewrite.frontend.shapes import broadcast
from attnrewrite.functions.body import BodyBuilder
from attnrewrite.graph import Node, UnknownShape, Value

OPSET = 20  # the first with Gelu


class Opaque(Exception):
    """An entry does not cover a call with these arguments; the message says why."""


Results = Value | Sequence[Value | None]
Handler = Callable[..., Results]
Table = dict[str, Handler]


H = TypeVar("H", bound=Handler)


def entry(table: Table, *names: str) -> Callable[[H], H]:
    """Put a function into a table as the meaning of these ATen operators; without an overload, of the default one.

    It is called with a `Builder` and the arguments by the names of the schema (`self` is `x`), as far as it names them:
    tensors are values, sizes are extents. An argument that it does not name must have its default, or the call is
    opaque; all of them are passed where it takes `**others`.
    """

    def register(handler: H) -> H:
        table.update({name if "." in name else f"{name}.default": handler for name in names})
        return handler

    return register


class Builder(BodyBuilder):
    """Appends nodes to the graph that is read.

    stem: of the names of what is written next. shapes, dtypes: of the results that the present call must have.
    """

    def __init__(self) -> None:
        super().__init__([], OPSET)
        self.stem = ""
        self.shapes: list[Shape] = []
        self.dtypes: list[np.dtype | None] = []
        self._taken: set[str] = set()
        self._symbols: dict[str, tuple[Value, int]] = {}

    @property
    def shape(self) -> Shape:
        """The shape of the call's first result."""
        return self.shapes[0]

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the call's first result; Opaque where NumPy lacks it."""
        dtype = self.dtypes[0]
        if dtype is None:
            raise Opaque("a dtype that ONNX lacks")
        return dtype

    def like(self, shapes: Sequence[Shape], dtypes: Sequence[np.dtype | None]) -> None:
        """Say what the present call returns."""
        self.shapes, self.dtypes = list(shapes), list(dtypes)

    def unique(self, name: str) -> str:
        """The name, numbered where it is taken."""
        if name in self._taken:
            name = next(n for n in (f"{name}_{k}" for k in range(1, 1 << 30)) if n not in self._taken)
        self._taken.add(name)
        return name

    def _name(self, stem: str) -> str:
        return self.unique(f"{self.stem}_{stem}" if self.stem else stem)

    def known(self, value: Value) -> None:
        """Let later shapes use the symbols that are extents of this value."""
        for axis, extent in enumerate(value.shape or ()):
            if isinstance(extent, Dim) and (symbol := as_symbol(extent)) is not None:
                self._symbols.setdefault(symbol, (value, axis))

    def nodes(
        self,
        op: str,
        inputs: Sequence[Value | None],
        shapes: Sequence[Shape],
        dtype: np.dtype | None,
        **attributes: Any,
    ) -> list[Value]:
        """One node with several outputs, or with inputs left out."""
        outputs = [Value(self._name(op.lower()), shape, dtype) for shape in shapes]
        self.graph.nodes.append(Node(op, inputs, outputs, attributes, outputs[0].name))
        return outputs

    def same(self, value: Value) -> Value:
        """The value under a name of its own."""
        return self.op("Identity", [value], value.known_shape)

    def extents(self, shape: Shape) -> Value:
        """The extents as an int64 vector, computed where symbolic; Opaque where a symbol is nobody's extent."""
        if all(isinstance(e, int) for e in shape):
            return self.ints([static(e) for e in shape])
        parts = [self._extent(e) if isinstance(e, Dim) else self.ints([e]) for e in shape]
        return parts[0] if len(parts) == 1 else self.op("Concat", parts, (len(parts),), axis=0)

    def _extent(self, extent: Dim) -> Value:
        total: Value | None = None
        for symbol, factor in extent.terms:
            if symbol not in self._symbols:
                raise Opaque(f"the extent {symbol} is no tensor's")
            value, axis = self._symbols[symbol]
            term = self.op("Shape", [value], (1,), np.dtype(np.int64), start=axis, end=axis + 1)
            term = term if factor == 1 else self.op("Mul", [term, self.ints([factor])], (1,))
            total = term if total is None else self.op("Add", [total, term], (1,))
        assert total is not None
        return self.op("Add", [total, self.ints([extent.constant])], (1,)) if extent.constant else total

    def reshape(self, value: Value, shape: Shape) -> Value:
        own = value.known_shape
        if own == shape:
            return value
        target: list[Extent] = [0 if isinstance(e, Dim) and own[k : k + 1] == (e,) else e for k, e in enumerate(shape)]
        if 0 in shape:
            return self.op("Reshape", [value, self.extents(shape)], shape, allowzero=1)
        if sum(isinstance(e, Dim) for e in shape) == 1:
            target = [-1 if isinstance(e, Dim) else e for e in shape]
        elif sum(isinstance(e, Dim) for e in target) == 1:
            target = [-1 if isinstance(e, Dim) else e for e in target]
        return self.op("Reshape", [value, self.extents(tuple(target))], shape)

    def batched(self, image: Value, rank: int) -> tuple[Value, Shape]:
        """A map of `rank` spatial axes with a batch in front, [B, C, *S], and the result's shape with one."""
        if len(image.known_shape) > rank + 1:
            return image, self.shape
        return self.reshape(image, (1, *image.known_shape)), (1, *self.shape)

    def expand(self, value: Value, shape: Shape) -> Value:
        own = value.known_shape
        if own == shape:
            return value
        aligned = (1,) * (len(shape) - len(own)) + own
        target = tuple(1 if isinstance(e, Dim) and e == o else e for e, o in zip(shape, aligned, strict=True))
        return self.op("Expand", [value, self.extents(target)], shape)

    def binary(self, op: str, a: Value, b: Value, dtype: np.dtype | None = None) -> Value:
        """A pointwise operator of two, broadcast."""
        try:
            shape = broadcast([a.known_shape, b.known_shape])
        except UnknownShape as error:
            raise Opaque(str(error)) from error
        return self.op(op, [a, b], shape, dtype)

    def unary(self, op: str, value: Value, dtype: np.dtype | None = None, **attributes: Any) -> Value:
        return self.op(op, [value], value.known_shape, dtype, **attributes)

    def reduce(self, op: str, value: Value, axes: Sequence[int], keep: bool) -> Value:
        """A reduction over these axes (not negative); over none, the value itself."""
        if not axes:
            return self.same(value)
        shape: list[Extent] = [1 if k in axes else e for k, e in enumerate(value.known_shape)]
        if not keep:
            shape = [e for k, e in enumerate(shape) if k not in axes]
        return self.op(op, [value, self.ints(list(axes))], tuple(shape), keepdims=int(keep))

    def sliced(self, value: Value, axis: int, start: Extent, end: Extent, step: int, extent: Extent) -> Value:
        """value[..., start:end:step, ...] with Python's meaning of the bounds; extent: what is left."""
        own = value.known_shape
        if extent == own[axis] and step > 0:
            return value
        shape = (*own[:axis], extent, *own[axis + 1 :])
        bounds = [self.extents((start,)), self.extents((end,)), self.ints([axis])]
        return self.op("Slice", [value, *bounds, *([self.ints([step])] if step != 1 else [])], shape)

    def taken(self, value: Value, positions: np.ndarray, axis: int) -> Value:
        """value[..., positions, ...]; positions int64 of any rank, in place of the axis."""
        own = value.known_shape
        shape = (*own[:axis], *positions.shape, *own[axis + 1 :])
        return self.op("Gather", [value, self.constant(np.asarray(positions, np.int64))], shape, axis=axis)

    def padded(self, value: Value, before: Sequence[int], after: Sequence[int], mode: str, fill: Value | None) -> Value:
        """One entry per axis; negative ones cut off."""
        if not any(before) and not any(after):
            return value
        shape = tuple(e + b + a for e, b, a in zip(value.known_shape, before, after, strict=True))
        inputs = [value, self.ints([*before, *after]), *([] if fill is None else [fill])]
        how: dict[str, Any] = {} if mode == "constant" else {"mode": mode}
        return self.op("Pad", inputs, shape, **how)


def as_symbol(extent: Dim) -> str | None:
    """The symbol that an extent is, and nothing besides."""
    alone = extent.constant == 0 and len(extent.terms) == 1 and extent.terms[0][1] == 1
    return extent.terms[0][0] if alone else None


def axes_of(dims: Any, rank: int) -> list[int]:
    """Axes as ATen's `int[1]? dim` says them: None and none are all; not negative, in order."""
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims)) if rank else []


def plain(extent: Any) -> int:
    """An argument that must be a number; Opaque where it is symbolic or none."""
    if isinstance(extent, bool) or not isinstance(extent, int):
        raise Opaque(f"an argument of {extent}")
    return extent


def every(numbers: Sequence[Any], rank: int) -> list[int]:
    """An attribute of the spatial axes: one number is that of every axis."""
    return [plain(n) for n in (numbers if len(numbers) == rank else list(numbers) * rank)]


def count(shape: Shape) -> Extent:
    """The number of elements; Opaque where it is no affine expression."""
    try:
        return product(shape)
    except NonAffine as error:
        raise Opaque(str(error)) from error
