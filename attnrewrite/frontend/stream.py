"""Write a model field by field, one weight in memory at a time.

`SerializeToString` builds the whole file in memory beside the model. Protobuf's wire format is a sequence of fields,
and a repeated field may follow the others: the graph without its weights, then each weight.
Source: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import BinaryIO

import onnx

LENGTH_DELIMITED = 2
GRAPH = onnx.ModelProto.GRAPH_FIELD_NUMBER
INITIALIZER = onnx.GraphProto.INITIALIZER_FIELD_NUMBER


def write_model(model: onnx.ModelProto, weights: Sequence[Callable[[], onnx.TensorProto]], file: BinaryIO) -> None:
    """Write the model with these weights added to its initialisers; each is called twice, once for its size."""
    sizes = [weight().ByteSize() for weight in weights]
    graph = model.graph.SerializeToString()
    head = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.number == GRAPH:
            continue
        if field.is_repeated:
            getattr(head, field.name).extend(value)
        else:
            setattr(head, field.name, value)
    total = len(graph) + sum(size + len(_header(INITIALIZER, size)) for size in sizes)
    file.write(head.SerializeToString())
    file.write(_header(GRAPH, total))
    file.write(graph)
    for weight, size in zip(weights, sizes, strict=True):
        file.write(_header(INITIALIZER, size))
        file.write(weight().SerializeToString())


def _header(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field."""
    return _varint(number << 3 | LENGTH_DELIMITED) + _varint(length)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
