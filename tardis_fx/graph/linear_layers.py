"""Finds the linear layers outside of FFNs: the projections of attention, the head of a language model."""

from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from tardis_fx.graph.forms import is_from_parameters, shape_of
from tardis_fx.graph.refusal import checked
from tardis_fx.graph.site import Projection, Site
from tardis_fx.graph.writes import Write

#: Fewest columns in, and fewest columns out, of a layer that is a site.
LEAST = 64


def linear_layers(
    projections: Mapping[fx.Node, Projection], ffns: Iterable[Site], writes: Sequence[Write]
) -> list[Site]:
    """The linear layers that no FFN contains, rewritten or refused, in the order of the graph.

    Args:
        projections: all projections of a graph, by their nodes.
        ffns: all FFNs of the graph.
        writes: all writes of the graph.
    """
    taken = {node for site in ffns for node in (*site.inner, site.output)}
    layers = (projections[node] for node in sorted(projections.keys() - taken))
    return [_site(layer, writes) for layer in layers if _is_layer(layer)]


def _is_layer(layer: Projection) -> bool:
    """Whether a projection multiplies by a stored matrix, or by one computed from stored ones, that is not small."""
    is_matrix = len(shape_of(layer.weight) or ()) == 2  # no experts, no convolution
    is_stored = layer.weight.op == "get_attr" or is_from_parameters(layer.weight)
    return is_matrix and is_stored and min(layer.sizes) >= LEAST


def _site(layer: Projection, writes: Sequence[Write]) -> Site:
    inner = frozenset({layer.product} - {layer.node})
    site = Site("", "linear", None, layer, layer, None, inner, layer.reason)
    return checked(site, writes)
