"""The thin graph view both frontends fill: values, nodes and a graph that prints itself as readable text.

Operators carry their ONNX names (opset 13 and later), whatever the frontend; `ops.py` classes them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from attnrewrite.dims import Shape, is_static

STANDARD_DOMAIN = ""


class UnknownShape(ValueError):
    """A shape that is asked for cannot be told; the message says why."""


class Value:
    """A tensor of the graph. Identity is the object; names are for people and files.

    shape: extents, symbolic where the model's are, or None where unknown. dtype: NumPy dtype, or None.
    A constant's elements are loaded on first use, so that weights nobody reads stay where they are.
    """

    def __init__(
        self,
        name: str,
        shape: Shape | None = None,
        dtype: np.dtype | None = None,
        constant: np.ndarray | Callable[[], np.ndarray] | None = None,
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.producer: Node | None = None
        self.source: Any = None  # the frontend's own tensor, if it has one
        self._constant = constant

    @property
    def is_constant(self) -> bool:
        return self._constant is not None

    @property
    def constant(self) -> np.ndarray:
        """The elements of a constant, as an array of `shape` and `dtype`."""
        if self._constant is None:
            raise ValueError(f"{self.name} is not a constant")
        if callable(self._constant):
            return self._constant()
        return self._constant

    def set_constant(self, elements: np.ndarray) -> None:
        """The value turned out to be constant: from now on nobody computes it."""
        self._constant = elements
        self.producer = None

    @property
    def known_shape(self) -> Shape:
        """The shape of a value whose shape must be known by now; UnknownShape if it is not."""
        if self.shape is None:
            raise UnknownShape(f"the shape of {self.name} is unknown")
        return self.shape

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of a statically shaped value."""
        assert self.shape is not None and self.dtype is not None and is_static(self.shape)
        return int(np.prod(np.array(self.shape, np.int64))) * self.dtype.itemsize

    def __repr__(self) -> str:
        shape = "?" if self.shape is None else "[" + ", ".join(map(str, self.shape)) + "]"
        return f"{self.name}: {self.dtype}{shape}"


class Node:
    """One operator application. A missing optional input is None. `source` is the frontend's own node, if it has
    one.
    """

    def __init__(
        self,
        op: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[Value],
        attributes: dict[str, Any] | None = None,
        name: str = "",
        domain: str = STANDARD_DOMAIN,
        source: Any = None,
        captures: Sequence[Value] = (),
    ) -> None:
        self.op = op
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.attributes = attributes or {}
        self.name = name
        self.domain = domain
        self.source = source
        self.captures = list(captures)  # outer values read by the node's subgraphs (If, Loop, Scan)
        self.made_by: str | None = None
        for output in self.outputs:
            output.producer = self

    @property
    def output(self) -> Value:
        return self.outputs[0]

    def input(self, index: int) -> Value | None:
        """The input at an index; None where it is missing."""
        return self.inputs[index] if index < len(self.inputs) else None

    def required(self, index: int) -> Value:
        value = self.input(index)
        if value is None:
            raise ValueError(f"{self.label} has no input {index}")
        return value

    def constant(self, index: int) -> np.ndarray | None:
        """The elements of a constant input; None where it is missing or computed."""
        value = self.input(index)
        return value.constant if value is not None and value.is_constant else None

    def reads(self) -> Iterator[Value]:
        """Every value the node reads, those of its subgraphs included."""
        yield from (v for v in self.inputs if v is not None)
        yield from self.captures

    @property
    def label(self) -> str:
        """What a person is told: the node's own name, or its operator and first output."""
        return self.name or f"{self.op} -> {self.outputs[0].name if self.outputs else '()'}"

    def __repr__(self) -> str:
        return f"Node({self.label})"


