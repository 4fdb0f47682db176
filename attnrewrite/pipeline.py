"""Passes as data, and the pipeline that runs them in order.

A pass is a value: a name, a `match` that never edits, a `rewrite` that never searches, and what it says about a match.
The pipeline owns everything else: walking the graph, keeping facts fresh, checking that the graph stays valid, counting
and timing. A rewrite proves itself before it edits (the local attention passes do so in `localattention/proof.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from attnrewrite.dims import SymbolicExtent
from attnrewrite.errors import PassError, UserError
from attnrewrite.facts import Facts
from attnrewrite.frontend.joins import add_behind_concat
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, UnknownShape
from attnrewrite.indexing.map import IndexingError
from attnrewrite.localattention.linears import einsum_to_matmul
from attnrewrite.localattention.site import Decline, Reparam, Site
from attnrewrite.localattention.softmax import join_softmax

Record = Site | Reparam


@dataclass(frozen=True)
class Pass:
    """One rewriting idea.

    match: (facts, node) -> a match, a Decline, or None where the node is no anchor of this pass. Never edits.
    rewrite: (facts, match) -> edits facts.graph; never searches. May raise `Declined` before it has edited anything.
    record: what the report says of a match or a decline; None says nothing.
    after: names of passes that must run before this one, where both run.
    """

    name: str
    match: Callable[[Facts, Node], Any]
    rewrite: Callable[[Facts, Any], None]
    record: Callable[[Node, Any], Record | None] = lambda node, found: None
    after: tuple[str, ...] = ()


class Declined(Exception):
    """A rewrite found, before editing anything, that it cannot keep what the match promised."""

    def __init__(self, decline: Decline) -> None:
        super().__init__(decline.reason)
        self.decline = decline


@dataclass
class Outcome:
    """What a pipeline did. seconds, rewrites: per pass. modified: whether any pass edited the graph."""

    graph: Graph
    sites: tuple[Site, ...] = ()
    reparam: tuple[Reparam, ...] = ()
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    rewrites: dict[str, int] = field(default_factory=dict)

    @property
    def modified(self) -> bool:
        return any(self.rewrites.values())


class Pipeline:
    """Passes in order. Raises UserError where a pass would run before one that it must follow."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = tuple(passes)
        names = [p.name for p in self.passes]
        for position, pass_ in enumerate(self.passes):
            late = [a for a in pass_.after if a in names[position + 1 :]]
            if late:
                raise UserError(f"the pass {pass_.name} must run after {late[0]}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.passes)

    def run(self, graph: Graph, on_pass: Callable[[str, Graph], None] | None = None) -> Outcome:
        """Run all passes on the graph, in place. on_pass(name, graph) is called after each."""
        outcome = Outcome(graph, nodes_before=len(graph.nodes))
        einsum_to_matmul(graph)
        join_softmax(graph)
        add_behind_concat(graph)
        softmaxes = [n for n in graph.nodes if n.op == "Softmax" and n.domain == STANDARD_DOMAIN]
        said: dict[Node, list[Record]] = {n: [] for n in softmaxes}
        order = list(graph.nodes)
        reparam: list[Reparam] = []
        for position, pass_ in enumerate(self.passes):
            start = time.perf_counter()
            outcome.rewrites[pass_.name] = self._run_pass(position, pass_, graph, said, reparam)
            outcome.seconds[pass_.name] = time.perf_counter() - start
            if on_pass is not None:
                on_pass(pass_.name, graph)
        anchors = [n for n in order if n in said]
        outcome.sites = tuple(_verdict(f"site{k}", n, said[n]) for k, n in enumerate(anchors))
        outcome.reparam = tuple(reparam)
        outcome.nodes_after = len(graph.nodes)
        return outcome

    def _run_pass(
        self, position: int, pass_: Pass, graph: Graph, said: dict[Node, list[Record]], reparam: list[Reparam]
    ) -> int:
        rewrites = 0
        facts = Facts(graph)
        for node in list(graph.nodes):
            if not all(o in facts.positions for o in node.outputs):
                continue  # an earlier rewrite of this pass removed it
            found = _match(pass_, facts, node)
            if found is None:
                continue
            if not isinstance(found, Decline):
                found, facts = self._rewrite(position, pass_, facts, found)
                rewrites += not isinstance(found, Decline)
            record = pass_.record(node, found)
            if isinstance(record, Reparam):
                reparam.append(record)
            elif isinstance(record, Site):
                said.setdefault(node, []).append(replace(record, pass_name=pass_.name))
        return rewrites

    def _rewrite(self, position: int, pass_: Pass, facts: Facts, match: Any) -> tuple[Any, Facts]:
        graph = facts.graph
        try:
            pass_.rewrite(facts, match)
        except Declined as declined:
            return declined.decline, facts
        graph.remove_dead()
        graph.sort()
        try:
            check(graph)
        except ValueError as error:
            before = ", ".join(self.names[:position]) or "none"
            raise PassError(
                f"the pass {pass_.name} left the graph invalid: {error} (passes before it: {before})"
            ) from error
        return match, Facts(graph)


def _match(pass_: Pass, facts: Facts, node: Node) -> Any:
    """What the pass finds at a node; a map that cannot be expressed is a reason to leave a softmax as it is, as are a
    shape that nobody knows and a symbol where a number is needed.
    """
    try:
        return pass_.match(facts, node)
    except (IndexingError, UnknownShape, SymbolicExtent) as error:
        return Decline(str(error), node.label) if node.op == "Softmax" else None


def check(graph: Graph) -> None:
    """Raise ValueError where a node reads what nothing has computed yet, or two values share a name."""
    known = {id(v) for v in graph.inputs}
    names: dict[str, int] = {}
    for node in graph.nodes:
        for value in node.reads():
            if not value.is_constant and id(value) not in known:
                raise ValueError(f"{node.label} reads {value.name}, which nothing computes before it")
        for output in node.outputs:
            known.add(id(output))
            if names.setdefault(output.name, id(output)) != id(output):
                raise ValueError(f"two values are named {output.name}")
    for output in graph.outputs:
        if not output.is_constant and id(output) not in known:
            raise ValueError(f"the output {output.name} is computed by nothing")


def _verdict(site: str, node: Node, said: list[Record]) -> Site:
    """What the report says of a softmax: the rewrite, or the most telling of the declines."""
    records = [r for r in said if isinstance(r, Site)]
    rewritten = [r for r in records if r.verdict == "rewrite"]
    named = [r for r in records if r.kind != "other"]
    telling = rewritten or named or [r for r in records if not r.foreign] or records[-1:]
    if not telling:
        return Site(site, node.label, "other", "leave", "no pass of this run looks at softmaxes", node.label)
    return replace(telling[0], id=site, pass_name=telling[0].pass_name if rewritten else None)


def _passes() -> dict[str, Pass]:
    from attnrewrite import passes

    return {p.name: p for p in passes.ALL}


def __getattr__(name: str) -> Any:
    if name == "PASSES":
        return _passes()
    raise AttributeError(name)


def select(names: Sequence[str] | None = None) -> Pipeline:
    """The default pipeline, or these passes by name in the given order; UserError names an unknown one."""
    known = _passes()
    if names is None:
        return Pipeline(list(known.values()))
    unknown = [n for n in names if n not in known]
    if unknown:
        raise UserError(f"there is no pass named {unknown[0]}; the passes are {', '.join(known)}")
    return Pipeline([known[n] for n in names])
