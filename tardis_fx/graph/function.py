"""Recognises the activation between two projections: runs the nodes on a grid and compares with the registry."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from tardis_fx.graph.activations import Activation
from tardis_fx.graph.forms import ARITHMETIC, DROPOUT, ELEMENTWISE, call, call_name, half, is_glu
from tardis_fx.graph.recognition import recognise, recognise_product
from tardis_fx.graph.site import Projection
from tardis_fx.graph.writes import storages_of

#: Operations without a kink for any numeric arguments.
_SMOOTH = ARITHMETIC | frozenset(
    """
    cos erf erfc exp exp2 expm1 gelu log log1p log2 mish ones_like pow reciprocal rsqrt sigmoid silu sin softsign sqrt
    square tanh tanhshrink zeros_like
    """.split()
)

_SUMS = frozenset("add iadd isub rsub sub subtract".split())

#: The numbers that the other operations compare their argument with by default.
_BOUNDS: dict[str, tuple[float, ...]] = {
    "hardshrink": (-0.5, 0.5), "hardsigmoid": (-3, 3), "hardswish": (-3, 3), "hardtanh": (-1, 1), "relu6": (0, 6),
    "softplus": (20,), "softshrink": (-0.5, 0.5),
}  # fmt: skip


def activation_of(region: Sequence[fx.Node], up: Projection, down: Projection) -> Activation | None:
    """The activation between two projections, or None if it is not registered.

    Args:
        region: the element-wise and transparent nodes between them, in the order of the graph.
        up: the projection that they start from.
        down: the projection that they end at.
    """
    return _recognised(recognise, lambda z: {up.node: z}, region, up, down)


def gate_of(
    region: Sequence[fx.Node], ups: Sequence[Projection], down: Projection
) -> tuple[Projection | None, Activation | None, int | None]:
    """The gate of ``activation(gate) * up``: its projection, its activation, and its half of a fused projection.

    All are None if neither projection is a gate; the half is also None if the gate has its own matrix.

    Args:
        region: as in :func:`activation_of`.
        ups: the two projections, or the fused one.
        down: the projection that the region ends at.
    """
    for gate in (0, 1):

        def place(*z: Tensor, gate: int = gate) -> _Values:
            halves = z if gate == 0 else z[::-1]
            return dict(zip((p.node for p in ups), halves, strict=True)) if len(ups) == 2 else {ups[0].node: halves}

        if (activation := _recognised(recognise_product, place, region, ups[0], down)) is not None:
            return ups[0 if gate == 0 else -1], activation, None if len(ups) == 2 else gate
    return None, None, None


_Values = dict[fx.Node, Any]


def _recognised(
    recogniser: Callable[..., Activation | None],
    place: Callable[..., _Values],
    region: Sequence[fx.Node],
    up: Projection,
    down: Projection,
) -> Activation | None:
    """Applies a recogniser to a region as a function of tensors, which ``place`` gives to its projections."""

    def compared(*z: Tensor) -> list[Tensor]:
        differences: list[Tensor] = []
        _run(region, down, place(*z), differences)
        return differences

    kinked = any(call_name(node) in ELEMENTWISE - _SMOOTH for node in region)
    dtype = up.weight.meta["example_value"].dtype
    return recogniser(lambda *z: _run(region, down, place(*z)), compared=compared if kinked else None, dtype=dtype)


def _run(
    region: Sequence[fx.Node], down: Projection, values: _Values, differences: list[Tensor] | None = None
) -> Tensor:
    """The value that enters ``down``, computed from the values of the projections (a pair of halves for a fused one).

    Views are skipped, so that the values may have any shape. In-place operations change the values.

    Args:
        region: the nodes between the projections.
        down: the projection that they end at.
        values: of the projections; those of the region are added.
        differences: receives the compared quantities, see :func:`_differences`.
    """
    for node in region:
        if call_name(node) in ELEMENTWISE:
            arguments = fx.node.map_arg(
                (node.args, dict(node.kwargs)), lambda n: values[n] if n in values else _number(n)
            )
            if differences is not None:
                differences += _differences(node, tree_leaves(arguments))
            values[node] = call(node, *arguments)
            if differences is not None and call_name(node) in _SUMS:
                differences.append(values[node].clone())  # its square has its minimum at 0
            continue
        value = values[source := node.all_input_nodes[0]]
        if is_glu(node):
            value = value[0] * value[1].sigmoid()
        elif (part := half(node)) is not None:
            value = value[part]
        elif isinstance(value, Tensor) and not value.is_floating_point():  # a cast comparison
            value = value.double()
        elif call_name(node) not in DROPOUT and storages_of([node]) != storages_of([source]):
            # A copy is not reached by later writes.
            value = tree_map(torch.clone, value)
        values[node] = value
    return values[down.input]  # type: ignore[no-any-return]


def _differences(node: fx.Node, operands: Sequence[Any]) -> list[Tensor]:
    """Differences of the quantities that a node compares: its tensors with each other and with numbers."""
    name = call_name(node) or ""
    tensors = [o for o in operands if isinstance(o, Tensor) and o.is_floating_point()]
    numbers = {*(float(o) for o in operands if isinstance(o, (int, float))), *_BOUNDS.get(name, (0,))}
    pairs = [a - b for a, b in itertools.combinations(tensors, 2)]
    return [] if name in _SMOOTH else pairs + [t - number for t in tensors for number in sorted(numbers)]


def _number(node: fx.Node) -> Any:
    """The value of a number node; Dynamo writes constants as symbolic floats if sizes are dynamic.

    Raises:
        ValueError: the number is a symbolic size, which the graph must not be bound to.
    """
    value = node.meta["example_value"]
    if isinstance(value, torch.SymInt):
        raise ValueError(f"{node.name} is a symbolic size")
    return float(value) if isinstance(value, torch.SymFloat) else value
