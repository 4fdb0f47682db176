"""A pipeline of one's own: chosen passes in a chosen order, what each did, and the rewritten model.

python examples/export_slide_transformer.py --small -o slide.onnx --height 48 --width 80
python examples/pipeline.py slide.onnx slide_rewritten.onnx
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
import typer

import attnrewrite
from attnrewrite import passes
from attnrewrite.frontend import onnx as frontend
from attnrewrite.graph import Graph

# Folding comes first: it turns every fixed and learned pair of shift convolutions into one.
pipeline = attnrewrite.Pipeline(
    [passes.fold_reparam_branches, passes.unfold_to_slide_attention, passes.fuse_window_attention]
)


def main(
    model: Annotated[Path, typer.Argument(help="ONNX file to rewrite.")],
    output: Annotated[Path, typer.Argument(help="ONNX file to write.")],
) -> None:
    """Rewrite MODEL, print the pipeline's steps and the sites, write OUTPUT, and compare the two in ONNX Runtime."""

    def show(name: str, graph: Graph) -> None:
        print(f"after {name}: {len(graph.nodes)} nodes")

    outcome = pipeline.run(frontend.read(model), on_pass=show)
    for site in outcome.sites:
        print(f"{site.id}: {site.kind}, {site.verdict}: {site.reason}")
    for group in outcome.reparam:
        print(f"{group.node}: {group.branches} branches, {group.verdict}: {group.reason}")
    frontend.write(outcome.graph, output)
    print(f"largest difference in ONNX Runtime: {difference(model, output):.1e} of the largest output")


def difference(original: Path, rewritten: Path) -> float:
    """Largest difference of the outputs for one random input, as a part of the largest output."""
    sessions = [
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]) for path in (original, rewritten)
    ]
    rng = np.random.default_rng(0)
    inputs = {}
    for entry in sessions[0].get_inputs():
        shape = [extent if isinstance(extent, int) else 1 for extent in entry.shape]
        dtype = np.float16 if entry.type == "tensor(float16)" else np.float32
        inputs[entry.name] = rng.normal(size=shape).astype(dtype)
    expected, found = (session.run(None, inputs) for session in sessions)
    return max(
        float(np.abs(a.astype(np.float64) - b).max() / np.abs(a).max()) for a, b in zip(expected, found, strict=True)
    )


if __name__ == "__main__":
    typer.run(main)
