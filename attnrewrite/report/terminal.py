"""The report on a terminal, at one glance. Gives renderables; printing is the command line's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attnrewrite.localattention.site import Reparam, Site
from attnrewrite.report import branches
from attnrewrite.report.document import Report, facts, headline, is_shifted, scientific, shifts_of, times
from attnrewrite.report.drawing import draw
from attnrewrite.report.drawing import sentence as drawn_sentence

if TYPE_CHECKING:
    from attnrewrite.verify.numeric import Verification


def render(report: Report) -> Group:
    """Headline, table of sites, reasons of those left, folded branches, figures."""
    parts: list[RenderableType] = [Text(headline(report), style="bold")]
    if report.sites:
        parts.append(_site_table(grouped(report.sites)))
    parts += _reasons(report.left)
    parts += _branches(report.reparam)
    parts.append(_fact_table(facts(report)))
    return Group(*parts)


def render_site(site: Site) -> Group:
    """One site in full, for `explain`."""
    verdict = Text(site.verdict, style="green" if site.verdict == "rewrite" else "yellow")
    rows: list[tuple[str, RenderableType]] = [
        ("node", Text(site.node)),
        ("verdict", verdict),
        ("kind", Text(site.kind)),
    ]
    sizes = ("feature_size", "window_size", "shift_size", "kernel_size", "dilation")
    rows += [
        (name.replace("_", " "), Text(times(getattr(site, name)))) for name in sizes if getattr(site, name) is not None
    ]
    if site.head_shifts is not None:
        rows.append(("head shifts", Text(", ".join(map(times, site.head_shifts)))))
    plain = ("border", "num_heads", "head_dim", "bias", "mask")
    rows += [
        (name.replace("_", " "), Text(str(getattr(site, name)))) for name in plain if getattr(site, name) is not None
    ]
    rows.append(("reason", Text(site.reason)))
    if site.reason_node is not None:
        rows.append(("at node", Text(site.reason_node)))
    if site.pass_name is not None:
        rows.append(("pass", Text(site.pass_name)))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(label, value)
    drawings = [Padding(Text("\n".join([drawn_sentence(r), *draw(r)])), (0, 0, 1, 2)) for r in site.readings]
    return Group(Text(f"site {site.id}", style="bold"), Padding(table, (0, 0, 1, 2)), *drawings)


def render_verification(verification: Verification) -> Group:
    """Every comparison, the exact checks in one line, and the verdict."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("model", "input", "batch", "output", "largest error", "allowed", ""):
        table.add_column(column, justify="right" if column in ("batch", "largest error", "allowed") else "left")
    for c in verification.comparisons:
        verdict = (
            Text("equal" if c.error == 0 else "within", style="green") if c.passed else Text("DIFFERS", style="red")
        )
        cells = (c.candidate, c.case, str(c.batch), c.output, scientific(c.error), scientific(c.tolerance))
        table.add_row(*cells, verdict)
    parts: list[RenderableType] = [table]
    if verification.exact:
        passed = sum(bool(check["passed"]) for check in verification.exact)
        parts.append(Text(f"exact: {passed} of {len(verification.exact)} ops proved equal, index by index"))
    parts += [Text(f"note: {note}") for note in verification.notes]
    parts.append(Text("errors are shares of max |reference output|", style="dim"))
    return Group(*parts)


def grouped(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites that read alike, in the order of their first: one row of the table each."""
    rows: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        rows.setdefault((site.verdict, *site_cells(site)), []).append(site)
    return list(rows.values())


SITE_COLUMNS = ("kind", "feature map", "window or kernel", "shift", "heads x dim", "bias", "mask")


def site_cells(site: Site) -> tuple[str, ...]:
    """The cells of SITE_COLUMNS."""
    reach = times(site.window_size or site.kernel_size)
    if site.dilation is not None and any(d != 1 for d in site.dilation):
        reach += f" dilated {times(site.dilation)}"
    heads = "" if site.num_heads is None else f"{site.num_heads} x {'?' if site.head_dim is None else site.head_dim}"
    shift = ", ".join(map(times, shifts_of(site))) if is_shifted(site) else ""
    return (site.kind, times(site.feature_size), reach, shift, heads, site.bias or "", site.mask or "")


def _site_table(groups: list[list[Site]]) -> RenderableType:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("sites", justify="right")
    for column in SITE_COLUMNS:
        table.add_column(column, no_wrap=True)
    table.add_column("verdict")
    for sites in groups:
        rewritten = sites[0].verdict == "rewrite"
        verdict = Text("rewritten" if rewritten else "left", style="green" if rewritten else "yellow")
        table.add_row(str(len(sites)), *site_cells(sites[0]), verdict)
    return Padding(table, (0, 0, 0, 2))


def _branches(reparam: Sequence[Reparam]) -> list[RenderableType]:
    """What was folded, summed over groups alike, and what was left."""
    parts: list[RenderableType] = []
    if folded := branches.folded(reparam):
        table = Table(box=None, header_style="dim", pad_edge=False)
        table.add_column("folds", justify="right")
        for column in branches.COLUMNS:
            table.add_column(column, no_wrap=True)
        for groups in branches.alike(folded):
            table.add_row(str(len(groups)), *branches.cells(groups))
        parts += [Padding(table, (0, 0, 0, 2)), Padding(Text(branches.RULE, style="dim"), (0, 0, 0, 2))]
    for where, reason in branches.left(reparam):
        parts.append(Text(f"  {where} left: {reason}", style="yellow"))
    return parts


def _reasons(sites: Iterable[Site]) -> list[RenderableType]:
    """Why sites were left, one line per reason."""
    by_reason: dict[str, list[Site]] = {}
    for site in sites:
        by_reason.setdefault(site.reason, []).append(site)
    lines: list[RenderableType] = []
    for reason, left in by_reason.items():
        where = left[0].reason_node or left[0].node
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        lines.append(Text(f"  left: {reason} (at {where}{more})", style="yellow"))
    return lines


def _fact_table(rows: list[tuple[str, str]]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    previous = ""
    for label, sentence in rows:
        table.add_row(label if label != previous else "", Text(sentence))
        previous = label
    return Padding(table, (0, 0, 0, 2))
