"""Heads that read different windows of one map (half of them shifted, all in one softmax)."""

from __future__ import annotations

import numpy as np

from attnrewrite.facts import Facts
from attnrewrite.localattention.attention import Attention
from attnrewrite.localattention.maps import read_ways
from attnrewrite.localattention.site import Decline
from attnrewrite.localattention.tokens import candidates


def heads_apart(facts: Facts, attention: Attention) -> Decline | None:
    """The decline of heads that read other tokens than head 0 reads; None where all read the same.

    An axis that merely numbers heads beside tokens differs from head to head by one distance for all tokens.
    """
    ways = read_ways(facts, attention)
    if isinstance(ways, Decline) or len(ways.heads) != 1:
        return None
    (head_axis,) = ways.heads
    for operand in (attention.query, attention.key, attention.value):
        for candidate in candidates(operand.value, operand.index, attention.channel_axis, facts.positions):
            for coordinate in candidate.index:
                reads = coordinate.depends_on()
                if head_axis not in reads or not reads - ways.features:
                    continue
                values = np.moveaxis(coordinate.values, head_axis, 0)
                values = values.reshape(len(values), -1)
                apart = values - values[:1]
                differs = (apart != apart[:, :1]).any(axis=1)
                if differs.any():
                    first = int(np.argmax(differs))
                    reason = f"head {first} reads other pixels than head {first - 1}"
                    return Decline(reason, candidate.value.name)
    return None
