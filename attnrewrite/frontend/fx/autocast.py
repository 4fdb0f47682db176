"""New nodes among those that autocast reaches: they say every conversion themselves, so that it is off around them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, Node

DEVICES = ("cpu", "cuda")


def without_autocast(graph: Graph, fresh: Collection[Node]) -> None:
    """Switch autocast off around the fresh nodes that run under it: in regions that Dynamo has put into the graph, or
    because it is on while the graph is made, as it is then when it is run.
    """
    around = {device for device in DEVICES if torch.is_autocast_enabled(device)}
    regions: dict[Node, str] = {}
    off: list[Node] = []
    for node in list(graph.nodes):
        computes = node in fresh and node.op == "call_function"
        with graph.inserting_before(node):
            if computes and not off:
                devices = sorted(around | set(regions.values()))
                off = [graph.call_function(_enter_autocast, (device, None, False, None)) for device in devices]
            elif off and not computes and node.op != "get_attr":
                for entered in reversed(off):
                    graph.call_function(_exit_autocast, (entered,))
                off = []
        if node.target is _enter_autocast:
            regions[node] = node.args[0]
        elif node.target is _exit_autocast:
            del regions[node.args[0]]
