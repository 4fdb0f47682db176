"""One indexing rule per data-movement operator: the equation is the docstring.

A rule takes a node, one of its outputs and the coordinates at which that output is read, and says which elements of
which inputs that reads. A rule that cannot express a node returns None: the operator is then not movement for whoever
asks. No rule knows what the data means; a new spelling of anything is one more function here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from attnrewrite.frontend.evaluate import python_slice
from attnrewrite.graph import STANDARD_DOMAIN, Node, Value
from attnrewrite.indexing.blocks import block_axes
from attnrewrite.indexing.map import Coordinate, Index, IndexingError, constant, reduced, reshape


@dataclass(frozen=True, eq=False)
class Read:
    """Elements read from one input; `where` (bool over the grid, None = everywhere) says at which grid points."""

    value: Value
    index: Index
    where: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Fill:
    """Grid points that read no tensor but one number."""

    number: float
    where: np.ndarray


Sources = list[Read | Fill]
Rule = Callable[[Node, Value, Index], Sources | None]
RULES: dict[str, Rule] = {}


def index_rule(*ops: str) -> Callable[[Rule], Rule]:
    """Register the rule of these operators (ONNX names)."""

    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, rule))
        return rule

    return register


def sources(node: Node, output: Value, index: Index) -> Sources | None:
    """What reading `output` at `index` reads; None where the node moves nothing but computes."""
    rule = RULES.get(node.op) if node.domain == STANDARD_DOMAIN else None
    if rule is None or any(v is not None and v.shape is None for v in node.inputs):
        return None
    return rule(node, output, index)


def _with(index: Index, axis: int, coordinate: Coordinate) -> Index:
    return (*index[:axis], coordinate, *index[axis + 1 :])


def _extent(value: Value, axis: int, what: str) -> int:
    extent = value.known_shape[axis]
    if not isinstance(extent, int):
        raise IndexingError(f"{what} along an axis of symbolic extent {extent}")
    return extent


def _elements(table: np.ndarray, at: tuple[np.ndarray, ...], index: Index) -> np.ndarray:
    """Elements of a constant at these positions, with one axis per grid axis also where the constant is a scalar."""
    rank = index[0].rank if index else 0
    return np.asarray(table[at] if at else table.reshape((1,) * rank))


@index_rule("Identity")
def identity(node: Node, output: Value, index: Index) -> Sources:
    """out[i] = in[i]."""
    return [Read(node.required(0), index)]


RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@index_rule(*RESHAPES)
def reshape_rule(node: Node, output: Value, index: Index) -> Sources | None:
    """out[i] = in[j] with i and j at the same row-major position.

    An input that no index can name (a symbolic batch merged behind another axis) is passed by where it is a reshape
    itself: the positions are those of its own input.
    """
    data = node.required(0)
    while output.shape is not None and data.shape is not None:
        try:
            return [Read(data, reshape(index, output.shape, data.shape))]
        except IndexingError:
            before = data.producer
            if before is None or before.op not in RESHAPES or before.domain != STANDARD_DOMAIN:
                raise
            data = before.required(0)
    return None


@index_rule("Transpose")
def transpose(node: Node, output: Value, index: Index) -> Sources:
    """out[i_0, i_1, ...] = in[j] with j[perm[k]] = i_k."""
    data = node.required(0)
    permutation = node.attributes.get("perm") or list(range(len(index)))[::-1]
    moved: list[Coordinate] = list(index)
    for axis, source in enumerate(permutation):
        moved[source] = index[axis]
    return [Read(data, tuple(moved))]


@index_rule("Slice")
def slice_rule(node: Node, output: Value, index: Index) -> Sources | None:
    """out[..., i, ...] = in[..., start + step * i, ...] for each sliced axis."""
    data, starts, ends = node.required(0), node.constant(1), node.constant(2)
    if starts is None or ends is None:
        return None
    axes = node.constant(3) if node.input(3) is not None else np.arange(len(starts))
    steps = node.constant(4) if node.input(4) is not None else np.ones(len(starts), np.int64)
    if axes is None or steps is None:
        return None
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes.tolist(), steps.tolist(), strict=True):
        axis %= len(index)
        if start == 0 and step == 1 and output.shape is not None and data.known_shape[axis] == output.shape[axis]:
            continue
        first = python_slice(start, end, step, _extent(data, axis, "a slice")).start
        index = _with(index, axis, index[axis] * step + first)
    return [Read(data, index)]


@index_rule("Split")
def split(node: Node, output: Value, index: Index) -> Sources | None:
    """out_k[..., i, ...] = in[..., offset_k + i, ...], offset_k the extents of the outputs before."""
    axis = node.attributes.get("axis", 0) % len(index)
    offset = 0
    for before in node.outputs:
        if before is output:
            break
        if before.shape is None:
            return None
        offset += _extent(before, axis, "a split")
    return [Read(node.required(0), _with(index, axis, index[axis] + offset))]


@index_rule("Concat")
def concat(node: Node, output: Value, index: Index) -> Sources:
    """out[..., i, ...] = in_k[..., i - offset_k, ...] for the k with offset_k <= i < offset_k + extent_k."""
    axis = node.attributes["axis"] % len(index)
    position = index[axis].static("a concatenation")
    offset, parts = 0, Sources()
    for k in range(len(node.inputs)):
        value = node.required(k)
        extent = _extent(value, axis, "a concatenation")
        where = reduced((position >= offset) & (position < offset + extent))
        if where.any():
            local = Coordinate(np.where(where, position - offset, 0))
            parts.append(Read(value, _with(index, axis, local), where))
        offset += extent
    return parts


@index_rule("Pad")
def pad(node: Node, output: Value, index: Index) -> Sources | None:
    """out[..., i, ...] = in[..., i - before, ...]; outside, the fill value (constant) or the mapped-back element."""
    data, pads = node.required(0), node.constant(1)
    mode = node.attributes.get("mode", "constant")
    if pads is None or (node.input(2) is not None and node.constant(2) is None):
        return None
    axes = node.constant(3) if node.input(3) is not None else np.arange(len(index))
    if axes is None:
        return None
    number = node.constant(2)
    fill = 0.0 if number is None else float(number.reshape(-1)[0])
    inside: np.ndarray = np.ones((1,) * index[0].rank, bool)
    half = len(pads) // 2
    for k, axis in enumerate(int(a) % len(index) for a in axes):
        before, after = int(pads[k]), int(pads[k + half])
        if before == 0 and after == 0:
            continue
        extent = _extent(data, axis, "padding")
        position = index[axis].static("padding") - before
        within = (position >= 0) & (position < extent)
        match mode:
            case "constant":
                inside = inside & within
                position = np.where(within, position, 0)
            case "edge":
                position = np.clip(position, 0, extent - 1)
            case "reflect" if extent > 1:
                period = 2 * (extent - 1)
                position = position % period
                position = np.where(position < extent, position, period - position)
            case "wrap":
                position = position % extent
            case _:
                return None
        index = _with(index, axis, Coordinate(position))
    if inside.all():
        return [Read(data, index)]
    return [Read(data, index, inside), Fill(fill, ~inside)]


@index_rule("Expand")
def expand(node: Node, output: Value, index: Index) -> Sources:
    """out[i] = in[j], j_k = i_k, or 0 where the input's extent is 1 (broadcasting)."""
    data = node.required(0)
    return [Read(data, broadcast_index(index, data))]


