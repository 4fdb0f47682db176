"""A pass of one's own: Slice(Slice(x)) along different axes becomes one Slice of x.

python examples/custom_pass.py slide_swin.onnx rewritten.onnx
"""

import sys

import numpy as np

from attnrewrite import Pass, Pipeline, passes
from attnrewrite.facts import Facts
from attnrewrite.frontend import onnx as frontend
from attnrewrite.graph import Node, Value


def match_slices(facts: Facts, node: Node) -> tuple[Node, list[np.ndarray]] | None:
    """The outer Slice, and the starts, ends, axes and steps of both; None for any other node. Never edits."""
    inner = node.required(0).producer if node.op == "Slice" else None
    pairs = [(inner.constant(i), node.constant(i)) for i in range(1, 5)] if inner and inner.op == "Slice" else []
    if not pairs or any(a is None or b is None for a, b in pairs):
        return None
    starts, ends, axes, steps = (np.concatenate(pair) for pair in pairs)
    return (node, [starts, ends, axes, steps]) if min(axes) >= 0 and len(set(axes)) == len(axes) else None


def rewrite_slices(facts: Facts, match: tuple[Node, list[np.ndarray]]) -> None:
    """Never searches: the match says it all. The pipeline drops the inner Slice once nobody reads it any more."""
    outer, bounds = match
    values = [Value(facts.graph.fresh_name("bounds"), b.shape, b.dtype, b) for b in bounds]
    outer.inputs[:] = [outer.required(0).producer.required(0), *values]


merge_slices = Pass("merge-slices", match_slices, rewrite_slices)

if __name__ == "__main__":
    outcome = Pipeline([*passes.ALL, merge_slices]).run(frontend.read(sys.argv[1]))
    frontend.write(outcome.graph, sys.argv[2])
    print(f"{outcome.rewrites[merge_slices.name]} pairs merged, {outcome.nodes_after} nodes left")
