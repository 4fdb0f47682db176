"""The compiling process: `python -m attnrewrite.lowering.child DIRECTORY`.

Reads request.json in the directory, leaves the library and result.json there. result.json is either what was made or
`{"error": sentence}`; if this process dies, there is none.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnrewrite.errors import AttnRewriteError
from attnrewrite.lowering.compile import REQUEST_NAME, RESULT_NAME
from attnrewrite.lowering.targets import Target


def main() -> int:
    work = Path(sys.argv[1])
    request = json.loads((work / REQUEST_NAME).read_text(encoding="utf-8"))
    stage = ["starting"]
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        stage[0] = name
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 3)

    try:
        result = compile_request(request, work, timed)
        result["seconds"] = seconds
    except AttnRewriteError as error:
        result = {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{_last_line(error)} (while {stage[0]})"}
    (work / RESULT_NAME).write_text(json.dumps(result), encoding="utf-8")
    return 1 if "error" in result else 0


def compile_request(request: dict[str, Any], work: Path, timed: Any) -> dict[str, Any]:
    """Everything between the ONNX file and the linked library; `timed(name)` is entered for each stage."""
    with timed("loading TVM"):
        from attnrewrite.lowering import build, importer
        from attnrewrite.lowering.precision import to_half
        from attnrewrite.lowering.split_linear import split_linear
    target = Target.from_json(request["target"])
    tvm_target = build.tvm_target(target)
    with timed("importing"):
        model = importer.load_onnx(Path(request["model"]), target)
        if request["precision"] == "fp16":
            to_half(model)
        split_linear(model)
        names = importer.interface_names(model)
        mod = importer.import_onnx(model, target, tvm_target)
        del model
        inputs, outputs = importer.interface(mod, *names)
    library = work / target.library
    with build.device_compiler(target, tvm_target) as finish:
        with timed("compiling"):
            built = build.build(mod, tvm_target)
        with timed("linking"):
            build.export(built.executable, target, library)
            finish(library)
    return {
        "entry": build.ENTRY,
        "inputs": inputs,
        "outputs": outputs,
        "kernels": built.kernels,
        "attention_kernels": built.attention_kernels,
        "library_bytes": library.stat().st_size,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _last_line(error: Exception) -> str:
    """TVM's messages start with a stack trace; what went wrong comes last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


if __name__ == "__main__":
    # What TVM prints belongs with the diagnostics.
    sys.stdout = sys.stderr
    sys.exit(main())
