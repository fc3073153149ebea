"""Lower and upper bounds of the elements of a value that hold for any input of the model."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

from torch import fx

from tardis_fx.graph.forms import call_name, is_transparent
from tardis_fx.graph.writes import Write, changes

Bounds = tuple[float, float]

_BOUNDS: dict[str, Bounds] = {
    "abs": (0, inf), "exp": (0, inf), "hardsigmoid": (0, 1), "relu": (0, inf), "relu6": (0, 6), "sigmoid": (0, 1),
    "softmax": (0, 1), "softplus": (0, inf), "sqrt": (0, inf), "square": (0, inf), "tanh": (-1, 1),
}  # fmt: skip


def bounds_of(node: fx.Node, reader: fx.Node, writes: Sequence[Write]) -> Bounds:
    """Lower and upper bound of a tensor, up to rounding; infinite if the graph does not show them.

    Args:
        node: a tensor.
        reader: the node that reads it.
        writes: all writes of the graph; a tensor that is written to has no bounds.
    """
    while is_transparent(node) and not changes(writes, node, node, reader):
        node = node.all_input_nodes[0]
    if changes(writes, node, node, reader):
        return -inf, inf
    name = call_name(node)
    if name in ("clamp", "clip", "hardtanh"):
        named = ("min", "max") if name != "hardtanh" else ("min_val", "max_val")
        default = (None, None) if name != "hardtanh" else (-1.0, 1.0)
        low, high = (
            node.args[i + 1] if len(node.args) > i + 1 else node.kwargs.get(named[i], default[i]) for i in range(2)
        )
        return _number(low, -inf), _number(high, inf)
    return _BOUNDS.get(name or "", (-inf, inf))


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, (int, float)) else otherwise