def broadcast_index(index: Index, value: Value) -> Index:
    """Coordinates of an operand that NumPy broadcasting reads at `index`."""
    shape = value.known_shape
    own = index[len(index) - len(shape) :]
    return tuple(constant(0, c.rank) if e == 1 else c for c, e in zip(own, shape, strict=True))


@index_rule("Tile")
def tile(node: Node, output: Value, index: Index) -> Sources:
    """out[..., i, ...] = in[..., i mod extent, ...]; what has extent 1 may be repeated a symbolic number of times."""
    data = node.required(0)
    for axis, (inner, outer) in enumerate(zip(data.known_shape, output.known_shape, strict=True)):
        if inner == 1:
            index = _with(index, axis, constant(0, index[axis].rank))
        elif inner != outer:
            position = index[axis].static("a repetition") % _extent(data, axis, "a repetition")
            index = _with(index, axis, Coordinate(reduced(position)))
    return [Read(data, index)]


@index_rule("Gather")
def gather(node: Node, output: Value, index: Index) -> Sources | None:
    """out[a..., i..., b...] = in[a..., table[i...], b...]."""
    data, table = node.required(0), node.constant(1)
    if table is None:
        return None
    axis = node.attributes.get("axis", 0) % len(data.known_shape)
    at = tuple(c.static("a gather index") for c in index[axis : axis + table.ndim])
    read = _elements(table, at, index).astype(np.int64)
    read = np.where(read < 0, read + _extent(data, axis, "a gather"), read)
    return [Read(data, (*index[:axis], Coordinate(reduced(read)), *index[axis + table.ndim :]))]


