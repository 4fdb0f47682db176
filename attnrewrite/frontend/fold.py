"""Shapes, constants and shape arithmetic, in one forward walk; and the removal of what does nothing or is never taken.

A TorchScript export is mostly shape arithmetic. Here every result that is a constant, or an exact expression of the
model's symbolic extents, is computed once; what remains is the model's actual work.
"""

from __future__ import annotations

import numpy as np

from attnrewrite.dims import Dim, Extent, NonAffine, Shape, elements, is_static
from attnrewrite.frontend.branches import names_in_several_branches, taken_branch
from attnrewrite.frontend.evaluate import NOT_FOLDED, NUMPY_OPS, evaluate
from attnrewrite.frontend.shapes import Contents, infer
from attnrewrite.graph import STANDARD_DOMAIN, Graph, Node, Value

# A folded result may be this much larger than what it was computed from; a broadcast mask must not fill the file.
GROWTH_LIMIT_BYTES = 1 << 25
# A transposed constant beyond this is a view of the other.
COPIED_BYTES = 1 << 20
# Contents of computed (not initialiser) tensors are followed while they are this small: shapes and axes are.
SYMBOLIC_LIMIT = 4096

# Reductions that leave a single number as it is.
OF_ONE_IS_ITSELF = frozenset({"ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum", "ReduceProd"})


def fold(graph: Graph) -> None:
    """Infer shapes, fold constants and normalise shape operands, in place."""
    contents: dict[Value, np.ndarray] = {}

    def content(value: Value | None) -> np.ndarray | None:
        if value is None:
            return None
        return value.constant if value.is_constant else contents.get(value)

    outputs = set(graph.outputs)
    replaced: dict[Value, Value] = {}
    kept: list[Node] = []
    waiting = graph.nodes[::-1]
    ambiguous = names_in_several_branches(graph)
    while waiting:
        node = waiting.pop()
        node.inputs = [replaced.get(v, v) if v is not None else None for v in node.inputs]
        condition = content(node.input(0)) if node.op == "If" else None
        if condition is not None and condition.size == 1 and (taken := taken_branch(graph, node, condition, ambiguous)):
            waiting += taken[::-1]
            continue
        if outputs.isdisjoint(node.outputs) and _fold_node(node, content, contents, graph.opset):
            if all(o.is_constant for o in node.outputs):
                continue
        else:
            for output, (shape, dtype) in zip(node.outputs, infer(node, content, graph.opset), strict=True):
                output.shape = shape if shape is not None else output.shape
                output.dtype = dtype if dtype is not None else output.dtype
        same = does_nothing(node, content)
        if same is not None and node.output not in outputs:
            replaced[node.output] = same
            if same in contents:
                contents[node.output] = contents[same]
        else:
            _normalise(graph, node)
        kept.append(node)
    graph.nodes = kept  # nodes that do nothing stay where a subgraph reads their result: it knows it by name
    graph.remove_dead()


def _fold_node(node: Node, content: Contents, contents: dict[Value, np.ndarray], opset: int) -> bool:
    """Compute the node's results if its inputs are known; says whether it did."""
    if node.captures or node.domain != STANDARD_DOMAIN or node.op in NOT_FOLDED or not node.outputs:
        return False
    if node.op in ("Shape", "Size"):
        shape = node.required(0).shape
        if shape is None:
            return False
        return _store(node, [_shape_content(node, shape)], contents)
    if node.op == "Constant":
        return False  # the frontend reads these as constants
    if (
        node.op == "CastLike"
        and (data := node.required(0)).is_constant
        and (dtype := node.required(1).dtype) is not None
    ):
        return _store(node, [data.constant.astype(dtype)], contents)
    if not all(v is None or v.is_constant or v in contents for v in node.inputs):
        return False
    if not any(v is not None for v in node.inputs):
        return False
    symbolic = any(v in contents for v in node.inputs if v is not None)
    if symbolic and (node.op not in NUMPY_OPS or _size(node) > SYMBOLIC_LIMIT):
        return False
    try:
        results = evaluate(node, [content(v) for v in node.inputs], opset)
    except (NonAffine, ValueError, TypeError, IndexError):
        return False
    read = sum(v.nbytes for v in node.inputs if v is not None and v.is_constant)
    if sum(r.nbytes for r in results) > read + GROWTH_LIMIT_BYTES:
        return False
    return _store(node, results, contents)


def _size(node: Node) -> int:
    shapes = [v.shape for v in node.inputs if v is not None and v.shape is not None and is_static(v.shape)]
    return max(map(elements, shapes), default=0)


def _shape_content(node: Node, shape: Shape) -> np.ndarray:
    extents: list[Extent] = list(shape)[node.attributes.get("start", 0) : node.attributes.get("end")]
    if node.op == "Size":
        total: Extent = 1
        for extent in extents:
            total = total * extent
        return _array(total)
    result = np.empty(len(extents), object)
    result[:] = extents
    return _array(result)


