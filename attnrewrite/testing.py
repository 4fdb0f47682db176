"""Assertions for your own test suite.

from attnrewrite.testing import assert_equivalent, assert_sites

def test_export_is_still_rewritten(tmp_path):
    assert_sites("swin.onnx", window=10, left=2)
    result = attnrewrite.optimize("swin.onnx")
    assert_equivalent("swin.onnx", result)
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from attnrewrite import api, artifact
from attnrewrite.artifact import InputShapes
from attnrewrite.localattention.site import Kind
from attnrewrite.report import Report
from attnrewrite.verify.numeric import verify_models
from attnrewrite.verify.runners import CompiledRunner

if TYPE_CHECKING:
    import onnx

    ModelLike = str | os.PathLike[str] | onnx.ModelProto


def assert_equivalent(
    original: ModelLike,
    rewritten: ModelLike | api.Result,
    *,
    tolerance: float | None = None,
    trials: int = 3,
    input_shapes: InputShapes | None = None,
    threads: int | None = None,
) -> None:
    """Fail unless two models compute the same outputs from the same inputs.

    rewritten: a model, an output directory of optimize, or its Result; a compiled library is compared too. tolerance:
    largest difference allowed, as a share of max |reference output|; derived from dtype and model where None (see
    attnrewrite.verify.numeric). Raises AssertionError naming the output, the element and both numbers, and UserError
    where the original itself does not run.
    """
    with tempfile.TemporaryDirectory(prefix="attnrewrite-") as folder:
        before = _as_path(original, Path(folder) / "original.onnx")
        after = rewritten.directory if isinstance(rewritten, api.Result) else rewritten
        after_path = _as_path(after, Path(folder) / "rewritten.onnx")
        compiled = None
        if after_path.is_dir():
            report, _ = artifact.read_report(after_path)
            if artifact.runs_here(report):
                compiled = partial(CompiledRunner, after_path, threads)
            after_path /= artifact.MODEL_NAME
        verification = verify_models(
            before,
            after_path,
            trials=trials,
            compiled=compiled,
            input_shapes=input_shapes,
            threads=threads,
            tolerance=tolerance,
        )
    if not verification.passed:
        raise AssertionError(f"the models are not equivalent: {verification.explain_failure()}")


def assert_sites(
    model: ModelLike | Report, *, left: int | None = None, input_shapes: InputShapes | None = None, **rewritten: int
) -> None:
    """Fail unless exactly so many sites of each kind are rewritten: `assert_sites(model, window=10, neighborhood=2)`.

    Kinds that are not named must not be rewritten at all. left: how many sites stay as they are, where it matters.
    Raises AssertionError that lists the sites which were left, with their reasons.
    """
    kinds = get_args(Kind)
    unknown = [kind for kind in rewritten if kind not in kinds]
    if unknown:
        raise TypeError(f"there is no kind {unknown[0]!r} of site; the kinds are {', '.join(kinds)}")
    report = model if isinstance(model, Report) else api.inspect(model, input_shapes)
    found = Counter(site.kind for site in report.rewritten)
    wanted = Counter({kind: count for kind, count in rewritten.items() if count})
    if +found == wanted and (left is None or left == len(report.left)):
        return
    lines = [f"expected {_counts(wanted)} rewritten, found {_counts(found)} in {report.model}"]
    if left is not None and left != len(report.left):
        lines.append(f"expected {left} left, found {len(report.left)}")
    lines += [f"  left: {s.kind} {s.node}: {s.reason} (at {s.reason_node or s.node})" for s in report.left]
    raise AssertionError("\n".join(lines))


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{kind}={count}" for kind, count in sorted(counts.items())) or "nothing"


def _as_path(model: ModelLike, scratch: Path) -> Path:
    """The model's own file, or a copy of a model in memory."""
    if isinstance(model, (str, os.PathLike)):
        return Path(model)
    api.save_copy(model, scratch)
    return scratch
