"""Why branches that look as if they folded do not: the first thing that stands in the way.

Only what somebody would expect to fold is spoken of: sums of two summands that come from one value, one of them through
a convolution or a matrix product, and such products right behind one another or behind a BatchNorm. A residual
connection around an activation is none, nor is a sum over different inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attnrewrite.dims import is_static
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.localattention.site import Decline
from attnrewrite.ops import UNARY
from attnrewrite.reparam.forms import Form, combine, total
from attnrewrite.reparam.operator import Inexact, Linear, Operator, Scaling
from attnrewrite.reparam.plan import NOMINAL_EXTENT, Planner, emitted_cost, is_written
from attnrewrite.reparam.read import PRODUCTS, Reading

QUANTISATIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


@dataclass(frozen=True, eq=False)
class Path:
    """A summand, and the nodes that lead to it from a value before it, in order.

    activation: the last of them that is no linear operator, if there is one.
    """

    sign: int
    summand: Value
    base: Value
    nodes: tuple[Node, ...] = ()
    activation: Node | None = None

    @property
    def is_branch(self) -> bool:
        return any(n.op in PRODUCTS for n in self.nodes)


def obstacle(planner: Planner, root: Node) -> Decline | None:
    """What keeps the branches of a sum apart that has no plan; None where it has no branches."""
    terms, sums = planner.leaves(root)
    computed = [(sign, v) for sign, v in terms if not v.is_constant]
    by_base: dict[Value, list[Path]] = {}
    for sign, value in computed if len(computed) > 1 else []:
        for path in _paths(planner, sign, value):
            by_base.setdefault(path.base, []).append(path)
    for paths in by_base.values():
        activated = any(p.activation is not None for p in paths)
        apart = [p for p in paths if p.is_branch] if activated else paths
        if len(apart) > 1 and any(p.is_branch for p in paths):
            return _first(planner, root, paths, sums)
    return None


def obstacle_before(planner: Planner, node: Node) -> Decline | None:
    """What keeps a convolution or a matrix product apart from the one, or from the BatchNorm, that it alone reads."""
    source = node.input(0)
    before = None if source is None else source.producer
    if node.op not in PRODUCTS or before is None or source is None or planner.facts.only_user(source) is not node:
        return None
    own, inner = planner.forms.reading(node), planner.forms.reading(before)
    if before.op not in PRODUCTS | {"BatchNormalization"} or not isinstance(own, Reading) or inner is None:
        return None
    operator: Linear | Inexact
    if isinstance(inner, Inexact):
        operator = inner
    else:
        operator = combine(own.operator, Form(inner.source, inner.operator), source, node.output)
    if isinstance(operator, Inexact):
        return Decline(operator.reason, before.label)
    assert isinstance(operator, Operator)
    return _too_costly(planner, node, operator, frozenset((before, node)), 0)


def _paths(planner: Planner, sign: int, summand: Value) -> Iterator[Path]:
    """Back from a summand through linear operators, exact or not; through activations as long as those come last."""
    path = Path(sign, summand, summand)
    yield path
    while (node := path.base.producer) is not None and node.output is path.base:
        read = planner.forms.reading(node)
        activation = path.activation
        if isinstance(read, Reading):
            before: Value | None = read.source
        elif isinstance(read, Inexact) or (_is_activation(node) and not path.is_branch):
            before = node.input(0)
            activation = activation if isinstance(read, Inexact) else activation or node
        else:
            return
        if before is None or before.is_constant:
            return
        path = Path(sign, summand, before, (node, *path.nodes), activation)
        yield path


def _is_activation(node: Node) -> bool:
    others = [v for v in node.inputs[1:] if v is not None]
    return node.domain == STANDARD_DOMAIN and node.op in UNARY | QUANTISATIONS and all(v.is_constant for v in others)


def _first(planner: Planner, root: Node, paths: Sequence[Path], sums: frozenset[Node]) -> Decline | None:
    for path in paths:
        if path.activation is not None:
            return Decline(f"{path.activation.op} is no linear operator", path.activation.label)
    forms = []
    for path in paths:
        form = _along(planner, path)
        if isinstance(form, Decline):
            return form
        forms.append((path.sign, form))
    inside = sums.union(*(p.nodes for p in paths))
    for path in paths:
        for node in path.nodes:
            used = set(planner.facts.users(node.output))
            if not used <= inside or node.output in planner.facts.graph.outputs:
                return Decline("the result of a branch is used elsewhere as well", node.label)
    for path in paths:
        if path.summand.shape != root.output.shape:
            known = is_static(path.summand.shape) and is_static(root.output.shape)
            reason = "a branch does not have" if known else "a branch is not known to have"
            return Decline(f"{reason} the shape of the sum", (path.nodes or (root,))[-1].label)
    operator = total(forms)
    if isinstance(operator, Inexact):
        return Decline(operator.reason, root.label)
    if isinstance(operator, Scaling):
        return None
    if not is_written(operator):
        return Decline("the branches are cropped by more than any of them is padded", root.label)
    return _too_costly(planner, root, operator, frozenset().union(*(f.nodes for _, f in forms)), len(paths) - 1)


def _along(planner: Planner, path: Path) -> Form | Decline:
    """The operator of a path, or what keeps it from being one."""
    form = Form(path.base, Scaling())
    middle = path.base
    for node in path.nodes:
        read = planner.forms.reading(node)
        assert read is not None
        operator = read if isinstance(read, Inexact) else combine(read.operator, form, middle, node.output)
        if isinstance(operator, Inexact):
            return Decline(operator.reason, node.label)
        form, middle = Form(path.base, operator, form.nodes | {node}), node.output
    return form


def _too_costly(planner: Planner, root: Node, operator: Operator, nodes: frozenset[Node], sums: int) -> Decline | None:
    shape = root.output.known_shape
    before, after = planner.cost_of(nodes, sums, shape), emitted_cost(operator, shape)
    if after < before:
        return None
    counted = "" if is_static(shape[1:]) else f" (symbolic extents counted as {NOMINAL_EXTENT})"
    return Decline(
        f"one operator would take {after:,} multiplications for a sample, now it is {before:,}{counted}",
        root.label,
    )
