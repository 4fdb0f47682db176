"""Exporting a PyTorch model to ONNX with either of torch's two exporters, quietly.

    export(model, (image,), "swin.onnx", exporter="dynamo", opset=20, dynamic_batch=True)

The graphs of the two differ much: `dynamo` traces with torch.export and folds shapes; `torchscript` records what runs
and leaves the shape arithmetic in the file.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import onnx
import torch
from torch import nn

from attnrewrite.frontend.pt2 import silenced

Exporter = Literal["dynamo", "torchscript"]
EXPORTERS: tuple[Exporter, ...] = get_args(Exporter)
# What torch 2.13 writes. The dynamo exporter accepts less than 18 too, but then converts the finished graph back.
OPSETS: dict[Exporter, range] = {"dynamo": range(18, 24), "torchscript": range(9, 21)}
DEFAULT_OPSET = 18

_TORCHVISION_OPS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Keeps the declarations alive: they end with the Library object.
_torchvision_library: torch.library.Library | None = None


def import_torchvision() -> None:
    """Make `import torchvision` (and so `import timm`) work where its compiled ops do not load.

    A torchvision built for another torch stops at "operator torchvision::nms does not exist". No model here calls these
    ops, so declaring their signatures is enough. Does nothing where the import works or torchvision is not installed.
    """
    global _torchvision_library
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if _torchvision_library is not None or "torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
            del sys.modules[name]
        _torchvision_library = torch.library.Library("torchvision", "DEF")
        for signature in _TORCHVISION_OPS:
            _torchvision_library.define(signature)
        importlib.import_module("torchvision")


def export(
    model: nn.Module,
    example_inputs: Sequence[torch.Tensor],
    path: str | os.PathLike[str],
    *,
    exporter: Exporter = "dynamo",
    opset: int = DEFAULT_OPSET,
    dynamic_batch: bool = False,
    external_data: bool = False,
) -> Path:
    """Write `model` in eval mode as an ONNX file and return its path.

    example_inputs: the tensors forward() is called with; the graph's inputs are named x, x1, x2 ... and its output y.
    dynamic_batch: axis 0 of every input and of the output is symbolic (`batch`). The dynamo exporter specialises an
    axis of extent 1, so the example must hold at least two samples; they are repeated here where it holds one.
    external_data: weights go to a second file beside the first (FILE.data); without it, one file (of less than 2 GB).
    Raises ValueError for an opset that the exporter cannot write.
    """
    if opset not in OPSETS[exporter]:
        allowed = OPSETS[exporter]
        raise ValueError(f"the {exporter} exporter writes opset {allowed[0]} to {allowed[-1]}, got {opset=}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = tuple(_two_samples(x) for x in example_inputs) if dynamic_batch else tuple(example_inputs)
    names = ["x" if i == 0 else f"x{i}" for i in range(len(inputs))]
    with torch.no_grad(), silenced():
        if exporter == "dynamo":
            batch = torch.export.Dim("batch", min=1, max=1024)
            torch.onnx.export(
                model.eval(),
                inputs,
                path,
                dynamo=True,
                opset_version=opset,
                input_names=names,
                output_names=["y"],
                dynamic_shapes=tuple({0: batch} for _ in inputs) if dynamic_batch else None,
                external_data=external_data,
                verbose=False,
            )
        else:
            torch.onnx.export(
                model.eval(),
                inputs,
                path,
                dynamo=False,
                opset_version=opset,
                input_names=names,
                output_names=["y"],
                dynamic_axes={name: {0: "batch"} for name in (*names, "y")} if dynamic_batch else None,
            )
            if external_data:
                onnx.save(
                    onnx.load(path), path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0
                )
    return path


def _two_samples(x: torch.Tensor) -> torch.Tensor:
    return x if x.shape[0] > 1 else torch.cat([x, x])
