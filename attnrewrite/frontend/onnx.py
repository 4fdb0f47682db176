"""ONNX files in and out, on onnx-graphsurgeon.

`read` gives the graph view with constants and shapes folded; `write` puts a graph back into a file. Weights are neither
loaded nor copied before somebody reads them: a tensor the passes never touch goes from file to file.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError

from attnrewrite.dims import Dim, Extent, static
from attnrewrite.errors import UserError
from attnrewrite.frontend.expand import expand_attention
from attnrewrite.frontend.flattened import keep_axes
from attnrewrite.frontend.fold import fold
from attnrewrite.frontend.opset import MINIMUM_OPSET, opset_of, raise_opset
from attnrewrite.frontend.stream import write_model
from attnrewrite.frontend.tensors import Importer
from attnrewrite.functions import function_protos, inlined, overload_of
from attnrewrite.functions.spec import DOMAIN, DOMAIN_VERSION
from attnrewrite.graph import Graph, Value

gs.logger.G_LOGGER.severity = logging.ERROR

# One protobuf message cannot exceed 2 GiB; from here on weights go beside the model.
EXTERNAL_DATA_LIMIT_BYTES = 1_800_000_000
# Constants beyond this are written one by one, so that a model is never in memory twice.
LARGE_BYTES = 1 << 16
COPIED_BYTES = 1 << 24


@dataclass
class Source:
    """What a model says besides its graph, for the writer."""

    imports: list[onnx.OperatorSetIdProto]
    ir_version: int
    producer_name: str
    metadata: dict[str, str]
    doc: str
    folder: Path


def read(model: str | Path | onnx.ModelProto, input_shapes: Mapping[str, Sequence[int | str]] | None = None) -> Graph:
    """Load a model into the graph view, raised to opset 13 at least, with constants and shapes folded.

    input_shapes: extents to give to symbolic axes, by input name; a string keeps or renames a symbol.
    Raises UserError naming the file and what is wrong with it.
    """
    path = None if isinstance(model, onnx.ModelProto) else Path(model)
    proto = model if isinstance(model, onnx.ModelProto) else _load(Path(model))
    folder = path.parent if path is not None else Path()
    if path is not None:
        _check_external_data(proto, path)
    if proto is model and (proto.functions or opset_of(proto) < MINIMUM_OPSET):  # what follows edits in place
        proto = onnx.ModelProto()
        proto.CopyFrom(model)
    proto = _without_foreign_functions(proto)
    try:
        proto = raise_opset(proto)
        graph = _to_graph(gs.import_onnx(proto), proto, folder)
    except UserError:
        raise
    except Exception as error:  # graphsurgeon asserts and raises bare exceptions on malformed graphs
        raise UserError(f"{path or 'the model'} is not a valid ONNX model: {error}") from error
    _specialise(graph, input_shapes or {}, path)
    fold(graph)
    expand_attention(graph)
    keep_axes(graph)
    return graph


def _load(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.is_dir():
        raise UserError(f"{path} is a directory, not an ONNX file")
    try:
        proto = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path} is not an ONNX file, or it is truncated") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    if not proto.HasField("graph") or not proto.graph.output or not proto.opset_import:
        raise UserError(f"{path} is not an ONNX file, or it is truncated: it holds no graph")
    return proto


def _without_foreign_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model's own functions written out; the nodes of our two ops stay, their bodies are built anew."""
    foreign = [(f.domain, f.name) for f in proto.functions if f.domain != DOMAIN]
    if foreign:
        proto = onnx.inliner.inline_selected_functions(proto, foreign)
    del proto.functions[:]
    return proto


