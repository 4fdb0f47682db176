"""What is said about one softmax of the model: the row of every report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["window", "grid", "neighborhood", "halo", "stripe", "outlook", "global", "channel", "other"]
Verdict = Literal["rewrite", "leave"]
BiasKind = Literal["none", "constant", "tensor"]
MaskKind = Literal["none", "shift", "constant", "tensor"]


@dataclass(frozen=True)
class Decline:
    """A legal model part that is not rewritten: why, and at which node the proof stopped.

    foreign: the site is plainly not of the kind this matcher looks for, so another matcher's reason tells more.
    known: fields of the report's row that could be read all the same.
    """

    reason: str
    node: str
    kind: Kind = "other"
    foreign: bool = False
    known: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """What one query of a site reads, as `explain` shows it. Pixels are positions on a map, one entry per axis.

    what: whether the keys or the values are meant. query: the query's pixel on a map of extents query_size. together:
    all queries that read the same, the query among them. reads: the pixels read, each once, on a map of extents size.
    padding: how many of the slots read padding instead. note: why this query is shown.
    """

    what: Literal["keys", "values"]
    query: tuple[int, ...]
    query_size: tuple[int, ...]
    together: tuple[tuple[int, ...], ...]
    reads: tuple[tuple[int, ...], ...]
    size: tuple[int, ...]
    padding: int
    note: str


@dataclass(frozen=True)
class Site:
    """One softmax. Sizes have one entry per spatial axis, in pixels; None where the geometry was not read.

    key_size, key_window_size: map and window of the keys, where they are not those of the queries. head_shifts: the
    shift of each group of heads, where they differ (shift_size is that of the first).
    """

    id: str
    node: str
    kind: Kind
    verdict: Verdict
    reason: str
    reason_node: str | None = None
    num_heads: int | None = None
    head_dim: int | None = None
    feature_size: tuple[int, ...] | None = None
    window_size: tuple[int, ...] | None = None
    shift_size: tuple[int, ...] | None = None
    head_shifts: tuple[tuple[int, ...], ...] | None = None
    key_size: tuple[int, ...] | None = None
    key_window_size: tuple[int, ...] | None = None
    kernel_size: tuple[int, ...] | None = None
    border: str | None = None
    dilation: tuple[int, ...] | None = None
    bias: BiasKind | None = None
    mask: MaskKind | None = None
    pass_name: str | None = None
    foreign: bool = False
    readings: tuple[Reading, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The site as the JSON report writes it: `pass` for pass_name, unread fields left out."""
        fields = {k: _as_list(v) for k, v in asdict(self).items() if v is not None}
        del fields["foreign"], fields["readings"]
        if "pass_name" in fields:
            fields["pass"] = fields.pop("pass_name")
        return fields


def _as_list(value: Any) -> Any:
    return [_as_list(v) for v in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class Reparam:
    """Re-parameterised branches that one operator replaces, or a chain of operators, which is one branch.

    into: Conv, Gemm or MatMul. node: where the branches end. parameters: numbers in the weights. multiplications: for
    one sample, as `attnrewrite/reparam/plan.py` counts them. max_weight_error: the largest difference between a weight
    in float64 and as stored; max_weight_error_ulp: the same in units in the last place, at most 1/2.
    """

    branches: int
    into: str
    verdict: Verdict
    node: str
    reason: str
    parameters_before: int | None = None
    parameters_after: int | None = None
    max_weight_error: float | None = None
    multiplications_before: int | None = None
    multiplications_after: int | None = None
    max_weight_error_ulp: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}
