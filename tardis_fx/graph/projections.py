"""The table of projections: every form of multiplication by a weight matrix that the matcher reads.

A form that no rewrite may take (scaled terms, stacked experts, a convolution) is read as well, with the reason, so that
an FFN made of it is listed.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from tardis_fx.graph.forms import bind, call_name, is_from_parameters, shape_of
from tardis_fx.graph.site import Projection
from tardis_fx.graph.weights import is_weight, stack_of, stored, stored_bias, transposes

STACKED = "its weights are stacked, one matrix per expert: its tokens are routed"


def projection(node: fx.Node) -> Projection | None:
    """Reads a node as a matrix multiplication by a weight matrix, with the bias if the node adds one."""
    reader = _READERS.get(call_name(node) or "")
    return reader(node) if reader else None


def _linear(node: fx.Node) -> Projection | None:
    return _read(node, *bind(node, "input", "weight", "bias"), transposed=False)


def _matmul(node: fx.Node) -> Projection | None:
    x, weight = bind(node, "input", "other" if "other" in node.kwargs else "mat2")
    return _read(node, x, weight, transposed=True) or _by_selected(node, weight=x, x=weight)


def _addmm(node: fx.Node) -> Projection | None:
    bias, x, weight, beta, alpha = bind(node, "input", "mat1", "mat2", "beta", "alpha")
    product = _read(node, x, weight, bias, transposed=True)
    return product and _unless(product, beta in (None, 1) and alpha in (None, 1), "its addmm scales its terms")


def _grouped(node: fx.Node) -> Projection | None:
    """One matrix per group of tokens; with a single matrix the groups would be of columns."""
    product = _matmul(node)
    return product if product and product.reason == STACKED else None


def _tensordot(node: fx.Node) -> Projection | None:
    x, weight, dims = bind(node, "a", "b", "dims")
    shape = shape_of(x) if isinstance(x, fx.Node) else None
    if shape is None:
        return None
    if isinstance(dims, (tuple, list)) and [len(side) for side in dims] == [1, 1]:
        (last,), (column,) = dims
        product = _read(node, x, weight, transposed=column in (0, -2))
        return product and _unless(product, last in (-1, len(shape) - 1), "its tensordot sums over another axis")
    return _read(node, x, weight, transposed=True) if dims == 1 else None


def _einsum(node: fx.Node) -> Projection | None:
    equation, *operands = node.args
    if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
        return None
    terms, result = equation.replace(" ", "").replace("...", ".").split("->")
    sides = list(zip(terms.split(","), operands, strict=True))
    for (rows, x), (matrix, weight) in (sides, sides[::-1]):
        axes = set(matrix[-2:])  # the first of three letters is the expert
        ins, outs = (axes & set(rows)) - set(result), (axes & set(result)) - set(rows)
        if len(ins) != 1 or len(outs) != 1:
            continue
        (i,), (o,) = ins, outs
        transposed = matrix.index(i) < matrix.index(o)
        if product := _read(node, x, weight, transposed=transposed):
            plain = rows[-1] == i and result == rows[:-1] + o and len(set(rows)) == len(rows)
            return _unless(product, plain, f"its einsum {equation!r} does more than multiply by a matrix")
    return None


def _conv1d(node: fx.Node) -> Projection | None:
    x, weight, bias = bind(node, "input", "weight", "bias")
    shape = shape_of(weight) if isinstance(weight, fx.Node) else None
    if shape is None or shape[2:] != (1,) or not isinstance(x, fx.Node) or not is_from_parameters(weight):
        return None
    return Projection(node, node, x, weight, bias, False, "its projection is a convolution")


def _biased(node: fx.Node) -> Projection | None:
    left, right, alpha = bind(node, "input", "other", "alpha")
    for term, bias in ((left, right), (right, left)):
        product = projection(term) if isinstance(term, fx.Node) and call_name(term) not in _ADDS else None
        if product and product.bias is None and len(product.node.users) == 1 and (bias := _bias_of(product, bias)):
            return _unless(replace(product, node=node, bias=bias), alpha in (None, 1), "its bias is scaled")
    return None


def _squeezed(node: fx.Node) -> Projection | None:
    """The last step of a product with a matrix selected for each token."""
    product = _matmul(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    return replace(product, node=node) if product and product.reason else None


_ADDS = ("add", "iadd")

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


def _unless(product: Projection, accepted: bool, reason: str) -> Projection:
    return product if accepted or product.reason else replace(product, reason=reason)


def _read(node: fx.Node, x: Any, weight: Any, bias: Any = None, *, transposed: bool) -> Projection | None:
    while isinstance(weight, fx.Node) and transposes(weight):
        weight, transposed = weight.args[0], not transposed
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)) or shape_of(x) is None:
        return None
    weight, reason = stored(weight), None
    if stack := stack_of(weight, dimensions=3):
        weight, reason = stack, STACKED
    elif len(shape_of(weight) or ()) != 2 or not is_weight(weight):
        return None
    product = Projection(node, node, x, weight, None, transposed, reason)
    if bias is None:
        return product
    product = replace(product, bias=_bias_of(product, bias))
    return _unless(product, product.bias is not None, "its bias is not a stored vector with one value per column")


def _by_selected(node: fx.Node, weight: Any, x: Any) -> Projection | None:
    """``bmm(weights of each token's expert, token as a column)``."""
    if not (isinstance(x, fx.Node) and call_name(x) == "unsqueeze" and x.args[1:] in ((-1,), (2,))):
        return None
    product = _read(node, x.args[0], weight, transposed=False)
    return product if product and product.reason else None


def _bias_of(product: Projection, bias: Any) -> fx.Node | None:
    return stored_bias(bias, columns=product.sizes[1], stacked=product.reason == STACKED)
