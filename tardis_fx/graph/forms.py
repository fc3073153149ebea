"""The table of accepted forms: what a node of a Dynamo graph means to the matcher.

A node is read by the name of what it calls, whether function (``torch.mul``), operator (``operator.mul``) or method
(``Tensor.mul``), and in place or not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tardis_fx.graph.site import Projection

#: Maps one value to one value, whatever its place in the tensor; further arguments are numbers or the like.
ELEMENTWISE = frozenset(
    """
    abs add celu clamp clamp_max clamp_min cos div elu erf exp expm1 floor gelu hardsigmoid hardswish hardtanh iadd imul
    isub itruediv leaky_relu log log1p logsigmoid maximum minimum mish mul multiply neg pos pow reciprocal relu relu6
    rsqrt rsub selu sigmoid sign silu sin softplus sqrt square sub tanh true_divide truediv where
    """.split()
)

#: Changes neither the values nor, where its last axis stays as long as it was, which neuron they belong to.
TRANSPARENT = frozenset(
    """
    alias bfloat16 clone contiguous detach double expand_as flatten float half identity reshape squeeze to type type_as
    unflatten unsqueeze view
    """.split()
)

#: Drops values in training mode; ``F.dropout`` and ``torch.dropout`` name the arguments alike.
DROPOUT = frozenset({"dropout", "feature_dropout", "alpha_dropout"})

#: Cuts the last axis in two.
SPLIT = frozenset({"chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split"})


def call_name(node: fx.Node) -> str | None:
    """The name of what a node calls, without the underscore of the in-place form; None where it calls nothing."""
    if node.op == "call_method":
        return str(node.target).rstrip("_") or None
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return name.split(".")[0].rstrip("_") or None
    return None


def shape_of(node: fx.Node) -> torch.Size | None:
    """Shape of a tensor node as Dynamo recorded it, or None."""
    value = node.meta.get("example_value")
    return value.shape if isinstance(value, torch.Tensor) else None


def is_number(node: fx.Node) -> bool:
    """Whether the node's value is a number (also a symbolic one) and not a tensor."""
    return isinstance(node.meta.get("example_value"), (int, float, torch.SymInt, torch.SymFloat, torch.Size))


def is_parameter(node: fx.Node) -> bool:
    """Whether the node is a parameter or buffer of a module, lifted to an input of the graph by Dynamo."""
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    return node.op == "placeholder" and bool(static or isinstance(node.meta.get("example_value"), torch.nn.Parameter))


def is_training_dropout(node: fx.Node) -> bool:
    """Whether the node is a dropout that drops something."""
    return call_name(node) in DROPOUT and not is_transparent(node)


def is_transparent(node: fx.Node) -> bool:
    """Whether the node only views, casts or copies its first argument, or is a dropout that drops nothing."""
    name = call_name(node)
    if name in DROPOUT:
        _, p, training = _bind(node, "input", "p", "training")
        return p == 0 or training is False
    if name not in TRANSPARENT:
        return False
    source = node.args[0] if node.args else None
    before, after = shape_of(source) if isinstance(source, fx.Node) else None, shape_of(node)
    return before is not None and after is not None and len(after) > 0 and bool(before[-1] == after[-1])


def is_half(node: fx.Node) -> bool:
    """Whether the node takes one part out of a split, or a slice of the last axis."""
    if call_name(node) != "getitem":
        return False
    before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
    return before is None or (after is not None and len(after) > 0 and bool(before[-1] != after[-1]))


def projection(node: fx.Node) -> Projection | None:
    """Reads a node as a matrix multiplication by a weight matrix, with the bias where the node adds one."""
    name = call_name(node)
    if name == "linear":
        return _projection(node, *_bind(node, "input", "weight", "bias"), transposed=False)
    if name == "addmm" and len(node.args) == 3 and not node.kwargs:
        bias, x, weight = node.args
        return _projection(node, x, weight, bias, transposed=True)
    if name in ("matmul", "mm", "bmm") and len(node.args) == 2:
        return _projection(node, *node.args, None, transposed=True)
    if name in ("add", "iadd") and len(node.args) == 2 and not node.kwargs:
        for product, bias in (node.args, node.args[::-1]):
            inner = projection(product) if isinstance(product, fx.Node) else None
            if inner and inner.bias is None and call_name(inner.node) != "add" and len(inner.node.users) == 1:
                biased = _projection(node, inner.input, inner.weight, bias, transposed=inner.transposed)
                return biased and replace(biased, product=inner.node)
    return None


def _projection(node: fx.Node, x: Any, weight: Any, bias: Any, *, transposed: bool) -> Projection | None:
    while isinstance(weight, fx.Node) and _transposes(weight):
        weight, transposed = weight.args[0], not transposed
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)):
        return None
    weight_shape = shape_of(weight)
    if weight_shape is None or len(weight_shape) != 2 or shape_of(x) is None or not _is_weight(weight):
        return None
    if bias is not None:
        bias_shape = shape_of(bias) if isinstance(bias, fx.Node) else None
        if bias_shape is None or len(bias_shape) != 1 or not _is_weight(bias):
            return None
    return Projection(node, node, x, weight, bias, transposed)


def _is_weight(node: fx.Node) -> bool:
    """A placeholder, or something computed from parameters alone (a parametrised weight)."""
    if node.op in ("placeholder", "get_attr"):
        return True
    inputs = node.all_input_nodes
    return bool(inputs) and all(is_parameter(i) or (i.op != "placeholder" and _is_weight(i)) for i in inputs)


def _transposes(node: fx.Node) -> bool:
    """Whether the node is the transposed view of a matrix, read off the strides that Dynamo recorded."""
    if call_name(node) not in ("t", "transpose", "swapaxes", "swapdims", "permute", "getattr", "adjoint"):
        return False
    before, after = node.all_input_nodes[0].meta.get("example_value"), node.meta.get("example_value")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dim() == after.dim() == 2):
        return False
    return before.shape == after.shape[::-1] and before.stride() == after.stride()[::-1]


def _bind(node: fx.Node, *names: str) -> list[Any]:
    """Values of a node's arguments in the order of ``names``, given by position or keyword; None where absent."""
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names)]
