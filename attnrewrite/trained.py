"""Rewriting a model that is still being trained: no parameter becomes a constant.

The passes work on constants. So the model is read several times with different random numbers in place of its
parameters, and every reading is rewritten. What differs between the rewritten graphs depends on parameters, and tells
by its numbers which: an element that equals, in every reading, the same element of a live tensor (a parameter, or what
the model computes from parameters alone) is gathered from there at every call. A rewrite with a constant that is not
such a gather is not made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from attnrewrite.errors import UserError
from attnrewrite.facts import Facts
from attnrewrite.graph import Graph, Node, Value
from attnrewrite.localattention.site import Decline
from attnrewrite.pipeline import Outcome, Pass, Pipeline

REASON = "its {} would be computed from parameters that are still being trained"
UNLIKE = "{} depends on the numbers that the parameters hold"
# Elements of a constant that are looked for in every live value, before all of them are.
SAMPLES = 64
Anchor = tuple[str, str]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Gathered:
    """A constant of the rewritten graph in terms of live values: its elements at `index` of the values, each flattened,
    one after the other.

    index: int64, of the constant's shape; None where the constant is the one value itself.
    """

    values: tuple[Value, ...]
    index: np.ndarray | None


@dataclass
class _Watch:
    """Which anchor (pass and node) made or edited which node, and which anchors are to be left, with the reason."""

    left: dict[Anchor, str] = field(default_factory=dict)
    made: dict[Node, Anchor] = field(default_factory=dict)

    def over(self, pass_: Pass) -> Pass:
        anchor: list[Anchor] = []

        def match(facts: Facts, node: Node) -> Any:
            found = pass_.match(facts, node)
            anchor[:] = [(pass_.name, node.label)]
            if found is None or isinstance(found, Decline) or anchor[0] not in self.left:
                return found
            return Decline(self.left[anchor[0]], node.label)

        def rewrite(facts: Facts, found: Any) -> None:
            before = {node: list(node.inputs) for node in facts.graph.nodes}
            pass_.rewrite(facts, found)
            facts.graph.sort()  # which takes new nodes in
            self.made.update((n, anchor[0]) for n in facts.graph.nodes if before.get(n) != n.inputs)

        return replace(pass_, match=match, rewrite=rewrite)


def rewrite_trained(
    read: Callable[[Arrays], Graph],
    parameters: Arrays,
    live: Callable[[Graph], Sequence[Value]],
    pipeline: Pipeline,
    on_pass: Callable[[str, Graph], None] | None = None,
) -> tuple[Outcome, dict[Value, Gathered]]:
    """Run the pipeline on the graph that `read` gives for the parameters' contents; says which constants are live.

    parameters: arrays by name, of which dtype and size matter. live: values of a graph just read that the model
    computes anew at every call. Raises UserError where readings differ in more than numbers.
    """
    probes = [_drawn(parameters, 0)]
    watch = _Watch()
    while True:
        watch.made.clear()
        outcomes: list[Outcome] = []
        sources: list[list[Value]] = []
        while not sources or len(sources) < _readings_needed(sources[0]):
            if len(sources) == len(probes):
                probes.append(_drawn(parameters, len(probes)))
            graph = read(probes[len(sources)])
            sources.append(list(live(graph)))
            outcomes.append(Pipeline([watch.over(p) for p in pipeline.passes]).run(graph))
        gathered, unknown = _gathers([o.graph for o in outcomes], sources)
        if not unknown:
            if on_pass is not None:  # every reading goes the same way: one of them is shown
                Pipeline([watch.over(p) for p in pipeline.passes]).run(read(probes[0]), on_pass)
            return outcomes[0], gathered
        before = set(watch.left)
        for node, value in unknown:
            anchor = watch.made.get(node)
            if anchor is None or anchor in before:
                raise UserError(f"{value.name} depends on parameters in a way that is not known")
            watch.left[anchor] = REASON.format(value.name)


def _readings_needed(live: Sequence[Value]) -> int:
    """More of them where numbers have few bits, so that no two elements are the same in all."""
    dtypes = {v.dtype for v in live if v.dtype is not None and _has_fractions(v.dtype)}
    return 2 if all(dtype.itemsize >= 4 for dtype in dtypes) else 6


def _drawn(parameters: Arrays, seed: int) -> dict[str, np.ndarray]:
    """Random numbers, no two alike: near the parameters' own at first, then far from them, so that what is clamped or
    saturated in one reading is not in all.
    """
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, array in parameters.items():
        own = array.astype(np.float64)
        spread = max(float(np.std(own)), 0.05) if array.size else 0.0
        noise = rng.uniform(-1, 1, array.shape)
        drawn[name] = (own + noise * spread if seed == 0 else noise).astype(array.dtype)
    return drawn


def _gathers(
    graphs: Sequence[Graph], sources: Sequence[Sequence[Value]]
) -> tuple[dict[Value, Gathered], list[tuple[Node, Value]]]:
    """The constants of the first graph that differ from graph to graph: as gathers, or with a node that reads them."""
    columns = list(zip(*sources, strict=True))
    own = {values[0] for values in columns}
    gathered: dict[Value, Gathered] = {}
    wanted: dict[Value, _Wanted] = {}
    readers: dict[Value, Node] = {}
    for node, values in _read_constants(graphs):
        value = values[0]
        if value in own:
            gathered[value] = Gathered((value,), None)
        elif value not in readers and (keys := _keys(values)) is not None:
            wanted[value], readers[value] = _Wanted(keys), node
    for values in reversed(columns):  # what is computed last is nearest
        missing = [w for w in wanted.values() if not w.found]
        if not missing:
            break
        keys = _keys(values)
        if keys is not None and _any_of(keys, np.concatenate([w.sample() for w in missing])):
            order = np.argsort(keys, kind="stable")
            for want in missing:
                want.look(values[0], keys, order)
    gathered |= {value: want.gathered(value) for value, want in wanted.items() if want.found}
    return gathered, [(readers[value], value) for value, want in wanted.items() if not want.found]


class _Wanted:
    """The elements of a constant by their keys, and where each was found so far."""

    def __init__(self, keys: np.ndarray) -> None:
        self._keys = keys
        self._at = np.full(len(keys), -1)
        self._sources: list[Value] = []
        self._size = 0

    @property
    def found(self) -> bool:
        return bool((self._at >= 0).all())

    def sample(self) -> np.ndarray:
        """A few keys from all over what is missing."""
        missing = self._keys[self._at < 0]
        return missing[:: max(1, len(missing) // SAMPLES)]

    def look(self, source: Value, keys: np.ndarray, order: np.ndarray) -> None:
        """Take what is missing from a live value; order: of its sorted keys."""
        if len(keys) == len(self._keys) and (keys == self._keys).all():
            self._sources, self._size, self._at = [source], len(keys), np.arange(len(keys))
            return
        known, own = keys[order], self._keys
        at = np.minimum(np.searchsorted(known, own), len(known) - 1)
        new = (known[at] == own) & (self._at < 0)
        if new.any():
            self._at = np.where(new, order[at] + self._size, self._at)
            self._sources.append(source)
            self._size += len(keys)

    def gathered(self, value: Value) -> Gathered:
        same = len(self._sources) == 1 and self._sources[0].shape == value.shape
        if same and np.array_equal(self._at, np.arange(len(self._at))):
            return Gathered(tuple(self._sources), None)
        return Gathered(tuple(self._sources), self._at.reshape(np.shape(value.constant)))


def _any_of(keys: np.ndarray, firsts: np.ndarray) -> bool:
    """Whether one of a few keys is among many."""
    few = np.unique(firsts)
    return bool((few[np.minimum(np.searchsorted(few, keys), len(few) - 1)] == keys).any())


def _read_constants(graphs: Sequence[Graph]) -> Iterator[tuple[Node, tuple[Value, ...]]]:
    """Constants that nodes of the graphs read, side by side. Raises UserError where the graphs are not alike."""
    if len({len(g.nodes) for g in graphs}) > 1:
        raise UserError(UNLIKE.format("the rewrite"))
    for nodes in zip(*(g.nodes for g in graphs), strict=True):
        inputs = [list(n.reads()) for n in nodes]
        kinds = {(n.op, n.domain, len(read), repr(n.attributes)) for n, read in zip(nodes, inputs, strict=True)}
        if len(kinds) > 1:
            raise UserError(UNLIKE.format(f"the rewrite at {nodes[0].label}"))
        for values in zip(*inputs, strict=True):
            if len({v.is_constant for v in values}) > 1 or len({v.shape for v in values}) > 1:
                raise UserError(UNLIKE.format(f"the rewrite at {nodes[0].label}"))
            if values[0].is_constant:
                yield nodes[0], values


def _keys(values: Sequence[Value]) -> np.ndarray | None:
    """uint64 [elements], one number for what an element holds in all readings; None where all readings agree, or hold
    no floating-point numbers (indices, shapes and masks).

    Different numbers have different keys but for a chance of 2^-64 for a pair of elements.
    """
    arrays = [np.asarray(v.constant) for v in values]
    if not _has_fractions(arrays[0].dtype):
        return None
    if not arrays[0].size or all(np.array_equal(a, arrays[0], equal_nan=True) for a in arrays[1:]):
        return None
    keys = np.zeros(arrays[0].size, np.uint64)
    for array in arrays:
        bits = (array.astype(np.float64).reshape(-1) + 0.0).view(np.uint64)  # -0.0 + 0.0 is 0.0
        keys = _mixed(keys * np.uint64(0x9E3779B97F4A7C15) + bits)
    return keys


def _has_fractions(dtype: np.dtype) -> bool:
    """Floating point; bfloat16 is of a kind that NumPy does not know."""
    return np.issubdtype(dtype, np.inexact) or dtype.kind == "V"


def _mixed(bits: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers that spreads every bit over all (the finaliser of SplitMix64)."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
