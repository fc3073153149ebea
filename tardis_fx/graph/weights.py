"""Recognises weights: stored matrices and vectors, seen through views and casts that keep their values."""

from typing import Any

import torch
from torch import fx

from tardis_fx.graph.forms import CASTS, call_name, is_from_parameters, is_parameter, same, shape_of, value_of

#: Operations that select the weights of some experts.
_SELECTS = frozenset("contiguous expand getattr getitem index_select to transpose unsqueeze".split())


def stored_bias(bias: Any, *, columns: int, stacked: bool) -> fx.Node | None:
    """The stored bias, seen through views that broadcast alike; for stacked weights, one bias for each expert."""
    if not isinstance(bias, fx.Node):
        return None
    if stacked and (stack := stack_of(bias, dimensions=2)):
        return stack
    bias = stored(bias)
    while call_name(bias) in ("view", "reshape", "unsqueeze") and _is_row(bias) and isinstance(bias.args[0], fx.Node):
        bias = bias.args[0]
    shape = shape_of(bias)
    return bias if shape is not None and same(shape, (columns,)) and is_weight(bias) else None


def _is_row(node: fx.Node) -> bool:
    """Whether all axes but the last have size 1."""
    shape = shape_of(node)
    return shape is not None and len(shape) > 0 and all(same(size, 1) for size in shape[:-1])


def stored(node: fx.Node) -> fx.Node:
    """The node before casts that change no type, and so return the tensor itself."""
    while call_name(node) in CASTS and len(node.args) < 3 and not node.kwargs.get("copy"):
        if not isinstance(node.args[0], fx.Node):
            break
        before, after = value_of(node.args[0]), value_of(node)
        if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
            break
        node = node.args[0]
    return node


def stack_of(node: fx.Node, dimensions: int) -> fx.Node | None:
    """The parameter that holds a matrix or a bias for each expert, before the operations that select some of them."""
    while call_name(node) in _SELECTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    shape = shape_of(node)
    return node if is_parameter(node) and shape is not None and len(shape) == dimensions else None


def is_weight(node: fx.Node) -> bool:
    """Whether the node is a placeholder, or computed from parameters alone (a parametrised weight)."""
    return node.op in ("placeholder", "get_attr") or is_from_parameters(node)


def transposes(node: fx.Node) -> bool:
    """Whether the node is the transposed view of a matrix, judged by the strides that Dynamo recorded."""
    if call_name(node) not in ("t", "transpose", "swapaxes", "swapdims", "permute", "getattr", "adjoint"):
        return False
    before, after = node.all_input_nodes[0].meta.get("example_value"), node.meta.get("example_value")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dim() == after.dim() > 1):
        return False
    swapped = (*before.shape[:-2], before.shape[-1], before.shape[-2])
    strides = (*before.stride()[:-2], before.stride()[-1], before.stride()[-2])
    return same(after.shape, swapped) and same(after.stride(), strides)
