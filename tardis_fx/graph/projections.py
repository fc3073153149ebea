"""The table of projections: every way to write a multiplication by a weight matrix that the matcher reads.

A form that multiplies by a weight in a way that no rewrite may take (scaled terms, stacked experts, a convolution) is
read as well, with the reason, so that an FFN made of it is listed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tardis_fx.graph.forms import CASTS, bind, call_name, is_from_parameters, is_parameter, shape_of, value_of
from tardis_fx.graph.site import Projection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

STACKED = "its weights are stacked, one matrix an expert: its tokens are routed"


def projection(node: fx.Node) -> Projection | None:
    """Reads a node as a matrix multiplication by a weight matrix, with the bias where the node adds one."""
    reader = _READERS.get(call_name(node) or "")
    return reader(node) if reader else None


def _linear(node: fx.Node) -> Projection | None:
    return _read(node, *bind(node, "input", "weight", "bias"), transposed=False)


def _matmul(node: fx.Node) -> Projection | None:
    x, weight = bind(node, "input", "other" if "other" in node.kwargs else "mat2")
    return _read(node, x, weight, transposed=True) or _by_selected(node, weight=x, x=weight)


def _addmm(node: fx.Node) -> Projection | None:
    bias, x, weight, beta, alpha = bind(node, "input", "mat1", "mat2", "beta", "alpha")
    found = _read(node, x, weight, bias, transposed=True)
    return found and _unless(found, beta in (None, 1) and alpha in (None, 1), "its addmm scales what it adds")


def _grouped(node: fx.Node) -> Projection | None:
    """One matrix a group of tokens; by a single matrix it would be groups of columns."""
    found = _matmul(node)
    return found if found and found.reason == STACKED else None


def _tensordot(node: fx.Node) -> Projection | None:
    x, weight, dims = bind(node, "a", "b", "dims")
    shape = shape_of(x) if isinstance(x, fx.Node) else None
    if shape is None:
        return None
    if isinstance(dims, (tuple, list)) and [len(side) for side in dims] == [1, 1]:
        (last,), (column,) = dims
        found = _read(node, x, weight, transposed=column in (0, -2))
        return found and _unless(found, last in (-1, len(shape) - 1), "its tensordot sums over another axis")
    return _read(node, x, weight, transposed=True) if dims == 1 else None


def _einsum(node: fx.Node) -> Projection | None:
    equation, *operands = node.args
    if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
        return None
    terms, result = equation.replace(" ", "").replace("...", ".").split("->")
    sides = list(zip(terms.split(","), operands, strict=True))
    for (rows, x), (matrix, weight) in (sides, sides[::-1]):
        own = set(matrix[-2:])  # the first letter of three tells the expert
        ins, outs = (own & set(rows)) - set(result), (own & set(result)) - set(rows)
        if len(ins) != 1 or len(outs) != 1:
            continue
        (i,), (o,) = ins, outs
        transposed = matrix.index(i) < matrix.index(o)
        if found := _read(node, x, weight, transposed=transposed):
            plain = rows[-1] == i and result == rows[:-1] + o and len(set(rows)) == len(rows)
            return _unless(found, plain, f"its einsum {equation!r} does more than multiply by a matrix")
    return None


def _conv1d(node: fx.Node) -> Projection | None:
    x, weight, bias = bind(node, "input", "weight", "bias")
    shape = shape_of(weight) if isinstance(weight, fx.Node) else None
    if shape is None or shape[2:] != (1,) or not isinstance(x, fx.Node) or not is_from_parameters(weight):
        return None
    return Projection(node, node, x, weight, bias, False, "its projection is a convolution")


def _biased(node: fx.Node) -> Projection | None:
    one, other, alpha = bind(node, "input", "other", "alpha")
    for product, bias in ((one, other), (other, one)):
        inner = projection(product) if isinstance(product, fx.Node) and call_name(product) not in _ADDS else None
        if inner and inner.bias is None and len(inner.node.users) == 1 and (bias := _bias(bias, inner)):
            found = replace(inner, node=node, bias=bias)
            return _unless(found, alpha in (None, 1), "its bias is scaled")
    return None


def _squeezed(node: fx.Node) -> Projection | None:
    """The last step of a product with a matrix selected for each token."""
    inner = _matmul(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    return replace(inner, node=node) if inner and inner.reason else None


_ADDS = ("add", "iadd")

#: Between the stored weights of all experts and those of the ones that are wanted.
_SELECTS = frozenset("contiguous expand getattr getitem index_select to transpose unsqueeze".split())

_READERS: Mapping[str, Callable[[fx.Node], Projection | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "conv1d": _conv1d,
    "squeeze": _squeezed,
} | dict.fromkeys(_ADDS, _biased)


def _unless(found: Projection, accepted: bool, reason: str) -> Projection:
    return found if accepted or found.reason else replace(found, reason=reason)


def _read(node: fx.Node, x: Any, weight: Any, bias: Any = None, *, transposed: bool) -> Projection | None:
    while isinstance(weight, fx.Node) and _transposes(weight):
        weight, transposed = weight.args[0], not transposed
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)) or shape_of(x) is None:
        return None
    weight, reason = _stored(weight), None
    if stack := _stack(weight, dimensions=3):
        weight, reason = stack, STACKED
    elif shape_of(weight) is None or len(weight.meta["example_value"].shape) != 2 or not _is_weight(weight):
        return None
    found = Projection(node, node, x, weight, None, transposed, reason)
    if bias is None:
        return found
    stored = _bias(bias, found)
    return _unless(replace(found, bias=stored), stored is not None, "its bias is not a stored number for each column")


def _by_selected(node: fx.Node, weight: Any, x: Any) -> Projection | None:
    """``bmm(weights of each token's expert, token as a column)``."""
    if not (isinstance(x, fx.Node) and call_name(x) == "unsqueeze" and x.args[1:] in ((-1,), (2,))):
        return None
    found = _read(node, x.args[0], weight, transposed=False)
    return found if found and found.reason else None


def _bias(bias: Any, of: Projection) -> fx.Node | None:
    """The stored bias, behind views of it that broadcast as it does; of stacked weights a bias for each expert."""
    if not isinstance(bias, fx.Node):
        return None
    if of.reason == STACKED and (stack := _stack(bias, dimensions=2)):
        return stack
    bias = _stored(bias)
    while call_name(bias) in ("view", "reshape", "unsqueeze") and _numel(bias) == _last(bias) == _numel(bias.args[0]):
        bias = bias.args[0]  # type: ignore[assignment]
    shape = shape_of(bias)
    return bias if shape is not None and shape == (of.sizes[1],) and _is_weight(bias) else None


def _numel(node: Any) -> int | None:
    value = value_of(node) if isinstance(node, fx.Node) else None
    return None if value is None else value.numel()


def _last(node: fx.Node) -> Any:
    shape = shape_of(node)
    return shape[-1] if shape else None


def _stored(node: fx.Node) -> fx.Node:
    """The node behind casts that change no type: they return the tensor itself."""
    while call_name(node) in CASTS and not node.kwargs.get("copy") and isinstance(node.args[0], fx.Node):
        before, after = value_of(node.args[0]), value_of(node)
        if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
            break
        node = node.args[0]
    return node


def _stack(node: fx.Node, dimensions: int) -> fx.Node | None:
    """The parameter that holds a matrix or a bias for each expert, behind what selects some of them."""
    while call_name(node) in _SELECTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    shape = shape_of(node)
    return node if is_parameter(node) and shape is not None and len(shape) == dimensions else None


def _is_weight(node: fx.Node) -> bool:
    """A placeholder, or something computed from parameters alone (a parametrised weight)."""
    return node.op in ("placeholder", "get_attr") or is_from_parameters(node)


def _transposes(node: fx.Node) -> bool:
    """Whether the node is the transposed view of a matrix, read off the strides that Dynamo recorded."""
    if call_name(node) not in ("t", "transpose", "swapaxes", "swapdims", "permute", "getattr", "adjoint"):
        return False
    before, after = node.all_input_nodes[0].meta.get("example_value"), node.meta.get("example_value")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dim() == after.dim() > 1):
        return False
    swapped = (*before.shape[:-2], before.shape[-1], before.shape[-2])
    strides = (*before.stride()[:-2], before.stride()[-1], before.stride()[-2])
    return after.shape == swapped and after.stride() == strides
