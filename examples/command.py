"""The options that the export scripts share, and what they do with them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from exporting import export
from torch import nn


class ExporterChoice(StrEnum):
    """torch.onnx.export with dynamo=True or dynamo=False."""

    dynamo = "dynamo"
    torchscript = "torchscript"


Output = Annotated[Path, typer.Option("-o", "--output", help="ONNX file to write.")]
Exporter = Annotated[ExporterChoice, typer.Option(help="Which of torch's two ONNX exporters.")]
Opset = Annotated[int, typer.Option(help="dynamo writes 18 to 23, torchscript 9 to 20.")]
DynamicBatch = Annotated[bool, typer.Option("--dynamic-batch", help="Leave the batch size open.")]
Fp16 = Annotated[bool, typer.Option("--fp16", help="Half-precision weights, input and output.")]
Seed = Annotated[int, typer.Option(help="Seed of the random parameters.")]


def write(
    model: nn.Module,
    input_shape: tuple[int, ...],
    output: Path,
    exporter: ExporterChoice,
    opset: int,
    dynamic_batch: bool,
    fp16: bool,
) -> None:
    """Export `model`, called with one tensor of `input_shape`, and say where the file is; bad opset: exit code 2."""
    example = torch.randn(input_shape)
    if fp16:
        model, example = model.half(), example.half()
    try:
        export(model, (example,), output, exporter=exporter.value, opset=opset, dynamic_batch=dynamic_batch)
    except ValueError as error:
        typer.echo(f"{output}: {error}", err=True)
        raise typer.Exit(2) from None
    batch = "batch" if dynamic_batch else str(input_shape[0])
    shape = "x".join([batch, *map(str, input_shape[1:])])
    print(f"{output}: input x {shape}, opset {opset}, {output.stat().st_size / 1e6:.1f} MB")
