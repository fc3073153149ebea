"""What the nodes between two projections compute: run on a grid, and compared with the registry of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from tardis_fx.graph.activations import Activation, recognise
from tardis_fx.graph.forms import ELEMENTWISE, call_name, half, is_glu

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tardis_fx.graph.site import Projection


def activation_of(region: Sequence[fx.Node], up: Projection, down: Projection) -> Activation | None:
    """The activation between two projections, or None when it is not registered.

    Args:
        region: the element-wise and transparent nodes between them, in the order of the graph.
        up: where they start.
        down: where they end.
    """
    return recognise(lambda z: _run(region, down, {up.node: z.clone()}))


def gate_of(
    region: Sequence[fx.Node], ups: Sequence[Projection], down: Projection
) -> tuple[Projection | None, Activation | None, int | None]:
    """Which projection of ``activation(gate) * up`` the activation sees, the activation, and which half of a fused one.

    None where neither; the half is None, too, of a gate that is a matrix of its own.

    Args:
        region: as above.
        ups: the two projections, or the fused one.
        down: where the region ends.
    """
    for first in (True, False):

        def product(gate: Tensor, up: float, first: bool = first) -> Tensor:
            halves = (gate.clone(), torch.full_like(gate, up))[:: 1 if first else -1]
            values = dict(zip((p.node for p in ups), halves, strict=True)) if len(ups) == 2 else {ups[0].node: halves}
            return _run(region, down, values)

        activation = recognise(lambda gate, product=product: product(gate, 1.0))  # type: ignore[misc]
        if activation is None or activation.affine is not None:
            continue
        if all(  # small and large: the other side must be left alone wherever it lies
            recognise(lambda gate, up=up, product=product: product(gate, up) / up) is activation  # type: ignore[misc]
            for up in (-2.5, 1e4, -1e4)
        ):
            half_seen = None if len(ups) == 2 else 1 - first
            return ups[0 if first else -1], activation, half_seen
    return None, None, None


def _run(region: Sequence[fx.Node], down: Projection, values: dict[fx.Node, Any]) -> Tensor:
    """The value that enters ``down``, from those of the projections; of a fused one, the pair of its halves.

    Views are left out, so that the values may have any shape.
    """
    for node in region:
        if call_name(node) in ELEMENTWISE:
            values[node] = _call(node, lambda n: values[n] if n in values else _number(n))
            continue
        value = values[node.all_input_nodes[0]]
        if is_glu(node):
            value = value[0] * value[1].sigmoid()
        elif (part := half(node)) is not None:
            value = value[part]
        elif isinstance(value, Tensor) and not value.is_floating_point():  # the cast of a comparison
            value = value.double()
        values[node] = value
    return values[down.input]  # type: ignore[no-any-return]


def _call(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value)
    if callable(node.target):
        return node.target(*args, **kwargs)
    return getattr(args[0], node.target)(*args[1:], **kwargs)


def _number(node: fx.Node) -> Any:
    """The value of a number node; Dynamo writes constants as symbolic floats when sizes are dynamic."""
    value = node.meta["example_value"]
    if isinstance(value, torch.SymFloat):
        return float(value)
    return int(value) if isinstance(value, torch.SymInt) else value
