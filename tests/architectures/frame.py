"""How a row of the table of architectures is written down: a small model, and what must be said of its softmaxes.

A module of this folder holds the models of one family and their rows as `ARCHITECTURES`; test_table.py checks them all.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnrewrite.localattention.site import Kind, Site, Verdict
from attnrewrite.pipeline import Outcome
from tests.models.build import ModelCase, exported
from tests.passes.rewritten import left_over, local_ops

TORCHSCRIPT, DYNAMO = "torchscript", "dynamo"
BOTH = (TORCHSCRIPT, DYNAMO)
OPSETS = {TORCHSCRIPT: 17, DYNAMO: 20}


class Expect:
    """`count` softmaxes of which the report says the same: kind, verdict, and any other field of `Site` by name.

    reason: a regular expression found in the reason. Fields not named may be anything.
    """

    def __init__(self, kind: Kind, verdict: Verdict, count: int = 1, *, reason: str = "", **fields: Any) -> None:
        self.count, self.reason = count, reason
        self.fields: dict[str, Any] = {"kind": kind, "verdict": verdict, **fields}

    def fits(self, site: Site) -> bool:
        same = all(getattr(site, name) == value for name, value in self.fields.items())
        return same and re.search(self.reason, site.reason) is not None

    def __repr__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.fields.items())
        return f"{self.count} x ({said}{', reason ~ ' + self.reason if self.reason else ''})"


def rewritten(kind: Kind, count: int = 1, **fields: Any) -> Expect:
    return Expect(kind, "rewrite", count, **fields)


def left(kind: Kind, count: int = 1, *, reason: str, **fields: Any) -> Expect:
    return Expect(kind, "leave", count, reason=reason, **fields)


@dataclass(frozen=True, eq=False)
class Architecture:
    """One model of a row.

    row: the first column of the table. build: the torch module, taking a float32 array of input_shape [batch, ...].
    sites: what is expected, in any order. folds: sums of re-parameterised branches that become one operator.
    variant: tells several models of a row apart. exporters: those tried by default; all are tried among the slow tests.
    dynamic_batch: the exporters keep the batch symbolic. clean: no movement of tokens may be left in the graph; where
    sites are left, theirs stays. in_rows: the windows are rows of tokens that never were a map; to see the rows of one
    image as one row moves none. beside: what windows compute beside their attention keeps a partition of its own.
    fails: what an exporter that cannot write the model says (a regular expression).
    """

    row: str
    build: Callable[[], Any]
    input_shape: tuple[int, ...]
    sites: tuple[Expect, ...] = ()
    folds: int = 0
    variant: str = ""
    exporters: tuple[str, ...] = (TORCHSCRIPT,)
    dynamic_batch: bool = True
    clean: bool = True
    in_rows: bool = False
    beside: bool = False
    fails: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The row and its variant, fit for a file."""
        return re.sub(r"[^a-z0-9]+", "_", f"{self.row} {self.variant}".lower()).strip("_")

    def export(self, exporter: str) -> Path:
        """The ONNX file of the model, built at the first call."""
        here = Path(__file__).parent
        zoo = here.parent / "zoo" / "timm_models.py"  # where deployed.py has some of its models from
        sources = (Path(inspect.getfile(self.build)), here / "layers.py", zoo)
        case = ModelCase(self.build, self.input_shape, sum(e.count for e in self.sites), sources=sources)
        return exported(self.name, exporter, opset=OPSETS[exporter], dynamic_batch=self.dynamic_batch, case=case)


def assert_sites(architecture: Architecture, outcome: Outcome) -> None:
    """Every softmax is listed, each as one of the expected; every rewritten one is one op, and nothing else is left."""
    room = {expect: expect.count for expect in architecture.sites}
    unexpected = []
    for site in outcome.sites:
        fitting = next((e for e, count in room.items() if count and e.fits(site)), None)
        if fitting is None:
            unexpected.append(site.to_json())
        else:
            room[fitting] -= 1
    missing = [f"{count} of {expect}" for expect, count in room.items() if count]
    assert not unexpected and not missing, f"unexpected: {unexpected}\nmissing: {missing}"
    assert all(s.reason and (s.verdict == "rewrite" or s.reason_node) for s in outcome.sites)
    assert sum(r.verdict == "rewrite" and r.branches > 1 for r in outcome.reparam) == architecture.folds, (
        outcome.reparam
    )
    rewritten_sites = [s for s in outcome.sites if s.verdict == "rewrite"]
    assert len(local_ops(outcome.graph)) == len(rewritten_sites)
    said = left_over(outcome.graph) if rewritten_sites and not architecture.beside else []
    if not architecture.clean:
        said = [s for s in said if "moves tokens" in s]
    if architecture.in_rows:
        said = [s for s in said if not s.endswith(("moves tokens (Reshape)", " rows"))]
    assert not said
