"""The table of accepted forms: how the matcher reads a node of a Dynamo graph.

A node is read by the name of its target, whether function (``torch.mul``), operator (``operator.mul``) or method
(``Tensor.mul``), and in place or not. Projections have a table of their own (:mod:`tardis_fx.graph.projections`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true, sym_eq

#: Maps each value to one value regardless of its position in the tensor; further arguments are mostly numbers.
ELEMENTWISE = frozenset(
    """
    abs add celu clamp clamp_max clamp_min clip cos div elu eq erf erfc exp exp2 expm1 floor ge gelu gt hardshrink
    hardsigmoid hardswish hardtanh heaviside iadd imul isub itruediv le leaky_relu log log1p log2 logsigmoid lt
    masked_fill maximum minimum mish mul multiply ne neg ones_like pos pow reciprocal relu relu6 rsqrt rsub selu sgn
    sigmoid sign silu sin softplus softshrink softsign sqrt square sub subtract tanh tanhshrink threshold true_divide
    truediv where zeros_like
    """.split()
)

#: The elementwise operations that only do arithmetic; a cone with nothing else holds no activation.
ARITHMETIC = frozenset(
    "add div iadd imul isub itruediv mul multiply neg pos rsub sub subtract true_divide truediv".split()
)

#: Keeps the values and, if the last axis keeps its length, the neuron that each belongs to.
VIEWS = frozenset(
    "alias clone contiguous detach expand_as flatten identity reshape squeeze unflatten unsqueeze view".split()
)

#: Changes only the precision, if the result has a floating type.
CASTS = frozenset("bfloat16 double float half to type type_as".split())

#: Drops values in training mode; ``F.dropout`` and ``torch.dropout`` name the arguments alike.
DROPOUT = frozenset({"dropout", "feature_dropout", "alpha_dropout"})

#: Cuts an axis into parts.
SPLIT = frozenset({"chunk", "split", "tensor_split", "unsafe_chunk", "unsafe_split"})

#: Other operations between two projections of an FFN-like block: they mix or move neurons or tokens.
MIXING = frozenset(
    """
    adjoint batch_norm cat concat conv1d conv2d cummax cumsum flip gather getattr getitem group_norm index_select
    layer_norm linalg_norm linalg_vector_norm log_softmax mean movedim norm normalize permute repeat
    repeat_interleave rms_norm roll softmax softmin stack std sum swapaxes t tile transpose unbind var
    """.split()
)

#: A node that takes more nodes than this to compute is not a weight.
LARGEST_WEIGHT = 128


def call_name(node: fx.Node) -> str | None:
    """Name of a node's target, without the underscore of the in-place form; None if the node calls nothing."""
    if node.op == "call_method":
        return str(node.target).rstrip("_") or None
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        return name.split(".")[0].rstrip("_") or None
    return None