class Graph:
    """Nodes in topological order between inputs and outputs.

    source: what the writer needs of the model as read (opset, metadata); only the frontend looks inside.
    """

    def __init__(
        self, inputs: list[Value], outputs: list[Value], nodes: list[Node], opset: int, name: str = "graph"
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.nodes = nodes
        self.opset = opset
        self.name = name
        self.source: Any = None
        self._fresh = itertools.count()
        self._names: set[str] | None = None

    def users(self) -> dict[Value, list[Node]]:
        """Every value -> the nodes that read it, once per node."""
        table: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.reads()):
                table.setdefault(value, []).append(node)
        return table

    def values(self) -> Iterator[Value]:
        """Every value once: inputs, constants, results."""
        seen: set[int] = set()
        for value in itertools.chain(
            self.inputs, *((itertools.chain(n.reads(), n.outputs)) for n in self.nodes), self.outputs
        ):
            if id(value) not in seen:
                seen.add(id(value))
                yield value

    def fresh_name(self, stem: str) -> str:
        """A name no value of the graph has."""
        if self._names is None:
            self._names = {v.name for v in self.values()}
        name = stem
        while name in self._names:
            name = f"{stem}_{next(self._fresh)}"
        self._names.add(name)
        return name

    def replace_uses(self, old: Value, new: Value) -> None:
        """Let every reader of `old` read `new`.

        Graph outputs and values that subgraphs capture are known by name, so there `new` takes the name over.
        """
        named = old in self.outputs
        for node in self.nodes:
            node.inputs = [new if v is old else v for v in node.inputs]
            if old in node.captures:
                named = True
                node.captures = [new if v is old else v for v in node.captures]
        if named:
            old.name, new.name = new.name, old.name
            self.outputs = [new if v is old else v for v in self.outputs]

    def insert_before(self, anchor: Node, nodes: Sequence[Node]) -> None:
        at = self.nodes.index(anchor)
        self.nodes[at:at] = nodes

    def remove_dead(self) -> int:
        """Drop nodes whose outputs nobody reads; returns how many went."""
        live = set(map(id, self.outputs))
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if any(id(o) in live for o in node.outputs):
                kept.append(node)
                live.update(id(v) for v in node.reads())
        removed = len(self.nodes) - len(kept)
        self.nodes = kept[::-1]
        return removed

    def sort(self) -> None:
        """Restore topological order after edits, keeping the present order where it may stay."""
        done: set[int] = set()
        ordered: list[Node] = []
        for root in self.nodes:
            stack = [root]
            while stack:
                node = stack[-1]
                if id(node) in done:
                    stack.pop()
                    continue
                waiting = [v.producer for v in node.reads() if v.producer is not None and id(v.producer) not in done]
                if waiting:
                    stack.extend(waiting)
                    continue
                done.add(id(node))
                ordered.append(node)
                stack.pop()
        self.nodes = ordered

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        """The graph as Python text: one call per node, shapes and provenance in comments."""
        identifiers: dict[int, str] = {}
        taken: set[str] = set()

        def identifier(value: Value) -> str:
            if id(value) not in identifiers:
                stem = "".join(c if c.isalnum() else "_" for c in value.name).strip("_") or "v"
                stem = f"v_{stem}" if stem[0].isdigit() else stem
                name = next(
                    n for n in itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(1))) if n not in taken
                )
                taken.add(name)
                identifiers[id(value)] = name
            return identifiers[id(value)]

        def operand(value: Value | None) -> str:
            if value is None:
                return "None"
            if value.is_constant and value.shape is not None and int(np.prod(np.array(value.shape, np.int64))) <= 8:
                return f"{value.constant.tolist()}"
            return identifier(value)

        yield f"def {self.name}({', '.join(identifier(v) for v in self.inputs)}):  # opset {self.opset}"
        for node in self.nodes:
            arguments = [operand(v) for v in node.inputs]
            arguments += [f"{k}={_short(v)}" for k, v in node.attributes.items()]
            call = f"{node.domain + '.' if node.domain else ''}{node.op}({', '.join(arguments)})"
            comment = "; ".join(str(o).split(": ", 1)[1] for o in node.outputs)
            made = f"  made by {node.made_by}" if node.made_by else ""
            yield f"    {', '.join(identifier(o) for o in node.outputs)} = {call}  # {comment}{made}"
        yield f"    return {', '.join(identifier(v) for v in self.outputs)}"


def ancestors(values: Iterable[Value], stop: Callable[[Value], bool] | None = None) -> set[Value]:
    """What these values are computed from, themselves included; neither what `stop` is true of nor what lies before."""
    found: set[Value] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if value not in found and not (stop is not None and stop(value)):
            found.add(value)
            pending += value.producer.reads() if value.producer is not None else ()
    return found


def _short(attribute: Any) -> str:
    text = repr(attribute)
    return text if len(text) <= 60 else text[:57] + "..."
