"""The report as one HTML page without anything from outside."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from attnrewrite.localattention.site import Reparam
from attnrewrite.report import branches
from attnrewrite.report.document import Report, facts, headline, is_shifted, scientific
from attnrewrite.report.terminal import SITE_COLUMNS, site_cells

if TYPE_CHECKING:
    from jinja2 import Template


def to_html(report: Report) -> str:
    """A self-contained page; every name that comes from the model is escaped."""
    return _template().render(
        report=report,
        headline=headline(report),
        scientific=scientific,
        facts=[row for row in facts(report) if row[0] not in ("Speed",)],
        columns=SITE_COLUMNS,
        rows=[(site, site_cells(site)) for site in report.sites],
        shifted=sum(map(is_shifted, report.rewritten)),
        folded=sum(group.verdict == "rewrite" and group.branches > 1 for group in report.reparam),
        fold_columns=branches.COLUMNS,
        folds=[(_places(groups), branches.cells(groups)) for groups in _listed(report.reparam)],
        fold_rule=branches.RULE,
        apart=branches.left(report.reparam),
        timings=_bars(report.gains),
        removed=report.nodes_before - report.nodes_after,
        error=_largest_error(report.verification),
    )


def _listed(reparam: Sequence[Reparam]) -> list[list[Reparam]]:
    """Every group of branches by itself, chains of operators together."""
    folded = branches.folded(reparam)
    chains = branches.alike(group for group in folded if group.branches == 1)
    return [[group] for group in folded if group.branches > 1] + chains


def _places(groups: Sequence[Reparam]) -> str:
    return groups[0].node if len(groups) == 1 else f"{groups[0].node} and {len(groups) - 1} more"


def _largest_error(verification: dict[str, Any] | None) -> float | str | None:
    """Of the rewritten and of the compiled model, whichever is further off; None where nothing was compared."""
    compared = [verification[which] for which in ("rewritten", "compiled") if verification and verification.get(which)]
    return max((figures["max_error"] for figures in compared), key=float, default=None)


def _bars(gains: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Timings with the width of their bar, in percent of the slowest."""
    if gains is None:
        return []
    slowest = max(row["median_ms"] for row in gains["timings"])
    return [row | {"percent": 100.0 * row["median_ms"] / slowest} for row in gains["timings"]]


@cache
def _template() -> Template:
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
