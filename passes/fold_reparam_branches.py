"""Linear operators of one input, summed or one after the other, as one operator.

Matches
    the end of branches A(x) + B(x) + ..., and of chains B(A(x)), that are linear in x and treat every position alike:
    convolutions of any kernel, groups, dilation and padding, x itself, BatchNorm, scales and biases per channel, means
    over windows, crops, Linear layers; nested as they may be, subtracted as well as added.
Rewrites to
    one Conv, Gemm or MatMul of x, and the sum with those summands that are not linear in x.
Exact when
    the operators have one input, one stride and one output shape, and wherever one of a chain reads zeros beyond the
    border, the one before it would have given zeros there (`attnrewrite/reparam/operator.py`). Weights are computed in
    float64 and rounded once.
Declines when
    an activation or a quantisation stands in a branch, strides differ, a branch value is used elsewhere, a weight is
    computed, the border would change, or the one operator takes more multiplications than the branches
    (`attnrewrite/reparam/plan.py` says what counts).
Source
    RepVGG, https://arxiv.org/abs/2101.03697; ACNet, https://arxiv.org/abs/1908.03930; DBB,
    https://arxiv.org/abs/2103.13425; MobileOne, https://arxiv.org/abs/2206.04040; UniRepLKNet,
    https://arxiv.org/abs/2311.15599; Slide-Transformer, https://arxiv.org/abs/2304.04237.
"""

from __future__ import annotations

from attnrewrite.dims import is_static
from attnrewrite.facts import Facts
from attnrewrite.graph import Node
from attnrewrite.localattention.site import Decline, Reparam
from attnrewrite.pipeline import Declined, Pass
from attnrewrite.reparam.emit import Writer, into
from attnrewrite.reparam.obstacles import obstacle, obstacle_before
from attnrewrite.reparam.plan import Plan, Planner
from attnrewrite.reparam.read import PRODUCTS, summands

NAME = "fold-reparam-branches"


def match_branches(facts: Facts, node: Node) -> Plan | Decline | None:
    """The fold that ends at this node, unless it is part of one that ends later."""
    planner = facts.derived(Planner)
    if planner.outermost(node) is not node:
        return None
    plan = planner.plan(node)
    if plan is None and summands(node):
        return obstacle(planner, node)
    if planner.is_absorbed(node):
        return None
    return obstacle_before(planner, node) if plan is None else plan


def rewrite_branches(facts: Facts, plan: Plan) -> None:
    """Put the one operator where the branches end."""
    if not all(w.are_finite for w in plan.weights):
        dtype = plan.root.output.dtype
        raise Declined(Decline(f"the folded weights are beyond the range of {dtype}", plan.root.label))
    writer = Writer(facts.graph, plan, NAME)
    result = writer.written()
    facts.graph.insert_before(plan.root, writer.nodes)
    facts.graph.replace_uses(plan.root.output, result)


def record_branches(node: Node, found: Plan | Decline) -> Reparam:
    """The report's row."""
    if isinstance(found, Decline):
        single = node.op if node.op in PRODUCTS else "Conv"
        return Reparam(max(len(summands(node)), 1), single, "leave", found.node, found.reason)
    weights = found.weights
    is_counted = is_static(found.root.output.known_shape[1:])
    return Reparam(
        found.branches,
        into(found),
        "rewrite",
        node.label,
        "linear in one input and treating every position alike: their kernels add and combine",
        found.parameters_before,
        found.parameters_after,
        max(w.error for w in weights),
        found.before if is_counted else None,
        found.after if is_counted else None,
        max(w.error_in_ulp for w in weights),
    )


fold_reparam_branches = Pass(NAME, match_branches, rewrite_branches, record_branches)