def call(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Runs the function or method that a node calls."""
    if callable(node.target):
        return node.target(*args, **kwargs)
    return getattr(args[0], node.target)(*args[1:], **kwargs)


def bind(node: fx.Node, *names: str) -> list[Any]:
    """Values of a node's arguments in the order of ``names``, given by position or keyword; None if absent."""
    return [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in enumerate(names)]


def value_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor that Dynamo recorded, or None if the node is not a tensor."""
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: fx.Node) -> torch.Size | None:
    """Shape of a tensor node as Dynamo recorded it, or None."""
    value = value_of(node)
    return None if value is None else value.shape


def same(a: Any, b: Any) -> bool:
    """Whether two sizes, or two shapes, are known to be equal; ``==`` would add a guard to the graph."""
    return bool(statically_known_true(sym_eq(a, b)))


def same_tokens(a: torch.Size, b: torch.Size) -> bool:
    """Whether two shapes are known to be equal except for the last axis."""
    return same(tuple(a[:-1]), tuple(b[:-1]))


def walk(start: fx.Node, neighbours: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """The nodes that can be reached from a node, itself included, each once."""
    front, seen = [start], {start}
    while front:
        yield (node := front.pop())
        unseen = [neighbour for neighbour in neighbours(node) if neighbour not in seen]
        front += unseen
        seen.update(unseen)


def is_number(node: fx.Node) -> bool:
    """Whether the node's value is a number, symbolic or not, and not a tensor."""
    return isinstance(node.meta.get("example_value"), (int, float, torch.SymInt, torch.SymFloat, torch.Size))


def is_parameter(node: fx.Node) -> bool:
    """Whether the node is a parameter or buffer of a module, lifted to an input of the graph by Dynamo."""
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    return node.op == "placeholder" and bool(static or isinstance(node.meta.get("example_value"), torch.nn.Parameter))


def is_from_parameters(node: fx.Node, *, constants: bool = False) -> bool:
    """Whether the node is a parameter, or computed from parameters alone by at most ``LARGEST_WEIGHT`` nodes.

    Args:
        node: any node.
        constants: whether tensors that the graph makes from numbers count as parameters.
    """
    for i, source in enumerate(walk(node, lambda n: n.all_input_nodes)):
        stored = source.all_input_nodes or is_parameter(source) or (constants and source.op == "call_function")
        if not stored or i == LARGEST_WEIGHT:
            return False
    return True


def is_training_dropout(node: fx.Node) -> bool:
    """Whether the node is a dropout that drops values."""
    return call_name(node) in DROPOUT and not is_transparent(node)


def is_transparent(node: fx.Node) -> bool:
    """Whether the node only views, casts or copies its first argument, or is a dropout that drops nothing."""
    name = call_name(node)
    if name in DROPOUT:
        _, p, training = bind(node, "input", "p", "training")
        return p == 0 or training is False
    source = node.args[0] if node.args else None
    before, after = value_of(source) if isinstance(source, fx.Node) else None, value_of(node)
    if before is None or after is None or not after.dim() or not before.dim():
        return False
    # A view as another type reinterprets the bits, and a cast to integers rounds.
    typed = before.dtype == after.dtype if name in VIEWS else name in CASTS and after.is_floating_point()
    return typed and same(before.shape[-1], after.shape[-1])


def is_halving(node: fx.Node) -> bool:
    """Whether the node cuts the last axis into two equal parts."""
    parts = node.meta.get("example_value")
    if call_name(node) not in SPLIT or not isinstance(parts, (tuple, list)) or len(parts) != 2:
        return False
    whole = shape_of(node.all_input_nodes[0])
    return whole is not None and all(same(part.shape, (*whole[:-1], whole[-1] // 2)) for part in parts)


def half(node: fx.Node) -> int | None:
    """Index of the half of the last axis that a ``getitem`` takes, from a split or as a slice; None if neither."""
    if call_name(node) != "getitem":
        return None
    source, index = node.args
    if not isinstance(source, fx.Node):
        return None
    if is_halving(source):
        return index % 2 if isinstance(index, int) else None
    whole = shape_of(source)
    others: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    *others, last = others  # type: ignore[assignment]
    if whole is None or not isinstance(last, slice) or any(other not in (..., slice(None)) for other in others):
        return None
    if (... not in others and len(others) + 1 != len(whole)) or not isinstance(whole[-1], int) or whole[-1] % 2:
        return None
    if not all(isinstance(bound, (int, type(None))) for bound in (last.start, last.stop, last.step)):
        return None  # a bound that the graph computes
    bounds, middle = last.indices(whole[-1]), whole[-1] // 2
    return {(0, middle, 1): 0, (middle, whole[-1], 1): 1}.get(bounds)


def is_glu(node: fx.Node) -> bool:
    """Whether the node multiplies one half of the last axis by a gate computed from the other."""
    whole = shape_of(node.all_input_nodes[0]) if call_name(node) == "glu" else None
    return whole is not None and bind(node, "input", "dim")[1] in (None, -1, len(whole) - 1)
