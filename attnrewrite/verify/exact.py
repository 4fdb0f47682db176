"""Two model files, compared exactly: each local attention op of the rewritten one against a site of the original.

Sites and ops are met in topological order. An op proves a site where the integer maps pulled back through its emitted
body equal those of the site (`localattention/proof.py`); an op that proves none fails, with the first difference. Where
the original has an op already, the same op stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from attnrewrite.facts import Facts
from attnrewrite.functions import is_local_op, operands_of, spec_of
from attnrewrite.functions.spec import SlideAttention
from attnrewrite.graph import Graph, Node
from attnrewrite.localattention.aggregation import Aggregation
from attnrewrite.localattention.aggregation_proof import prove_aggregation
from attnrewrite.localattention.maps import SiteMaps
from attnrewrite.localattention.neighborhoods import NeighborhoodMatch
from attnrewrite.localattention.proof import NotProved, prove
from attnrewrite.localattention.windows import WindowMatch
from attnrewrite.pipeline import Pass, select


@dataclass(frozen=True)
class Check:
    """One op of the rewritten model: the softmax (or sum) it stands for, or why it stands for none."""

    node: str
    site: str
    passed: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {"node": self.node, "site": self.site, "passed": self.passed, "detail": self.detail}


def verify_exact(original: Graph, rewritten: Graph) -> list[Check]:
    """One check per local attention op of the rewritten graph.

    Prepares the original in place, as the passes before the attentions' do.
    """
    pending = _sites(original)
    checks = []
    for node in rewritten.nodes:
        if not is_local_op(node):
            continue
        failure = "the original has no such site"
        for position, (anchor, site) in enumerate(pending):
            try:
                _prove(site, node, rewritten.opset)
            except NotProved as difference:
                failure = f"{anchor.label}: {difference}" if position == 0 else failure
                continue
            why = "the original has this op" if isinstance(site, Node) else "the integer maps are equal"
            checks.append(Check(node.label, anchor.label, True, why))
            del pending[: position + 1]
            break
        else:
            checks.append(Check(node.label, pending[0][0].label if pending else "", False, failure))
    return checks


_Site = SiteMaps | Aggregation | Node


def _prove(site: _Site, node: Node, opset: int) -> None:
    """Raise NotProved unless the op stands for the site."""
    spec = spec_of(node)
    if isinstance(site, Node):
        if spec != spec_of(site) or _shapes(node) != _shapes(site):
            raise NotProved("the original has another op, or one of other operands")
        return
    predicted = isinstance(spec, SlideAttention) and bool(spec.predicted)
    if predicted != isinstance(site, Aggregation):
        raise NotProved("one of the two predicts its weights, the other computes them from queries and keys")
    if isinstance(site, Aggregation):
        prove_aggregation(site, node, opset)
    else:
        prove(site, node, opset)


def _shapes(node: Node) -> dict[str, object]:
    return {name: value.shape for name, value in operands_of(node).items()}


def _sites(graph: Graph) -> list[tuple[Node, _Site]]:
    """The local attention sites of a graph, in order, with what they are proved against."""
    passes = {p.name: p for p in select().passes}
    prepare = ["fold-reparam-branches", "move-folds", "move-pools", "part-joined-tokens"]
    select([*prepare, "move-partitions", "move-merges"]).run(graph)
    facts = Facts(graph)
    found: list[tuple[Node, _Site]] = []
    for node in graph.nodes:
        if is_local_op(node):
            found.append((node, node))
            continue
        for name in ("fuse-window-attention", "unfold-to-slide-attention", "fuse-outlook-attention"):
            match = _match(passes[name], facts, node)
            if isinstance(match, Aggregation):
                found.append((node, match))
                break
            if match is not None:
                found.append((node, replace(match.maps, keys=(match.key,), values=(match.value,))))
                break
    return found


def _match(pass_: Pass, facts: Facts, node: Node) -> WindowMatch | NeighborhoodMatch | Aggregation | None:
    found = pass_.match(facts, node)
    return found if isinstance(found, WindowMatch | NeighborhoodMatch | Aggregation) else None
