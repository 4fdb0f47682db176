"""The compiling process: `python -m attnrewrite.lowering.child DIRECTORY`.

Reads request.json in the directory, leaves the library and result.json there. result.json is either what was made or
`{"error": sentence}`; if this process dies, there is none. How far tuning is goes to standard output, a JSON document
per line.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnrewrite.errors import AttnRewriteError, UserError, last_line
from attnrewrite.lowering.compile import REQUEST_NAME, RESULT_NAME, versions
from attnrewrite.lowering.targets import Target
from attnrewrite.runtime import tensors_of


def main() -> int:
    say = _messages()
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
        result = compile_request(request, work, timed, say)
        result["seconds"] = seconds
    except AttnRewriteError as error:
        result = {"error": str(error), "usage": isinstance(error, UserError)}
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{last_line(error)} (while {stage[0]})"}
    (work / RESULT_NAME).write_text(json.dumps(result), encoding="utf-8")
    return 1 if "error" in result else 0


def compile_request(
    request: dict[str, Any], work: Path, timed: Any, say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Everything between the ONNX file and the linked library; of a request for single kernels, their libraries.

    timed(name) is entered for each stage; say(document) is told how far tuning is.
    """
    if "kernels" in request:
        from attnrewrite.lowering.kernel_library import compile_kernels

        return compile_kernels(request["kernels"], Target.from_json(request["target"]), work, timed)
    with timed("loading TVM"):
        from attnrewrite.lowering import build, importer, narrow, static_library
        from attnrewrite.lowering.precision import to_half
        from attnrewrite.lowering.split_linear import split_linear
        from attnrewrite.lowering.weights import WEIGHTS_NAME, write_weights
    target = Target.from_json(request["target"])
    tvm_target = build.tvm_target(target)
    precision = request["precision"]
    if precision == "bf16" and target.device == "cpu":
        narrow.check_bf16(tvm_target)
    with timed("importing"):
        model = importer.load_onnx(Path(request["model"]), target)
        if precision != "fp32" and target.device != "cpu":
            to_half(model, precision)
        split_linear(model)
        names = importer.interface_names(model)
        mod = importer.import_onnx(model, target, tvm_target)
        del model
        inputs, outputs = importer.interface(mod, *names)
    library = work / target.library
    tiles = None
    if target.kind == "cpu":
        from attnrewrite.lowering.tuning import find_tiles

        with timed("tuning"):
            tiles = find_tiles(
                mod, tvm_target, request["tune"], request["threads"], versions(), lambda p: say(asdict(p))
            )
    with build.device_compiler(target) as finish:
        with timed("compiling"):
            built = build.build(
                mod,
                tvm_target,
                None if tiles is None else tiles.choices,
                precision,
                separate_weights=request["separate_weights"],
                system_prefix=static_library.system_prefix(request["name"]) if target.is_linked_in else None,
                replay=target.device == "cuda",
            )
        with timed("linking"):
            named = f"{request['name']}_{WEIGHTS_NAME}" if target.is_linked_in else WEIGHTS_NAME
            weights_file = named if built.weights else None
            weights = () if weights_file is None else write_weights(built.weights, work / weights_file)
            beside = [] if weights_file is None else [weights_file]
            if target.is_linked_in:
                beside += static_library.export_static(
                    built.executable,
                    target,
                    work,
                    name=request["name"],
                    entry=build.ENTRY,
                    inputs=tensors_of(inputs),
                    outputs=tensors_of(outputs),
                    weights=weights,
                    weights_file=weights_file,
                )
            else:
                beside += build.export(built.executable, target, library)
                finish(library)
    return {
        "entry": build.ENTRY,
        "replayed_entry": build.REPLAYED_ENTRY if built.replayed else None,
        "inputs": inputs,
        "outputs": outputs,
        "kernels": built.kernels,
        "attention_kernels": built.attention_kernels,
        "constant_outputs": [outputs[i]["name"] for i in built.constant_outputs],
        "tuning": None if tiles is None else tiles.to_json(),
        "library_bytes": library.stat().st_size,
        "weights": [asdict(weight) for weight in weights],
        "weights_file": weights_file,
        "weights_bytes": 0 if weights_file is None else (work / weights_file).stat().st_size,
        "beside": beside,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _messages() -> Callable[[dict[str, Any]], None]:
    """A way to say something to the parent; what TVM prints goes to the diagnostics from now on."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = sys.stderr

    def say(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=out, flush=True)

    return say


if __name__ == "__main__":
    sys.exit(main())
