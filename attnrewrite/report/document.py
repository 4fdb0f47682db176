"""The report as a value: what was found, what was done, why not, and what it gained. Its JSON form is report.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from attnrewrite.localattention.site import Reparam, Site


@dataclass(frozen=True)
class Report:
    """One run of inspect or optimize. Parts that did not run are None.

    model: the path as given. seconds: wall time by stage (read, rewrite, write, verify, compile). passes: wall time by
    pass, in the order they ran. verification: Verification.to_json(). compile: target, library, bytes and seconds, or
    the error. gains: milliseconds measured by bench.
    """

    model: str
    sites: tuple[Site, ...]
    reparam: tuple[Reparam, ...]
    nodes_before: int
    nodes_after: int
    target: str | None = None
    precision: str | None = None
    passes: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    verification: dict[str, Any] | None = None
    compile: dict[str, Any] | None = None
    gains: dict[str, Any] | None = None

    @property
    def rewritten(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.verdict == "rewrite")

    @property
    def left(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.verdict == "leave")

    @property
    def changed(self) -> bool:
        """Whether any site or branch was rewritten."""
        return bool(self.rewritten) or any(r.verdict == "rewrite" for r in self.reparam)

    def with_gains(self, gains: dict[str, Any]) -> Report:
        return replace(self, gains=gains)

    def to_json(self) -> dict[str, Any]:
        """The JSON document; parts that did not run are left out."""
        document: dict[str, Any] = {
            "model": self.model,
            "sites": [site.to_json() for site in self.sites],
            "reparam": [group.to_json() for group in self.reparam],
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "target": self.target,
            "precision": self.precision,
            "passes": [{"name": name, "seconds": round(s, 4)} for name, s in self.passes.items()],
            "seconds": {stage: round(s, 4) for stage, s in self.seconds.items()},
            "verification": self.verification,
            "compile": self.compile,
            "gains": self.gains,
        }
        return {key: value for key, value in document.items() if value is not None}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Report:
        """The report that `to_json` wrote; keys it does not know are ignored. Raises KeyError where one is missing."""
        optional = {f.name for f in fields(cls)} - {"sites", "reparam", "passes"}
        values = {key: value for key, value in document.items() if key in optional}
        return cls(
            sites=tuple(_site(row) for row in document["sites"]),
            reparam=tuple(Reparam(**row) for row in document["reparam"]),
            passes={row["name"]: row["seconds"] for row in document.get("passes", [])},
            **values,
        )


def _site(row: dict[str, Any]) -> Site:
    values: dict[str, Any] = {key: _as_tuple(value) for key, value in row.items() if key != "pass"}
    return Site(**values, pass_name=row.get("pass"))


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list) else value


def times(sizes: tuple[int, ...] | None) -> str:
    """(7, 7) -> "7x7"; empty where the size was not read."""
    return "" if sizes is None else "x".join(map(str, sizes))


def is_shifted(site: Site) -> bool:
    return any(any(shift) for shift in shifts_of(site))


def shifts_of(site: Site) -> tuple[tuple[int, ...], ...]:
    """The shifts of its windows: one, or one for each group of heads."""
    return site.head_shifts or (() if site.shift_size is None else (site.shift_size,))


def _counted(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def headline(report: Report) -> str:
    """One sentence: how many sites there are and what became of them."""
    if not report.sites:
        found = "no attention in this model"
    else:
        found = f"{_counted(len(report.sites), 'attention site')}: {len(report.rewritten)} rewritten"
        shifted = sum(map(is_shifted, report.rewritten))
        found += f" ({shifted} of them shifted)" if shifted else ""
        if report.left:
            kinds = Counter(site.kind for site in report.left)
            left = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            found += f", {len(report.left)} left ({left})"
    folded = [r for r in report.reparam if r.verdict == "rewrite"]
    if groups := sum(r.branches > 1 for r in folded):
        found += f"; {_counted(groups, 'group')} of re-parameterised branches folded"
    elif folded:
        found += f"; {_chains_sentence(folded)}"
    if not report.changed:
        found += "; nothing to rewrite"
    return found[0].upper() + found[1:]


def _chains_sentence(chains: Sequence[Reparam]) -> str:
    """One sentence for all chains of one operator that were folded."""
    kinds = Counter("convolution" if r.into == "Conv" else "matrix product" for r in chains)
    layers = " and ".join(_counted(count, kind) for kind, count in kinds.items())
    return f"{layers} took in the BatchNorm, scale or bias around"


def facts(report: Report) -> list[tuple[str, str]]:
    """(label, sentence) for everything but the sites: what was done, proved, compiled and gained."""
    rows = [("Graph", f"{report.nodes_before} nodes before, {report.nodes_after} after")]
    rows += _verification_rows(report.verification)
    if report.compile is not None:
        rows.append(("Library", _compile_sentence(report.compile)))
        rows += _tuning_rows(report.compile.get("tuning"))
    if report.gains is not None:
        rows += _gain_rows(report.gains)
    if report.seconds:
        rows.append(("Time", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())))
    return rows


def _verification_rows(verification: dict[str, Any] | None) -> list[tuple[str, str]]:
    if verification is None:
        return []
    rows = []
    exact = verification.get("exact", [])
    if exact:
        passed = sum(bool(check["passed"]) for check in exact)
        rows.append(
            ("Exact", f"{passed} of {_counted(len(exact), 'emitted op')} proved equal to the original, index by index")
        )
    for candidate in ("rewritten", "compiled"):
        figures = verification.get(candidate)
        if figures is None:
            continue
        verdict = "within" if figures["passed"] else "NOT within"
        rows.append(
            (
                candidate.capitalize(),
                f"largest error {scientific(figures['max_error'])} of max |output|, "
                f"{verdict} {scientific(figures['tolerance'])}",
            )
        )
    rows += [("Failed", sentence) for sentence in verification.get("failures", [])]
    rows += [("Note", sentence) for sentence in verification.get("notes", [])]
    return rows


def _compile_sentence(compiled: dict[str, Any]) -> str:
    if compiled.get("error"):
        return f"failed for {compiled['target']}: {compiled['error']}"
    sentence = f"{compiled['library']} for {compiled['target']}"
    if "bytes" in compiled:
        sentence += f", {compiled['bytes'] / 1e6:.1f} MB"
    if compiled.get("weights_bytes"):
        sentence += f" and {compiled['weights_bytes'] / 1e6:.1f} MB of weights beside it"
    if "seconds" in compiled:
        sentence += f", in {compiled['seconds']:.1f} s"
    return sentence


def _tuning_rows(tuning: dict[str, Any] | None) -> list[tuple[str, str]]:
    if tuning is None:
        return []
    rows = []
    if "tried" in tuning:
        sentence = (
            f"{_counted(tuning['tried'], 'tile')} tried in {tuning['seconds']:.0f} s: {len(tuning['faster'])} of "
            f"{_counted(tuning['products'], 'matrix product')} faster than with the cost model's tile"
        )
        if tuning["faster"]:
            sentence += f", {tuning['saved_ms']:.2f} of {tuning['measured_ms']:.2f} ms saved"
        rows.append(("Tuning", sentence))
    elif tuning.get("applied"):
        sentence = f"tiles measured by an earlier run for {_counted(len(tuning['applied']), 'matrix product')}"
        rows.append(("Tuning", f"{sentence} (--tune 0 does without)"))
    return rows + [("Note", note) for note in tuning.get("notes", [])]


def _gain_rows(gains: dict[str, Any]) -> list[tuple[str, str]]:
    base = next((row for row in gains["timings"] if row["name"] == "original"), None)
    rows = []
    for row in gains["timings"]:
        what = "original" if row["name"] == "openvino" else row["name"]
        sentence = f"{what} in {row['engine']}: {row['median_ms']:.2f} ms"
        if base is not None and row is not base:
            sentence += f", {base['median_ms'] / row['median_ms']:.2f} x the original's speed"
        rows.append(("Speed", sentence))
    return rows


def scientific(value: float | str) -> str:
    """An error or a tolerance; infinity comes as text, for JSON has none."""
    if isinstance(value, str):
        return value
    return f"{value:.1e}" if value else "0"
