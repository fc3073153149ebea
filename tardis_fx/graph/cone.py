"""The cone of a projection: the nodes between its input and the projections before it."""

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
    walk,
)
from tardis_fx.graph.nested import called_graph
from tardis_fx.graph.site import Projection

#: A cone with more nodes than this is not an activation function.
LARGEST_CONE = 48

NO_ACTIVATION = "the computation between its projections is not an activation function"


@dataclass(frozen=True)
class Cone:
    """The nodes that a projection reads, back to the projections before it.

    Attributes:
        region: the visited nodes, in the order of the graph.
        ups: the projections that they start from, in the same order.
        parameters: the parameters that they read, and nodes computed from parameters alone.
        strangers: all other nodes that they start from.
        down: the projection.
    """

    region: list[fx.Node]
    ups: list[Projection]
    parameters: list[fx.Node]
    strangers: list[fx.Node]
    down: Projection

    @property
    def inner(self) -> frozenset[fx.Node]:
        """The region and the nodes of its projections, without the output."""
        steps = {node for p in (*self.ups, self.down) for node in (p.product, p.node)}
        return frozenset({*self.region, *steps} - {self.down.node})

    @property
    def unsupported(self) -> str | None:
        """Why no rewrite may take one of the projections, or None."""
        return next((p.reason for p in (*self.ups, self.down) if p.reason), None)


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

    def inputs(node: fx.Node) -> list[fx.Node]:
        if node in projections or not inner(node):
            sources.add(node)
            return []
        region.add(node)
        return [i for i in node.all_input_nodes if not (is_number(i) or called_graph(i))]

    for _ in walk(down.input, inputs):
        if len(region) > LARGEST_CONE:
            return None
    others = sorted(sources - projections.keys())
    parameters = [node for node in others if is_from_parameters(node, constants=constants)]
    return Cone(
        sorted(region),
        [projections[node] for node in sorted(sources & projections.keys())],
        parameters,
        [node for node in others if node not in parameters],
        down,
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