def _array(value: object) -> np.ndarray:
    array = np.asarray(value, dtype=object)
    return array if any(isinstance(x, Dim) for x in array.reshape(-1)) else array.astype(np.int64)


def _store(node: Node, results: list[np.ndarray], contents: dict[Value, np.ndarray]) -> bool:
    for output, result in zip(node.outputs, results, strict=True):
        output.shape = tuple(result.shape)
        if result.dtype == object:
            contents[output] = result
            output.dtype = output.dtype or np.dtype(np.int64)
        else:
            if output.dtype is not None and result.dtype != output.dtype and np.issubdtype(result.dtype, np.integer):
                result = result.astype(output.dtype)
            output.dtype = result.dtype
            viewed = (
                node.op == "Transpose" and result.nbytes > COPIED_BYTES
            )  # of weights: the elements stay where they are
            output.set_constant(result if viewed or not result.ndim else np.ascontiguousarray(result))
    return True


def does_nothing(node: Node, content: Contents) -> Value | None:
    """The input that the node passes on unchanged, or None."""
    if node.domain != STANDARD_DOMAIN or not node.outputs or node.input(0) is None:
        return None
    data, out = node.required(0), node.outputs[0]
    same_shape = data.shape is not None and data.shape == out.shape
    match node.op:
        case "Identity":
            return data
        case "Dropout":
            training = content(node.input(2))
            unused_mask = len(node.outputs) == 1
            return (
                data
                if unused_mask and (node.input(2) is None or (training is not None and not training.any()))
                else None
            )
        case "Cast" | "CastLike":
            return data if data.dtype is not None and data.dtype == out.dtype else None
        case "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" | "Expand":
            return data if same_shape else None
        case op if op in OF_ONE_IS_ITSELF:
            return data if same_shape else None  # over axes of extent 1
        case "Pad" | "Slice":
            steps = content(node.input(4)) if node.op == "Slice" else None
            forward = steps is None or bool((np.asarray(steps) > 0).all())
            return data if same_shape and forward and _moves_nothing(node, content) else None
        case "Transpose":
            permutation = node.attributes.get("perm")
            return data if permutation is not None and list(permutation) == sorted(permutation) else None
        case "Concat" | "Sum" | "Max" | "Min":
            return data if len(node.inputs) == 1 else None
    return None


def _moves_nothing(node: Node, content: Contents) -> bool:
    """A Pad of equal shape may still shift (pad 1 here, crop 1 there); a Slice of equal shape with step > 0 cannot."""
    if node.op == "Slice":
        return True
    pads = content(node.input(1))
    return pads is not None and not np.asarray(pads).any()


def _normalise(graph: Graph, node: Node) -> None:
    """Write the target of a Reshape or Expand of known shape as a constant, symbolic extents aside; a reduction that
    only drops axes of extent 1 as a Reshape.
    """
    if node.op in OF_ONE_IS_ITSELF and node.domain == STANDARD_DOMAIN and _drops_ones(node):
        node.op, node.attributes = "Reshape", {}
        node.inputs = [node.required(0), Value(graph.fresh_name(f"{node.output.name}_shape"), (0,), np.dtype(np.int64))]
    if node.op not in ("Reshape", "Expand") or node.domain != STANDARD_DOMAIN:
        return
    shape = node.output.shape
    extents = None if shape is None else _reshape_target(shape) if node.op == "Reshape" else _expand_target(node, shape)
    if extents is None:
        return
    target = np.array(extents, np.int64)
    present = node.constant(1)
    if present is not None and np.array_equal(present, target):
        return
    node.inputs[1] = Value(graph.fresh_name(f"{node.output.name}_shape"), target.shape, target.dtype, target)
    node.attributes.pop("allowzero", None)


def _drops_ones(node: Node) -> bool:
    """Whether input and output have the same extents but for ones, at least one of which the output lacks."""
    before, after = node.required(0).shape, node.output.shape
    if before is None or after is None or len(before) == len(after) or _reshape_target(after) is None:
        return False
    return [e for e in before if e != 1] == [e for e in after if e != 1]


def _reshape_target(shape: Shape) -> list[int] | None:
    """-1 for the one symbolic extent; None where there are several, or an extent of 0 means something else."""
    if sum(isinstance(e, Dim) for e in shape) > 1 or 0 in shape:
        return None
    return [e if isinstance(e, int) else -1 for e in shape]


def _expand_target(node: Node, shape: Shape) -> list[int] | None:
    """1 for a symbolic extent that the input has already; None where the input is expanded to a symbolic extent."""
    own = node.required(0).shape
    if own is None:
        return None
    own = (1,) * (len(shape) - len(own)) + tuple(own)
    if any(isinstance(e, Dim) and e != o for e, o in zip(shape, own, strict=True)):
        return None
    return [e if isinstance(e, int) else 1 for e in shape]
