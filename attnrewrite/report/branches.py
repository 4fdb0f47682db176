"""What the reports say of re-parameterised branches: groups of them in rows, chains of operators taken together."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from attnrewrite.localattention.site import Reparam
from attnrewrite.report.document import scientific

COLUMNS = ("branches", "into", "parameters", "multiplications", "weights rounded by")
RULE = (
    "Branches become one operator where that is exact and takes no more multiplications for one sample, operators in "
    "a row where it takes fewer and no larger weights. A BatchNorm, scale, bias or sum counts one per element, "
    "pooling one per element of its window."
)

Key = TypeVar("Key")


def folded(reparam: Iterable[Reparam]) -> list[Reparam]:
    return [group for group in reparam if group.verdict == "rewrite"]


def alike(groups: Iterable[Reparam]) -> list[list[Reparam]]:
    """Groups of as many branches that became the same operator; chains, which are one branch, come last."""
    rows = _by(groups, lambda group: (group.branches, group.into))
    return sorted(rows, key=lambda row: (row[0].branches == 1, -row[0].branches))


def cells(groups: Sequence[Reparam]) -> tuple[str, ...]:
    """The cells of COLUMNS for groups that are `alike`, summed."""
    first = groups[0]
    error = max((g.max_weight_error or 0.0 for g in groups), default=0.0)
    ulp = max((g.max_weight_error_ulp or 0.0 for g in groups), default=0.0)
    return (
        "in a row" if first.branches == 1 else str(first.branches),
        first.into,
        _change([g.parameters_before for g in groups], [g.parameters_after for g in groups]),
        _change([g.multiplications_before for g in groups], [g.multiplications_after for g in groups]),
        f"{scientific(error)} ({ulp:.2f} ulp)" if error else "nothing",
    )


def left(reparam: Iterable[Reparam]) -> list[tuple[str, str]]:
    """(where, reason) of what stays apart, one line for each reason, whatever its figures."""
    apart = (group for group in reparam if group.verdict == "leave")
    by_reason = _by(apart, lambda group: (group.branches, re.sub(r"\d[\d,]*", "#", group.reason)))
    lines = []
    for groups in by_reason:
        what = "operators in a row" if groups[0].branches == 1 else f"{groups[0].branches} branches"
        more = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
        lines.append((f"{what} at {groups[0].node}{more}", groups[0].reason))
    return lines


def _by(groups: Iterable[Reparam], key: Callable[[Reparam], Key]) -> list[list[Reparam]]:
    rows: dict[Key, list[Reparam]] = {}
    for group in groups:
        rows.setdefault(key(group), []).append(group)
    return list(rows.values())


def _change(before: Sequence[int | None], after: Sequence[int | None]) -> str:
    if None in before or None in after:
        return ""
    return f"{_amount(sum(filter(None, before)))} → {_amount(sum(filter(None, after)))}"


def _amount(number: int) -> str:
    """Three digits and a unit."""
    value, unit = float(number), 0
    while value >= 999.5 and unit < 4:
        value, unit = value / 1000, unit + 1
    return str(number) if unit == 0 else f"{value:.3g} {' kMGT'[unit]}"
