"""Compiled models against ONNX Runtime's own aarch64 wheel on the original, both under qemu, as a Markdown table.

    python -m benchmarks.arm                                     # Swin-T and the unfold blocks; a few minutes
    python -m benchmarks.arm --models unfold_k3_56 --rounds 5

qemu translates every instruction and computes floating point in software, so times say little of a real chip; the ratio
in one process, one after the other, is a proxy for instructions executed. One thread; seconds are of processor time, so
that other work on the machine counts for little, and of the fastest round.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import attnrewrite
from attnrewrite import bench
from attnrewrite.lowering.qemu import Emulator, Missing, find_emulator
from benchmarks.workshop import Workshop

MODELS = ("swin_tiny", "unfold_k3_56", "unfold_k7_56")

# What both are run on: a core that every qemu since 5.2 emulates, so that none of them finds extensions of newer ones.
CHIP = "neoverse-n1"

_GUEST = """
import json, sys, time
import numpy as np
import onnxruntime
from attnrewrite import runtime
compiled = runtime.load(sys.argv[1])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
with np.load(sys.argv[3]) as arrays:
    inputs = dict(arrays)
names = [output.name for output in session.get_outputs()]
contestants = {
    "compiled": lambda: compiled.run(inputs, threads=1),
    "onnxruntime": lambda: dict(zip(names, session.run(names, inputs))),
}
outputs = {name: run() for name, run in contestants.items()}
seconds = {name: float("inf") for name in contestants}
for _ in range(int(sys.argv[4])):
    for name, run in contestants.items():
        start = time.process_time()
        run()
        seconds[name] = min(seconds[name], time.process_time() - start)
expected = outputs["onnxruntime"]
error = max(np.abs(outputs["compiled"][n] - expected[n]).max() / np.abs(expected[n]).max() for n in names)
print(json.dumps({"seconds": seconds, "error": float(error)}))
"""


def measured(emulator: Emulator, model: Path, rounds: int, precision: str) -> dict[str, Any]:
    """seconds of either contestant, and the largest difference of their outputs over the largest output."""
    with tempfile.TemporaryDirectory(prefix="attnrewrite-arm-") as name:
        work = Path(name)
        result = attnrewrite.optimize(model, target=f"arm:{CHIP}", precision=precision, threads=1, verify=False)
        directory = Path(result.save(work / "artifact"))
        (work / "package").mkdir()
        (work / "package" / "attnrewrite").symlink_to(Path(attnrewrite.__file__).resolve().parent)
        np.savez(work / "inputs.npz", **bench.example_inputs(model))
        answer = emulator.python(
            ["-c", _GUEST, str(directory), str(model.resolve()), str(work / "inputs.npz"), str(rounds)],
            what=model.name,
            path=[work / "package", emulator.onnxruntime(importlib.metadata.version("onnxruntime"))],
            processor=CHIP,
        )
    return json.loads(answer.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="names of benchmarks/zoo.py, separated by commas")
    parser.add_argument(
        "--rounds", type=int, default=3, help="runs of either contestant, after one that is not counted"
    )
    parser.add_argument("--precision", default="fp32", help="of the compiled library")
    parser.add_argument("--keep", type=Path, help="folder that keeps the exported models")
    arguments = parser.parse_args()
    emulator = find_emulator()
    if isinstance(emulator, Missing):
        sys.exit(f"error: {emulator.reason}")
    print("| model | compiled, s | ONNX Runtime, s | ratio | error |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        workshop = Workshop(arguments.keep or Path(scratch))
        for name in arguments.models.split(","):
            row = measured(emulator, workshop.model(name), arguments.rounds, arguments.precision)
            compiled, peer = row["seconds"]["compiled"], row["seconds"]["onnxruntime"]
            print(
                f"| {name} | {compiled:.2f} | {peer:.2f} | {peer / compiled:.2f} x | {row['error']:.1e} |", flush=True
            )


if __name__ == "__main__":
    main()