@index_rule("GatherND")
def gather_nd(node: Node, output: Value, index: Index) -> Sources | None:
    """out[i..., b...] = in[table[i..., :]..., b...] (batch_dims 0)."""
    data, table = node.required(0), node.constant(1)
    if table is None or node.attributes.get("batch_dims", 0):
        return None
    at = tuple(c.static("a gather index") for c in index[: table.ndim - 1])
    read = []
    for axis in range(table.shape[-1]):
        picked = _elements(table[..., axis], at, index).astype(np.int64)
        read.append(Coordinate(reduced(np.where(picked < 0, picked + _extent(data, axis, "a gather"), picked))))
    return [Read(data, (*read, *index[table.ndim - 1 :]))]


@index_rule("GatherElements")
def gather_elements(node: Node, output: Value, index: Index) -> Sources | None:
    """out[..., i, ...] = in[..., table[..., i, ...], ...] with the table as large as the output."""
    data, table = node.required(0), node.constant(1)
    if table is None:
        return None
    axis = node.attributes.get("axis", 0) % len(index)
    picked = np.asarray(table[tuple(c.static("a gather index") for c in index)], np.int64)
    picked = np.where(picked < 0, picked + _extent(data, axis, "a gather"), picked)
    return [Read(data, _with(index, axis, Coordinate(reduced(picked))))]


@index_rule("SpaceToDepth")
def space_to_depth(node: Node, output: Value, index: Index) -> Sources:
    """out[b, (dy * s + dx) * C + c, y, x] = in[b, c, y * s + dy, x * s + dx]."""
    data = node.required(0)
    size, channels = node.attributes["blocksize"], _extent(data, 1, "space to depth")
    packed = index[1].static("space to depth")
    block, channel = packed // channels, packed % channels
    row = index[2].static("space to depth") * size + block // size
    column = index[3].static("space to depth") * size + block % size
    return [Read(data, (index[0], Coordinate(reduced(channel)), Coordinate(reduced(row)), Coordinate(reduced(column))))]


