"""Finds the FFNs of a Dynamo graph.

From each projection the graph is walked backwards over element-wise and transparent nodes; what this cone reaches is
drawn as a small labelled DiGraph, its element-wise nodes drawn as one, and compared with the patterns below by
networkx. The activation is then recognised by what it computes, not by how it is spelt (:func:`activations.recognise`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import networkx as nx
from networkx.algorithms.isomorphism import DiGraphMatcher, categorical_node_match

from tardis_fx.graph.forms import (
    ELEMENTWISE,
    SPLIT,
    call_name,
    is_half,
    is_number,
    is_parameter,
    is_training_dropout,
    is_transparent,
    projection,
    shape_of,
)
from tardis_fx.graph.function import activation_of, gate_of
from tardis_fx.graph.naming import named
from tardis_fx.graph.refusal import checked
from tardis_fx.graph.site import Kind, Projection, Site

if TYPE_CHECKING:
    from torch import fx

#: A cone with more nodes than this is no activation function.
LARGEST_CONE = 48

_SAME_LABEL = categorical_node_match("label", None)


def _pattern(labels: dict[str, str], *edges: str) -> nx.DiGraph:
    graph = nx.DiGraph(tuple(edge.split(">")) for edge in edges)
    nx.set_node_attributes(graph, labels, "label")
    return graph


_ROLES = {"up": "projection", "gate": "projection", "act": "elementwise", "down": "projection", "halves": "split"}

#: What an FFN looks like; the element-wise nodes between its projections are one node, ``act``.
PATTERNS: dict[str, tuple[Kind, nx.DiGraph]] = {
    "plain": ("plain", _pattern(_ROLES, "up>act", "act>down")),
    "linear": ("plain", _pattern(_ROLES, "up>down")),
    "gated": ("gated", _pattern(_ROLES, "up>act", "gate>act", "act>down")),
    "gated, fused": ("gated", _pattern(_ROLES, "up>halves", "halves>act", "act>down")),
}


def find_sites(graph: fx.Graph) -> list[Site]:
    """All FFNs of a graph, in the order of their outputs, those that cannot be rewritten with the reason.

    Args:
        graph: of a Dynamo graph module: nodes carry ``meta["example_value"]``.
    """
    projections = {p.node: p for node in graph.nodes if (p := projection(node))}
    for node in list(projections):
        if call_name(node) in ("add", "iadd"):  # the product inside a biased projection is no projection by itself
            for inner in node.all_input_nodes:
                projections.pop(inner, None)
    sites: list[Site] = []
    ends: set[fx.Node] = set()
    for down in projections.values():
        if site := _site(down, projections):
            if not ends.isdisjoint(site.inner):
                site = site.refused("it shares a projection with the FFN before it")
            elif site.reason is None and site.activation != "identity":
                ends.add(site.output)
            sites.append(site)
    return named(sites)


def _site(down: Projection, projections: dict[fx.Node, Projection]) -> Site | None:
    region, sources = _cone(down, projections)
    ups = [projections[node] for node in sources if node in projections]
    if not ups or any(node not in projections and not is_parameter(node) for node in sources):
        return None
    matched = _match(down, region, sources, projections)
    if matched is None and len(ups) > 2:
        return None
    kind = PATTERNS[matched][0] if matched else "plain"
    gate, activation = gate_of(region, ups, down) if kind == "gated" else (None, activation_of(region, ups[0], down))
    up = next((p for p in ups if p is not gate), ups[0])
    inner = frozenset({*region, *(n for p in ups for n in (p.product, p.node)), down.product} - {down.node})
    site = Site("", kind, activation.name if activation else None, up, down, gate, inner)
    hidden, entering = shape_of(up.node), shape_of(up.input)
    if hidden is None or entering is None:
        return None
    if hidden[-1] <= entering[-1]:
        named_so = matched not in (None, "linear")  # two projections in a row that narrow are nobody's FFN
        return site.refused("its hidden size does not exceed its input's: not an FFN") if named_so else None
    if matched is None:
        return site.refused("what stands between its projections is no activation function")
    return checked(site)


def _cone(down: Projection, projections: dict[fx.Node, Projection]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The element-wise and transparent nodes behind a projection's input, and the nodes that they start from."""
    region: dict[fx.Node, None] = {}
    sources: dict[fx.Node, None] = {}
    front = [down.input]
    while front and len(region) <= LARGEST_CONE:
        node = front.pop()
        if node in region or node in sources or is_number(node):
            continue
        if node not in projections and _is_inner(node):
            region[node] = None
            front.extend(node.all_input_nodes)
        else:
            sources[node] = None
    return sorted(region), sorted(sources)


def _is_inner(node: fx.Node) -> bool:
    name = call_name(node)
    return bool(name) and (
        name in ELEMENTWISE or name in SPLIT or is_transparent(node) or is_training_dropout(node) or is_half(node)
    )


def _match(
    down: Projection, region: list[fx.Node], sources: list[fx.Node], projections: dict[fx.Node, Projection]
) -> str | None:
    """Name of the pattern that a cone looks like, or None."""
    labels: dict[Any, str] = {}
    alias: dict[fx.Node, Any] = {}
    for node in region:
        if (name := call_name(node)) in ELEMENTWISE or is_training_dropout(node):
            alias[node] = "act"
        elif name in SPLIT or (is_half(node) and call_name(node.all_input_nodes[0]) not in SPLIT):
            alias[node] = "halves"
        else:  # transparent: drawn as what it views
            alias[node] = alias.get(node.all_input_nodes[0], node.all_input_nodes[0])
        if isinstance(alias[node], str):
            labels[alias[node]] = {"act": "elementwise", "halves": "split"}[alias[node]]
    for node in sources:
        labels[node] = "projection" if node in projections else "parameter"
    cone = nx.DiGraph()
    for node in [*region, down.node]:
        inputs = [down.input] if node is down.node else [i for i in node.all_input_nodes if not is_number(i)]
        tail = alias.get(node, node)
        cone.add_edges_from((head, tail) for i in inputs if (head := alias.get(i, i)) is not tail and head != tail)
    labels[down.node] = "projection"
    nx.set_node_attributes(cone, labels, "label")
    return next(
        (name for name, (_, p) in PATTERNS.items() if DiGraphMatcher(cone, p, _SAME_LABEL).is_isomorphic()), None
    )


def _expands(site: Site) -> bool:
    hidden, entering = shape_of(site.up.node), shape_of(site.input)
    return hidden is not None and entering is not None and bool(hidden[-1] > entering[-1])