def _check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    for tensor in _all_initializers(proto.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        info = onnx.external_data_helper.ExternalDataInfo(tensor)
        data = path.parent / info.location
        if not data.is_file():
            raise UserError(f"{path} keeps {tensor.name} in {info.location}, which is missing")
        needed = (info.offset or 0) + (info.length or 0)
        if data.stat().st_size < needed:
            raise UserError(
                f"{path} keeps {tensor.name} in {info.location}, which is truncated: {needed} bytes expected"
            )


def _to_graph(source: gs.Graph, proto: onnx.ModelProto, folder: Path) -> Graph:
    importer = Importer(folder, {t.name for t in proto.graph.initializer})
    inputs = importer.values([t for t in source.inputs if not isinstance(t, gs.Constant)])
    nodes = importer.nodes(source)
    graph = Graph(inputs, importer.values(source.outputs), nodes, opset_of(proto), source.name or "graph")
    graph.source = Source(
        list(proto.opset_import),
        proto.ir_version,
        proto.producer_name,
        {p.key: p.value for p in proto.metadata_props},
        proto.doc_string,
        folder,
    )
    _check_defined(graph)
    graph.sort()
    return graph


def _check_defined(graph: Graph) -> None:
    """Raise ValueError where a node or an output of the model reads what nothing defines."""
    inputs = set(graph.inputs)
    for reader, value in [(n.label, v) for n in graph.nodes for v in n.reads()] + [
        ("the model", v) for v in graph.outputs
    ]:
        if not value.is_constant and value.producer is None and value not in inputs:
            raise ValueError(f"{reader} reads {value.name}, which nothing computes")


def _specialise(graph: Graph, input_shapes: Mapping[str, Sequence[int | str]], path: Path | None) -> None:
    named = {v.name: v for v in graph.inputs}
    substitution: dict[str, Extent] = {}
    for name, wanted in input_shapes.items():
        if name not in named:
            raise UserError(f"{path or 'the model'} has no input named {name}; its inputs are {', '.join(named)}")
        shape = named[name].shape
        if shape is None or len(shape) != len(wanted):
            raise UserError(f"input {name} has shape {_text(shape)}, which {_text(tuple(wanted))} does not fit")
        for have, want in zip(shape, wanted, strict=True):
            if isinstance(want, int) and want < 0:
                raise UserError(f"input {name} has shape {_text(shape)}, which {_text(tuple(wanted))} does not fit")
            extent: Extent = want if isinstance(want, int) else Dim(((want, 1),))
            if isinstance(have, int):
                if have != want:
                    raise UserError(f"input {name} has shape {_text(shape)}, which {_text(tuple(wanted))} does not fit")
                continue
            symbol = have.terms[0][0]
            if substitution.setdefault(symbol, extent) != extent:
                raise UserError(f"input shapes give {symbol} two values: {substitution[symbol]} and {extent}")
    for value in graph.inputs:
        if value.shape is not None:
            value.shape = tuple(substitution.get(e.terms[0][0], e) if isinstance(e, Dim) else e for e in value.shape)
    if substitution:  # what the file declares of inner shapes speaks of the old symbols
        for node in graph.nodes:
            for output in node.outputs:
                output.shape = None


def _text(shape: Sequence[Any] | None) -> str:
    return "?" if shape is None else "x".join(map(str, shape))


def to_model(graph: Graph, *, inline: bool = False, weights: bool = True) -> onnx.ModelProto:
    """The graph as a model; without `weights`, its large constants are left out (`large_constants` lists them).

    Weights nobody touched are shared with the model they were read from, external ones stay external.
    """
    if inline:
        graph = inlined(graph)
    tensors: dict[int, gs.Tensor] = {}

    def tensor_of(value: Value | None) -> gs.Tensor:
        if value is None:
            return gs.Variable.empty()
        if id(value) not in tensors:
            tensors[id(value)] = _to_tensor(value, weights)
        return tensors[id(value)]

    nodes = []
    names: set[str] = set()
    for node in graph.nodes:
        for value in node.captures:
            tensor_of(value)
        nodes.append(
            gs.Node(
                node.op,
                _unique(node.name or node.op, names),
                {k: gs.Constant("", v) if isinstance(v, np.ndarray) else v for k, v in node.attributes.items()},
                [tensor_of(v) for v in node.inputs],
                [tensor_of(v) for v in node.outputs],
                node.domain or None,
            )
        )
    source: Source = graph.source
    functions = function_protos(graph)
    imports = [onnx.helper.make_opsetid(i.domain, i.version) for i in source.imports if i.domain not in ("", "ai.onnx")]
    imports = [onnx.helper.make_opsetid("", graph.opset), *imports]
    used = {f.domain for f in functions} - {i.domain for i in imports}
    imports += [onnx.helper.make_opsetid(d, DOMAIN_VERSION) for d in sorted(used)]
    rebuilt = gs.Graph(
        nodes,
        [tensor_of(v) for v in graph.inputs],
        [tensor_of(v) for v in graph.outputs],
        name=graph.name,
        opset=graph.opset,
        import_domains=imports,
    )
    model = gs.export_onnx(rebuilt, do_type_check=False)
    present = {t.name for t in model.graph.initializer}
    captured = {v.name: v for n in graph.nodes for v in n.captures if v.is_constant and v.name not in present}
    captured = {n: v for n, v in captured.items() if weights or not _is_large(v)}
    for value in captured.values():
        model.graph.initializer.append(gs.exporters.onnx_exporter.OnnxExporter.export_tensor_proto(tensor_of(value)))
    model.ir_version = max(source.ir_version, 10) if functions else source.ir_version
    model.producer_name, model.doc_string = source.producer_name, source.doc
    for key, text in source.metadata.items():
        model.metadata_props.add(key=key, value=text)
    model.functions.extend(functions)
    for node, proto in zip(graph.nodes, model.graph.node, strict=True):
        for body in (a.g for a in proto.attribute if a.type == onnx.AttributeProto.GRAPH):
            _embed(body, source.folder)
        if node.domain and (overload := overload_of(node)):
            proto.overload = overload
    return model


def _unique(name: str, taken: set[str]) -> str:
    """The name, numbered where another node has it; ONNX Runtime refuses two of one name."""
    candidates = itertools.chain([name], (f"{name}_{k}" for k in itertools.count(1)))
    unique = next(c for c in candidates if c not in taken)
    taken.add(unique)
    return unique


def large_constants(graph: Graph) -> list[Value]:
    """The constants that are written one by one, in order of first use."""
    return [v for v in graph.values() if v.is_constant and _is_large(v)]


def _is_large(value: Value) -> bool:
    return (isinstance(value.source, onnx.TensorProto) and _is_external(value.source)) or value.nbytes > LARGE_BYTES


def _to_tensor(value: Value, weights: bool) -> gs.Tensor:
    if value.is_constant and (weights or not _is_large(value)):
        if isinstance(value.source, onnx.TensorProto):
            return gs.Constant(value.name, gs.ir.tensor.LazyValues(value.source))
        return gs.Constant(value.name, np.asarray(value.constant))
    shape = None if value.shape is None else [e if isinstance(e, int) else str(e) for e in value.shape]
    return gs.Variable(value.name, value.dtype, shape)


def write(graph: Graph, path: str | Path, *, inline: bool = False) -> None:
    """Write the graph as an ONNX file; weights beyond 1.8 GB in all go to `<file name>.data` beside it.

    Weights pass through memory one at a time. The caller makes the files appear whole (attnrewrite.atomic). Raises
    UserError where they cannot be written.
    """
    path = Path(path)
    if inline:
        graph = inlined(graph)
    weights = large_constants(graph)
    model = to_model(graph, weights=False)
    try:
        if sum(w.nbytes for w in weights) > EXTERNAL_DATA_LIMIT_BYTES:
            model.graph.initializer.extend(_beside(weights, path.with_name(f"{path.name}.data"), graph.source.folder))
            weights = []
        with path.open("wb") as file:
            write_model(model, [_reader(w) for w in weights], file)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def copy_model(path: Path, destination: Path) -> None:
    """Copy a model file as it is, and its external data beside it. Raises UserError where that fails."""
    proto = onnx.load(path, load_external_data=False)
    locations = {
        onnx.external_data_helper.ExternalDataInfo(t).location
        for t in _all_initializers(proto.graph)
        if _is_external(t)
    }
    try:
        shutil.copyfile(path, destination)
        for location in sorted(locations):
            copy = destination.parent / location
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.parent / location, copy)
    except OSError as error:
        raise UserError(f"{destination} cannot be written: {error.strerror or error}") from error


