"""Write a k x k neighbourhood attention block, spelled with unfold, as an ONNX file.

python examples/export_unfold.py --kernel-size 7 -o unfold_k7.onnx
python examples/export_unfold.py --height 30 --width 41 --dilation 2 --exporter torchscript -o unfold.onnx
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import command
import typer
from exporting import DEFAULT_OPSET
from models.common import randomize_
from models.unfold_attention import UnfoldAttention


def main(
    output: command.Output = Path("unfold.onnx"),
    kernel_size: Annotated[int, typer.Option(help="Side of the neighbourhood in pixels; odd.")] = 3,
    dilation: Annotated[int, typer.Option(help="Distance between neighbours in pixels.")] = 1,
    dim: Annotated[int, typer.Option(help="Channels; a multiple of the heads.")] = 96,
    num_heads: Annotated[int, typer.Option(help="Attention heads.")] = 3,
    height: Annotated[int, typer.Option(help="Feature-map height in pixels.")] = 56,
    width: Annotated[int, typer.Option(help="Feature-map width in pixels.")] = 56,
    relative_bias: Annotated[
        bool, typer.Option("--relative-bias", help="A learned bias per head and neighbour.")
    ] = False,
    exporter: command.Exporter = command.ExporterChoice.dynamo,
    opset: command.Opset = DEFAULT_OPSET,
    dynamic_batch: command.DynamicBatch = False,
    fp16: command.Fp16 = False,
    seed: command.Seed = 0,
) -> None:
    """Export unfold attention with random weights; its 1 x 1 convolutions for query, key, value and output included."""
    model = UnfoldAttention(dim, num_heads, kernel_size, dilation, relative_bias=relative_bias)
    command.write(randomize_(model, seed), (1, dim, height, width), output, exporter, opset, dynamic_batch, fp16)


if __name__ == "__main__":
    typer.run(main)
