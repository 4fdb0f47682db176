"""What was computed in windows and is on the map now, read from the map by whoever still wants it in windows.

Operators that a site's operands pass through are written on the feature map. Where something beside the site reads one
of them too (a convolution of the values inside every window), it would be computed twice; it is moved instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from attnrewrite.dims import Dim, Shape
from attnrewrite.facts import Facts
from attnrewrite.graph import Graph, Value, ancestors
from attnrewrite.localattention.feature_map import FeatureMap, MapWriter
from attnrewrite.localattention.grid import count
from attnrewrite.localattention.tokens import Roles

WEIGHTED = frozenset({"MatMul", "Gemm", "Conv"})


@dataclass(frozen=True, eq=False)
class Twin:
    """A value's map with all of its features, row-major. pixels: int64, the pixel of the map that each token of the
    value is, row-major over its token axes.
    """

    map: FeatureMap
    roles: Roles
    pixels: np.ndarray


def share(facts: Facts, twins: Mapping[Value, Twin], made_by: str) -> None:
    """Let what is left of the graph read the twins of the values it reads, where that saves a linear layer."""
    graph = facts.graph
    graph.remove_dead()
    alive = set(graph.nodes)
    for value in sorted(twins, key=lambda v: facts.positions.get(v, -1), reverse=True):
        if value.producer not in alive:
            continue
        behind = (v.producer for v in ancestors([value]) if v in twins)
        if not any(node is not None and node.op in WEIGHTED for node in behind):
            continue
        twin = twins[value]
        if not _has_every_pixel(value.known_shape, twin):
            continue
        shape = twin.map.value.known_shape
        spatial = tuple(map(count, shape[2:] if twin.map.channels_first else shape[1:-1]))
        writer = MapWriter(facts, spatial, made_by)
        for read, features in _read_parts(graph, value, twin.roles).items():
            part = writer.features(twin.map, features, f"{read.name}_map")
            moved = _moved(writer, read, replace(twin, map=part))
            graph.nodes.extend(writer.nodes)
            writer.nodes.clear()
            graph.replace_uses(read, moved)
        graph.remove_dead()
        alive = set(graph.nodes)


def _read_parts(graph: Graph, value: Value, split: Roles) -> dict[Value, np.ndarray]:
    """What is read of a value, and which of its features that holds (int64): slices of its last axis where nothing else
    is read, else the value itself.
    """
    total = math.prod(count(value.known_shape[a]) for a in split.features)
    whole = {value: np.arange(total)}
    axis = len(value.known_shape) - 1
    if value in graph.outputs or split.features != (axis,):
        return whole
    parts = {}
    for user in graph.users().get(value, []):
        bounds = [user.constant(k) for k in range(1, 5)] if user.op == "Slice" and not user.domain else []
        if not bounds or any(b is None or b.size != 1 for b in bounds[:3]) or value in user.captures:
            return whole
        start, end, along, step = (1 if b is None else int(b.reshape(-1)[0]) for b in bounds)
        if along % (axis + 1) != axis:
            return whole
        parts[user.output] = np.arange(total)[start:end:step]
    return parts or whole


def _has_every_pixel(shape: Shape, twin: Twin) -> bool:
    """Whether the value's tokens are the pixels of the map, each once, with the batch in front."""
    if any(isinstance(e, Dim) and a != twin.roles.tokens[0] for a, e in enumerate(shape)):
        return False
    return np.array_equal(np.sort(twin.pixels), np.arange(_tokens(twin.map)))


def _tokens(map_: FeatureMap) -> int:
    """Tokens of a map, those of one element where its batch is symbolic."""
    return math.prod(map(count, map_.value.known_shape)) // map_.num_features


def _moved(writer: MapWriter, value: Value, twin: Twin) -> Value:
    shape, split, map_ = value.known_shape, twin.roles, twin.map
    batch = map_.value.known_shape[0]
    flat_shape = (batch // count(batch) if isinstance(batch, Dim) else 1, len(twin.pixels), map_.num_features)
    last = writer.laid_out(map_, channels_first=False)
    flat, index = writer.reshape(last, flat_shape), writer.constant(twin.pixels, f"{value.name}_order")
    picked = writer.emit("Gather", [flat, index], flat_shape, f"{value.name}_moved", axis=1)
    axes = [*split.tokens, *split.features]
    axes += [a for a in range(len(shape)) if a not in axes]
    listed = writer.reshape(picked, tuple(shape[a] for a in axes))
    return writer.reshape(writer.transpose(listed, np.argsort(axes).tolist()), shape)
