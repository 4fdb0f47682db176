"""A pass of one's own, run after the built-in ones: Reshape(Reshape(x, a), b) becomes Reshape(x, b).

python examples/custom_pass.py slide_swin.onnx rewritten.onnx
"""

import sys

import attnrewrite
from attnrewrite import passes
from attnrewrite.facts import Facts
from attnrewrite.frontend import onnx as frontend
from attnrewrite.graph import Node


def match_reshape_pair(facts: Facts, node: Node) -> tuple[Node, Node] | None:
    """The inner and outer Reshape, where only the outer reads the inner; None for any other node. Never edits."""
    inner = node.required(0).producer if node.op == "Reshape" else None
    if inner is None or inner.op != "Reshape" or facts.only_user(inner.output) is not node:
        return None
    shape = node.constant(1)
    # A 0 stands for the extent of the reshaped tensor itself, so it would mean another number afterwards.
    return None if shape is None or 0 in shape else (inner, node)


def rewrite_reshape_pair(facts: Facts, match: tuple[Node, Node]) -> None:
    """Never searches: the match says it all. The pipeline drops the inner Reshape, which nobody reads any more."""
    inner, outer = match
    outer.inputs[0] = inner.required(0)


merge_reshapes = attnrewrite.Pass("merge-reshapes", match_reshape_pair, rewrite_reshape_pair)

if __name__ == "__main__":
    outcome = attnrewrite.Pipeline([*passes.ALL, merge_reshapes]).run(frontend.read(sys.argv[1]))
    frontend.write(outcome.graph, sys.argv[2])
    print(f"{outcome.rewrites[merge_reshapes.name]} pairs merged, {outcome.nodes_after} nodes left")
