"""The cone of a projection: the nodes between its input and the projections before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from tardis_fx.graph.forms import (
    ELEMENTWISE,
    call_name,
    half,
    is_from_parameters,
    is_glu,
    is_halving,
    is_number,
    is_training_dropout,
    is_transparent,
)
from tardis_fx.graph.nested import called_graph
from tardis_fx.graph.site import Projection

#: A cone with more nodes than this is not an activation function.
LARGEST_CONE = 48


@dataclass(frozen=True)
class Cone:
    """The nodes that a projection reads, back to the projections before it.

    Attributes:
        region: the visited nodes, in the order of the graph.
        ups: the projections that they start from, in the same order.
        parameters: the parameters that they read, and nodes computed from parameters alone.
        strangers: all other nodes that they start from.
    """

    region: list[fx.Node]
    ups: list[Projection]
    parameters: list[fx.Node]
    strangers: list[fx.Node]


def cone_of(
    down: Projection,
    projections: Mapping[fx.Node, Projection],
    inner: Callable[[fx.Node], bool],
    *,
    constants: bool = False,
) -> Cone | None:
    """Walks back from a projection's input over the nodes that ``inner`` accepts; None if there are too many.

    Args:
        down: the projection.
        projections: all projections of the graph.
        inner: whether to walk over a node.
        constants: whether tensors that the graph makes from numbers count as parameters.
    """
    region: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    front = [down.input]
    while front:
        node = front.pop()
        if node in region or node in sources or is_number(node) or called_graph(node):
            continue
        if node in projections or not inner(node):
            sources.add(node)
            continue
        region.add(node)
        front.extend(node.all_input_nodes)
        if len(region) > LARGEST_CONE:
            return None
    others = sorted(node for node in sources if node not in projections)
    parameters = [node for node in others if is_from_parameters(node, constants=constants)]
    return Cone(
        sorted(region),
        [projections[node] for node in sorted(sources) if node in projections],
        parameters,
        [node for node in others if node not in parameters],
    )


def is_inner(node: fx.Node) -> bool:
    """Whether the node may be part of an activation or a gate: it keeps tokens and neurons apart."""
    return (
        call_name(node) in ELEMENTWISE
        or is_transparent(node)
        or is_training_dropout(node)
        or is_halving(node)
        or half(node) is not None
        or is_glu(node)
    )