def _reader(value: Value) -> Callable[[], onnx.TensorProto]:
    return lambda: _tensor_proto(value)


def _tensor_proto(value: Value) -> onnx.TensorProto:
    """The constant as a tensor that holds its elements itself."""
    source = value.source
    if isinstance(source, onnx.TensorProto) and not _is_external(source) and source.name == value.name:
        return source
    return onnx.numpy_helper.from_array(np.ascontiguousarray(value.constant), value.name)


def _beside(weights: Sequence[Value], path: Path, folder: Path) -> Iterator[onnx.TensorProto]:
    """Write the tensors' bytes into one file; yields what the model says of each. `folder` holds external sources."""
    with path.open("wb") as file:
        for value in weights:
            file.write(b"\0" * (-file.tell() % 4096))
            offset = file.tell()
            data_type = _write_elements(value, folder, file)
            tensor = onnx.TensorProto(
                name=value.name, dims=map(static, value.known_shape), data_type=data_type, raw_data=b"0"
            )
            onnx.external_data_helper.set_external_data(tensor, path.name, offset, file.tell() - offset)
            tensor.ClearField("raw_data")
            yield tensor


def _write_elements(value: Value, folder: Path, file: BinaryIO) -> int:
    """Append a constant's raw bytes, straight from file to file where they lie in one; returns its ONNX data type."""
    source = value.source
    if isinstance(source, onnx.TensorProto) and _is_external(source):
        info = onnx.external_data_helper.ExternalDataInfo(source)
        with (folder / info.location).open("rb") as data:
            data.seek(info.offset or 0)
            left = value.nbytes
            while left and (chunk := data.read(min(left, COPIED_BYTES))):
                file.write(chunk)
                left -= len(chunk)
        return int(source.data_type)
    stored = _tensor_proto(value)
    if not stored.raw_data:
        stored = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(stored), value.name)
    file.write(stored.raw_data)
    return int(stored.data_type)


def _embed(body: onnx.GraphProto, folder: Path) -> None:
    """Take a subgraph's external weights into it: the file goes elsewhere."""
    for tensor in filter(_is_external, _all_initializers(body)):
        onnx.external_data_helper.load_external_data_for_tensor(tensor, str(folder))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _all_initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_initializers(attribute.g)
