"""What a graph shows of the size of a value: bounds of its elements for any input, and whether it is normalised."""

from collections.abc import Sequence
from math import inf

from torch import fx

from tardis_fx.graph.forms import bind, call_name, is_transparent, walk
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
    while not changes(writes, node, node, reader):
        if not is_transparent(node):
            return _bounds(node)
        node = node.all_input_nodes[0]
    return -inf, inf


def _bounds(node: fx.Node) -> Bounds:
    name = call_name(node)
    if name in ("clamp", "clip"):
        _, low, high = bind(node, "input", "min", "max")
    elif name == "hardtanh":
        _, low, high = bind(node, "input", "min_val", "max_val")
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    else:
        return _BOUNDS.get(name or "", (-inf, inf))
    return low if isinstance(low, (int, float)) else -inf, high if isinstance(high, (int, float)) else inf


_SIZES = frozenset("layer_norm linalg_vector_norm mean norm normalize pow rms_norm square std var var_mean".split())


def is_normalised(node: fx.Node) -> bool:
    """Whether a tensor is normalised, and not added to others: errors in it matter relative to its own size."""
    copies = set(walk(node, lambda n: (user for user in n.users if is_transparent(user) and user.args[0] is n)))
    names = {call_name(user) for copy in copies for user in copy.users if user not in copies}
    return not names.isdisjoint(_SIZES) and names.isdisjoint({"add", "iadd"})
