"""Finds the FFNs of a Dynamo graph, and the linear layers outside of them.

The matcher walks backwards from each projection over element-wise and transparent nodes. It draws this cone as a small
labelled DiGraph, with all element-wise nodes as one node, and networkx compares that with the patterns below. The
activation is then recognised by its values, not by its spelling (:func:`recognition.recognise`). Blocks that only
resemble an FFN (:mod:`tardis_fx.graph.resemblance`), and FFNs in graphs that the graph calls
(:mod:`tardis_fx.graph.nested`), are listed with the reason why they are refused.
"""

from collections.abc import Sequence
from typing import Any

import networkx as nx
from networkx.algorithms.isomorphism import DiGraphMatcher, categorical_node_match
from torch import fx

from tardis_fx.graph.adapters import with_adapters
from tardis_fx.graph.bounds import bounds_of, is_normalised
from tardis_fx.graph.cone import NO_ACTIVATION, Cone, cone_of, is_inner
from tardis_fx.graph.forms import ELEMENTWISE, call_name, half, is_glu, is_halving, is_number, is_training_dropout
from tardis_fx.graph.function import activation_of, gate_of
from tardis_fx.graph.linear_layers import linear_layers
from tardis_fx.graph.naming import named
from tardis_fx.graph.nested import fused_site, nested_sites
from tardis_fx.graph.projections import projection
from tardis_fx.graph.refusal import checked
from tardis_fx.graph.resemblance import resembling
from tardis_fx.graph.site import Kind, Projection, Site
from tardis_fx.graph.writes import Write, writes_of

_SAME_LABEL = categorical_node_match("label", None)


def _pattern(labels: dict[str, str], *edges: str) -> nx.DiGraph:
    graph = nx.DiGraph(tuple(edge.split(">")) for edge in edges)
    nx.set_node_attributes(graph, labels, "label")
    return graph


_ROLES = {"up": "projection", "gate": "projection", "act": "elementwise", "down": "projection", "halves": "split"}

#: Patterns of an FFN; the element-wise nodes between its projections are one node, ``act``.
PATTERNS: dict[str, tuple[Kind, nx.DiGraph]] = {
    "plain": ("plain", _pattern(_ROLES, "up>act", "act>down")),
    "linear": ("plain", _pattern(_ROLES, "up>down")),
    "gated": ("gated", _pattern(_ROLES, "up>act", "gate>act", "act>down")),
    "gated, fused": ("gated", _pattern(_ROLES, "up>halves", "halves>act", "act>down")),
    "gated, by one function": ("gated", _pattern(_ROLES, "up>halves", "halves>down")),
}


def find_sites(graph: fx.Graph, *, linear: bool = False) -> list[Site]:
    """Finds all FFNs of a graph, in the order of their outputs; those that cannot be rewritten carry the reason.

    Args:
        graph: of a Dynamo graph module: nodes carry ``meta["example_value"]``.
        linear: also find the linear layers outside of FFNs, which follow the FFNs.
    """
    ffns = _ffns(graph)
    return named(ffns) + (named(_linear_layers(graph, ffns)) if linear else [])


def _linear_layers(graph: fx.Graph, ffns: Sequence[Site]) -> list[Site]:
    layers = linear_layers(_projections(graph), ffns, writes_of(graph))
    for node in graph.nodes:
        layers += nested_sites(node, lambda called: _linear_layers(called, _ffns(called)))
    return layers


def _projections(graph: fx.Graph) -> dict[fx.Node, Projection]:
    projections = {p.node: p for node in graph.nodes if (p := projection(node))}
    for product in list(projections.values()):
        if product.product is not product.node:  # a step of a projection is not itself a projection
            for step in product.node.all_input_nodes:
                projections.pop(step, None)
    return with_adapters(graph.nodes, projections)


def _ffns(graph: fx.Graph) -> list[Site]:
    projections = _projections(graph)
    sites, writes = list[Site](), writes_of(graph)
    for node in graph.nodes:
        if node in projections:
            site = _site(projections[node], projections, writes) or resembling(projections[node], projections)
        else:
            sites += nested_sites(node, _ffns)
            site = fused_site(node)
        if site is not None:
            sites.append(site)
    return _apart(sites)


def _apart(sites: list[Site]) -> list[Site]:
    """Refuses sites that share a projection with another; a site with an affine activation gives way."""
    taken: set[fx.Node] = set()
    apart = list(sites)
    for i, site in sorted(enumerate(sites), key=lambda pair: pair[1].affine is not None):
        nodes = {*site.inner, site.output}
        if not taken.isdisjoint(nodes):
            apart[i] = site.refused("it shares a projection with another FFN")
        elif site.reason is None:
            taken |= nodes
    return apart


def _site(down: Projection, projections: dict[fx.Node, Projection], writes: Sequence[Write]) -> Site | None:
    cone = cone_of(down, projections, is_inner)
    if cone is None or cone.strangers or len(cone.ups) not in (1, 2):
        return None
    matched, region, ups = _match(cone), cone.region, cone.ups
    kind = PATTERNS[matched][0] if matched else None
    if kind == "gated":
        gate, activation, gate_half = gate_of(region, ups, down)
    else:
        gate, activation, gate_half = None, activation_of(region, ups[0], down), None
    up = next((p for p in ups if p is not gate), ups[0])
    name, affine = (activation.name, activation.affine) if activation else (None, None)
    bounds = bounds_of(up.input, up.product, writes)
    site = Site(
        "", kind or "plain", name, up, down, gate, cone.inner, affine=affine, bounds=bounds, gate_half=gate_half,
        normalised=is_normalised(down.node),
    )  # fmt: skip
    if cone.unsupported:
        return site.refused(cone.unsupported) if matched != "linear" else None
    entering, hidden = up.sizes
    if hidden <= entering:  # without an activation, two consecutive projections are not an FFN
        is_named = matched not in (None, "linear")
        return site.refused("its hidden size does not exceed its input size: it is not an FFN") if is_named else None
    if matched is None:
        return site.refused(NO_ACTIVATION)
    site = checked(site, writes)
    return None if matched == "linear" and site.reason else site  # nor if other nodes read the value between the two


def _match(cone: Cone) -> str | None:
    """Name of the pattern that a cone matches, or None."""
    down = cone.down
    labels: dict[Any, str] = {p.node: "projection" for p in cone.ups} | dict.fromkeys(cone.parameters, "parameter")
    alias: dict[fx.Node, Any] = {}
    for node in cone.region:
        if call_name(node) in ELEMENTWISE or is_training_dropout(node):
            alias[node] = "act"
        elif is_halving(node) or is_glu(node) or (half(node) is not None and not is_halving(node.all_input_nodes[0])):
            alias[node] = "halves"
        else:  # transparent: drawn as what it views
            alias[node] = alias.get(node.all_input_nodes[0], node.all_input_nodes[0])
        if isinstance(alias[node], str):
            labels[alias[node]] = {"act": "elementwise", "halves": "split"}[alias[node]]
    drawn = nx.DiGraph()
    for node in [*cone.region, down.node]:
        inputs = [down.input] if node is down.node else [i for i in node.all_input_nodes if not is_number(i)]
        tail = alias.get(node, node)
        drawn.add_edges_from((head, tail) for i in inputs if (head := alias.get(i, i)) is not tail and head != tail)
    labels[down.node] = "projection"
    nx.set_node_attributes(drawn, labels, "label")
    return next(
        (name for name, (_, p) in PATTERNS.items() if DiGraphMatcher(drawn, p, _SAME_LABEL).is_isomorphic()), None
    )
