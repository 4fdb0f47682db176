"""Running the pipeline in tests, and what must not be left in a rewritten graph."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import onnx

from attnrewrite.dims import Dim
from attnrewrite.frontend.onnx import read, to_model
from attnrewrite.functions import is_local_op, spec_of
from attnrewrite.graph import Graph, Node
from attnrewrite.localattention.geometry import WindowGeometry
from attnrewrite.pipeline import Outcome, select


def optimize(model: onnx.ModelProto | Path, passes: list[str] | None = None) -> Outcome:
    """The default pipeline, or these passes, on a model."""
    return select(passes).run(read(model))


def local_ops(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if is_local_op(node)]


def left_over(graph: Graph, batch: str = "batch") -> list[str]:
    """Movement of sites that a rewritten graph still holds, one sentence each; [] for a clean one.

    Judged by what the nodes do: nothing that a pass wrote may move tokens (only channels may be picked, and the two
    layouts exchanged), nor read or be read by a tensor of more than five axes; no roll, and no partition or merge by
    the usual transpose, may remain anywhere; and no tensor may hold the windows or pixels of a site in its batch axis
    (told where the batch is symbolic; in a graph without ops, any multiple of it counts).
    """
    counts = {_rows(node) for node in local_ops(graph)}
    found = [f"{node.label} moves tokens ({node.op})" for node in graph.nodes if node.made_by and _moves_tokens(node)]
    users = graph.users()
    for node in (n for n in graph.nodes if n.made_by):
        beside = [*node.reads(), *(o for user in users.get(node.output, []) for o in user.outputs)]
        found += [f"{v.name} beside {node.label} has {v.rank} axes" for v in beside if (v.rank or 0) > 5]
    for node in graph.nodes:
        if _is_roll(node):
            found.append(f"{node.label} rolls")
        if node.op == "Transpose" and node.attributes.get("perm") == [0, 1, 3, 2, 4, 5]:
            found.append(f"{node.label} partitions or merges")
        for output in node.outputs:
            for extent in (output.shape or ())[: (output.rank or 0) > 1]:  # a flat view is the exporters' as_strided
                if (
                    isinstance(extent, Dim)
                    and extent != Dim(((batch, 1),))
                    and (not counts or _factor(extent) in counts)
                ):
                    found.append(f"{node.label} has {extent} rows")
    return found


def _rows(node: Node) -> int:
    """Windows, or pixels with a neighbourhood, of an op."""
    geometry = spec_of(node).geometry
    return geometry.num_windows if isinstance(geometry, WindowGeometry) else math.prod(geometry.feature_size)


def _factor(extent: Dim) -> int:
    return extent.terms[0][1]


def _is_roll(node: Node) -> bool:
    """Concat of two slices that together are the whole of one tensor."""
    sources = [v.producer for v in node.inputs if v is not None]
    return (
        node.op == "Concat"
        and len(sources) == 2
        and all(s is not None and s.op in ("Slice", "Split") for s in sources)
        and len({s.inputs[0] for s in sources if s is not None}) == 1
        and sources[0] is not None
        and sources[0].required(0).shape == node.output.shape
    )


def _moves_tokens(node: Node) -> bool:
    """Whether a node that a pass wrote changes which token stands where."""
    if is_local_op(node):
        return False
    data, out = node.inputs[0], node.output
    assert data is not None
    assert data.shape is not None
    assert out.shape is not None
    channel_axes = {1, len(data.shape) - 1}
    match node.op:
        case "Slice" | "Gather":
            kept = [(a, b) for k, (a, b) in enumerate(zip(data.shape, out.shape, strict=True)) if k not in channel_axes]
            changed = sum(a != b for a, b in zip(data.shape, out.shape, strict=True))
            return any(a != b for a, b in kept) or changed > 1
        case "Transpose":  # channels-last to channels-first and back; heads apart from channels
            rank = len(data.shape)
            return list(node.attributes["perm"]) not in (
                [0, rank - 1, *range(1, rank - 1)],
                [0, *range(2, rank), 1],
            )
        case "Concat":  # the channels of a channels-last map come from several tensors
            return node.attributes["axis"] % len(data.shape) != len(data.shape) - 1
        case "Reshape":
            first = (data.shape[0], out.shape[0])
            return len(out.shape) > 5 or (any(isinstance(e, Dim) for e in first) and first[0] != first[1])
    return node.op in ("Pad", "Split", "Expand", "Tile", "SpaceToDepth", "DepthToSpace", "Where")


def sites(outcome: Outcome) -> Counter[tuple[str, str]]:
    """How many sites of each (kind, verdict)."""
    return Counter((site.kind, site.verdict) for site in outcome.sites)


def ranks(model: onnx.ModelProto) -> int:
    """The largest rank of a tensor, by ONNX's own strict shape inference."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*inferred.value_info, *inferred.input, *inferred.output]
    return max(len(v.type.tensor_type.shape.dim) for v in values)


def written(outcome: Outcome, *, inline: bool = False) -> onnx.ModelProto:
    return to_model(outcome.graph, inline=inline)
