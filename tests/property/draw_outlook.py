"""Random sums over neighbourhoods with predicted weights: outlook attention with its fold (VOLO), local attenders and
dynamic kernels (UPLiFT, DLGSANet).
"""

from __future__ import annotations

import random

import onnx

from attnrewrite.localattention.geometry import NeighborhoodGeometry
from tests.models import onnx_neighborhoods as neighborhoods
from tests.models import onnx_outlook as outlook
from tests.models.onnx_outlook import Aggregation, Outlook

MOVEMENTS = [
    neighborhoods.by_slices,
    neighborhoods.by_slices_of_both_axes,
    neighborhoods.by_rows_then_columns,
    neighborhoods.by_shifting_the_map,
    neighborhoods.by_unfold,
    neighborhoods.by_tensor_unfold,
    neighborhoods.by_flat_gather,
]
SUMS = [outlook.by_product, outlook.by_einsum, outlook.by_matmul, outlook.one_by_one]


def draw_aggregation(r: random.Random, opset: int) -> tuple[onnx.ModelProto, list[str]]:
    """Neighbours at fixed offsets weighted with what a layer predicts, with a softmax over them or without."""
    kernel = (r.choice([3, 3, 5]), r.choice([3, 3, 5]))
    dilation = (r.choice([1, 1, 2]), r.choice([1, 1, 2]))
    reach = [d * (k // 2) for k, d in zip(kernel, dilation, strict=True)]
    size = (reach[0] + r.randint(3, 6), reach[1] + r.randint(3, 8))
    model = Aggregation(
        NeighborhoodGeometry(size, kernel, dilation),
        r.choice(MOVEMENTS),
        r.choice(SUMS),
        softmax=r.random() < 0.5,
        tokens=r.random() < 0.5,
        scale=r.choice([None, 0.25]),
        bias=r.random() < 0.4,
        batch=r.choice([1, 2, "batch"]),
    )
    names = [f"aggregation/{model.gathering.__name__}", f"aggregation/{model.sum.__name__}", f"batch/{model.batch}"]
    return model.model(), [*names, f"aggregation/{'softmax' if model.softmax else 'weights'}"]


def draw_outlook(r: random.Random, opset: int) -> tuple[onnx.ModelProto, list[str]]:
    """k x k weights for every place of a block, the blocks folded back onto the map."""
    stride = r.choice([(1, 1), (1, 1), (2, 2)])
    if stride == (1, 1):
        geometry = NeighborhoodGeometry((r.randint(4, 8), r.randint(4, 9)), (3, 3), (1, 1))
    else:
        blocks = (r.randint(3, 5), r.randint(3, 5))
        size = (2 * blocks[0] - r.randrange(2), 2 * blocks[1] - r.randrange(2))
        geometry = NeighborhoodGeometry(blocks, (3, 3), (1, 1), stride=stride, key_size=size, offset=(-1, -1))
    folding = r.choice([outlook.fold, outlook.added_up]) if stride == (1, 1) else outlook.fold
    model = Outlook(geometry, folding, softmax=r.random() < 0.7, batch=r.choice([1, 2, "batch"]))
    names = [f"outlook/{folding.__name__}", f"outlook/stride/{stride[0]}", f"batch/{model.batch}"]
    return model.model(), [*names, f"outlook/{'softmax' if model.softmax else 'weights'}"]
