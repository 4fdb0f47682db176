"""Pixels folded into channels inside windows, folded on the feature map instead.

Matches
    k = fold(partition(f(x))): keys, or values, of which each holds the channels of a cell of pixels of one window, f
    per-token operators, partition any movement of the tokens of the map x.
Rewrites to
    k = movement(space_to_depth(f(x))): the same operators on the map, its cells as pixels of a smaller map with more
    channels, and those put into the order the model has them in. The attention then becomes an op between two maps, and
    the movement is gone; space to depth stays, as the model's own.
Exact when
    the cells of all keys are congruent and tile the map, and every key holds the same channels of its cell in the same
    order.
Declines when
    the movement would not be gone in the end (tried on a copy): then nothing changes.
Source
    SRFormer, https://arxiv.org/abs/2303.09735.
"""

from __future__ import annotations

from attnrewrite.facts import Facts
from attnrewrite.graph import STANDARD_DOMAIN, Node
from attnrewrite.localattention.hoist import NOT_ON_MAP
from attnrewrite.localattention.pool_on_map import behind
from attnrewrite.localattention.space_to_depth import Fold, folds_of, write_fold
from attnrewrite.passes.fuse_window_attention import fuse_window_attention
from attnrewrite.pipeline import Pass, Pipeline
from attnrewrite.subgraph import copy_between

NAME = "move-folds"


def match_folds(facts: Facts, softmax: Node) -> tuple[Fold, ...] | None:
    """What the keys and values of an attention are folded from, if its movement goes away in the end."""
    if softmax.op != "Softmax" or softmax.domain != STANDARD_DOMAIN:
        return None
    return next((folds for folds in folds_of(facts, softmax) if _cancels(facts, softmax, folds)), None)


def rewrite_folds(facts: Facts, folds: tuple[Fold, ...]) -> None:
    for fold in folds:
        write_fold(Facts(facts.graph), fold, NAME)


def _cancels(facts: Facts, softmax: Node, folds: tuple[Fold, ...]) -> bool:
    """Whether nothing of the movement is left once the attention is rewritten: tried on a copy of its surroundings."""
    sources = [fold.source.value for fold in folds]
    region = [*(fold.folded for fold in folds), *behind(facts, softmax.output)]
    copy, copies = copy_between(facts, sources, region)
    anchor = copies[softmax.output].producer
    assert anchor is not None
    wanted = [copies[v] for v in sources]
    for found in folds_of(Facts(copy), anchor):
        if [fold.source.value for fold in found] != wanted:
            continue
        try:
            movement = [node for fold in found for node in write_fold(Facts(copy), fold, NAME)]
        except NOT_ON_MAP:
            return False
        outcome = Pipeline([fuse_window_attention]).run(copy)
        rewritten = any(s.verdict == "rewrite" and s.node == anchor.label for s in outcome.sites)
        return rewritten and not any(node in movement for node in copy.nodes)
    return False


move_folds = Pass(NAME, match_folds, rewrite_folds)
