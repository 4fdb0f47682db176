"""Write Slide-Transformer's Slide-Swin-T as an ONNX file, with its shift and learned convolutions still apart.

python examples/export_slide_transformer.py -o slide.onnx
python examples/export_slide_transformer.py --small --exporter torchscript -o slide.onnx
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import command
import typer
from exporting import DEFAULT_OPSET
from models.common import randomize_
from models.slide_transformer import SlideSwin, small_slide_swin


def main(
    output: command.Output = Path("slide_swin.onnx"),
    small: Annotated[bool, typer.Option("--small", help="Two stages of two blocks, for trying things out.")] = False,
    kernel_size: Annotated[int, typer.Option(help="Side of the neighbourhood in pixels; odd.")] = 3,
    shared_shift: Annotated[
        bool,
        typer.Option("--shared-shift", help="One pair of convolutions for key and value, as in the authors' code."),
    ] = False,
    height: Annotated[int, typer.Option(help="Image height in pixels.")] = 224,
    width: Annotated[int, typer.Option(help="Image width in pixels.")] = 224,
    exporter: command.Exporter = command.ExporterChoice.dynamo,
    opset: command.Opset = DEFAULT_OPSET,
    dynamic_batch: command.DynamicBatch = False,
    fp16: command.Fp16 = False,
    seed: command.Seed = 0,
) -> None:
    """Export Slide-Swin-T with random weights."""
    build = small_slide_swin if small else SlideSwin
    model = build((height, width), kernel_size=kernel_size, shared_shift=shared_shift)
    command.write(randomize_(model, seed), (1, 3, height, width), output, exporter, opset, dynamic_batch, fp16)


if __name__ == "__main__":
    typer.run(main)