@index_rule("DepthToSpace")
def depth_to_space(node: Node, output: Value, index: Index) -> Sources:
    """out[b, c, y * s + dy, x * s + dx] = in[b, (dy * s + dx) * C' + c, y, x] (DCR), or in[b, (c * s + dy) * s + dx, y,
    x] (CRD).
    """
    data = node.required(0)
    size = node.attributes["blocksize"]
    channels = _extent(data, 1, "depth to space") // size**2
    row, column = index[2].static("depth to space"), index[3].static("depth to space")
    block, channel = (row % size) * size + column % size, index[1].static("depth to space")
    crd = node.attributes.get("mode", "DCR") == "CRD"
    packed = channel * size**2 + block if crd else block * channels + channel
    rows, columns = Coordinate(reduced(row // size)), Coordinate(reduced(column // size))
    return [Read(data, (index[0], Coordinate(packed), rows, columns))]


@index_rule("Col2Im")
def blocks_side_by_side(node: Node, output: Value, index: Index) -> Sources | None:
    """out[b, c, l * stride + t * dilation - pad] = in[b, c * K + t, l] along every axis, 0 where no block lies.

    Blocks that overlap are added up, which is no movement.
    """
    axes = block_axes(node)
    tables = [] if axes is None else [axis.apart() for axis in axes]
    if axes is None or any(t is None for t in tables):
        return None
    rows = index[1].static("overlap-add")
    blocks: np.ndarray = np.zeros((1,) * rows.ndim, np.int64)
    inside: np.ndarray = np.ones((1,) * rows.ndim, bool)
    for axis, table, coordinate in zip(axes, tables, index[2:], strict=True):
        assert table is not None
        row, block = (t[coordinate.static("overlap-add")] for t in table)
        inside = inside & (row >= 0)
        rows, blocks = rows * axis.size + np.maximum(row, 0), blocks * axis.count + np.maximum(block, 0)
    inside = reduced(inside)
    moved = (index[0], Coordinate(reduced(rows)), Coordinate(reduced(blocks)))
    if inside.all():
        return [Read(node.required(0), moved)]
    return [Read(node.required(0), moved, inside), Fill(0.0, ~inside)]


@index_rule("Where")
def where(node: Node, output: Value, index: Index) -> Sources | None:
    """out[i] = a[i] where condition[i], else b[i]; the condition is constant, a constant branch is one number."""
    condition = node.constant(0)
    if condition is None:
        return None
    own = broadcast_index(index, node.required(0))
    chosen = reduced(_elements(condition, tuple(c.static("a selection") for c in own), index).astype(bool))
    parts = Sources()
    for k, taken in ((1, chosen), (2, ~chosen)):
        value = node.required(k)
        if not taken.any():
            continue
        if value.is_constant:
            elements = value.constant
            if elements.size == 0 or (elements != elements.reshape(-1)[0]).any():
                return None
            parts.append(Fill(float(elements.reshape(-1)[0]), taken))
        else:
            parts.append(Read(value, broadcast_index(index, value), taken))
    return parts


@index_rule("Conv")
def one_hot_convolution(node: Node, output: Value, index: Index) -> Sources | None:
    """out[b, o, p] = in[b, c_o, p * stride + tap_o * dilation - pad]: kernels with a single 1 move, nothing more.

    Depthwise ones, c_o = o // (filters per channel), or those of one group that take every tap of every channel
    (image patches); positions outside the input are zero.
    """
    data, weight = node.required(0), node.constant(1)
    if weight is None or data.shape is None or output.shape is None:
        return None
    group, spatial = node.attributes.get("group", 1), weight.ndim - 2
    depthwise = weight.shape[1] == 1 and group == data.shape[1]
    patches = group == 1 and weight.shape[0] == weight[0].size > weight.shape[1]
    if not depthwise and not patches:
        return None
    flat = weight.reshape(weight.shape[0], -1)
    if not ((flat == 1).sum(1) == 1).all() or np.count_nonzero(flat) != len(flat):
        return None
    bias = node.constant(2)
    if node.input(2) is not None and (bias is None or bias.any()):
        return None
    strides = node.attributes.get("strides") or [1] * spatial
    dilations = node.attributes.get("dilations") or [1] * spatial
    pads = _leading_pads(node, data, output, weight.shape[2:])
    if pads is None:
        return None
    filters = index[1].static("a convolution")
    within_group, *taps = np.unravel_index(flat.argmax(1), weight.shape[1:])
    channels = np.arange(weight.shape[0]) // (weight.shape[0] // group) * weight.shape[1] + within_group
    inside: np.ndarray = np.ones((1,) * filters.ndim, bool)
    moved = [index[0], Coordinate(reduced(channels[filters]))]
    for axis in range(spatial):
        tap = reduced(taps[axis][filters]) * dilations[axis]
        position = index[2 + axis].static("a convolution") * strides[axis] + tap - pads[axis]
        within = (position >= 0) & (position < _extent(data, 2 + axis, "a convolution"))
        inside = inside & within
        moved.append(Coordinate(np.where(within, position, 0)))
    if inside.all():
        return [Read(data, tuple(moved))]
    return [Read(data, tuple(moved), inside), Fill(0.0, ~inside)]


def _leading_pads(node: Node, data: Value, output: Value, kernel: tuple[int, ...]) -> list[int] | None:
    """How many zeros a convolution puts before the data, per spatial axis."""
    spatial = len(kernel)
    automatic = node.attributes.get("auto_pad", "NOTSET")
    if automatic == "NOTSET":
        return list(node.attributes.get("pads") or [0] * (2 * spatial))[:spatial]
    if automatic == "VALID":
        return [0] * spatial
    if automatic not in ("SAME_UPPER", "SAME_LOWER"):
        return None
    strides = node.attributes.get("strides") or [1] * spatial
    dilations = node.attributes.get("dilations") or [1] * spatial
    pads = []
    for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True)):
        extents = [_extent(v, 2 + axis, "a convolution") for v in (data, output)]
        total = max((extents[1] - 1) * stride + (size - 1) * dilation + 1 - extents[0], 0)
        pads.append(total // 2 if automatic == "SAME_UPPER" else total - total // 2)
    return pads
