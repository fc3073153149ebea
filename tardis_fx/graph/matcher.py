"""Finds the FFNs of a Dynamo graph.

The matcher walks backwards from each projection over element-wise and transparent nodes. It compares the edges of this
cone, with all element-wise nodes as one part, with the patterns below. The activation is then recognised by its
values, not by its spelling (:func:`recognition.recognise`). Blocks that only resemble an FFN
(:mod:`tardis_fx.graph.resemblance`), and FFNs in graphs that the graph calls (:mod:`tardis_fx.graph.nested`), are
listed with the reason why they are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from tardis_fx.graph.adapters import with_adapters
from tardis_fx.graph.bounds import bounds_of
from tardis_fx.graph.cone import NO_ACTIVATION, Cone, cone_of, is_inner
from tardis_fx.graph.forms import ELEMENTWISE, call_name, half, is_glu, is_halving, is_number, is_training_dropout
from tardis_fx.graph.function import activation_of, gate_of
from tardis_fx.graph.naming import named
from tardis_fx.graph.nested import fused_site, nested_sites
from tardis_fx.graph.projections import projection
from tardis_fx.graph.refusal import checked
from tardis_fx.graph.resemblance import resembling
from tardis_fx.graph.site import Kind, Projection, Site
from tardis_fx.graph.writes import Write, writes_of

LINEAR = frozenset({"up>down"})

#: Kinds of FFN by the edges between their parts; the element-wise nodes between the projections are one part, ``act``.
PATTERNS: dict[frozenset[str], Kind] = {
    frozenset({"up>act", "act>down"}): "plain",
    LINEAR: "plain",
    frozenset({"up>act", "gate>act", "act>down"}): "gated",
    frozenset({"up>halves", "halves>act", "act>down"}): "gated",
    frozenset({"up>halves", "halves>down"}): "gated",  # by one function, glu
}


def find_sites(graph: fx.Graph) -> list[Site]:
    """Finds all FFNs of a graph, in the order of their outputs; those that cannot be rewritten carry the reason.

    Args:
        graph: of a Dynamo graph module: nodes carry ``meta["example_value"]``.
    """
    return named(_sites(graph))


def _sites(graph: fx.Graph) -> list[Site]:
    projections = {p.node: p for node in graph.nodes if (p := projection(node))}
    for product in list(projections.values()):
        if product.product is not product.node:  # a step of a projection is not itself a projection
            for step in product.node.all_input_nodes:
                projections.pop(step, None)
    projections = with_adapters(graph.nodes, projections)
    sites, writes = list[Site](), writes_of(graph)
    for node in graph.nodes:
        if node in projections:
            site = _site(projections[node], projections, writes) or resembling(projections[node], projections)
        else:
            sites += nested_sites(node, _sites)
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
    edges, region, ups = _edges(cone), cone.region, cone.ups
    kind = PATTERNS.get(edges)
    if kind == "gated":
        gate, activation, gate_half = gate_of(region, ups, down)
    else:
        gate, activation, gate_half = None, activation_of(region, ups[0], down), None
    up = next((p for p in ups if p is not gate), ups[0])
    name, affine = (activation.name, activation.affine) if activation else (None, None)
    bounds = bounds_of(up.input, up.product, writes)
    site = Site(
        "", kind or "plain", name, up, down, gate, cone.inner, affine=affine, bounds=bounds, gate_half=gate_half
    )
    if cone.unsupported:
        return site.refused(cone.unsupported) if edges != LINEAR else None
    entering, hidden = up.sizes
    if hidden <= entering:  # without an activation, two consecutive projections are not an FFN
        is_named = kind is not None and edges != LINEAR
        return site.refused("its hidden size does not exceed its input size: it is not an FFN") if is_named else None
    if kind is None:
        return site.refused(NO_ACTIVATION)
    site = checked(site, writes)
    return None if edges == LINEAR and site.reason else site  # nor if other nodes read the value between the two


def _edges(cone: Cone) -> frozenset[str]:
    """The edges between the parts of a cone."""
    parts = dict(zip((p.node for p in cone.ups), ("up", "gate"), strict=False)) | {cone.down.node: "down"}
    for node in cone.region:
        source = node.all_input_nodes[0]
        if call_name(node) in ELEMENTWISE or is_training_dropout(node):
            parts[node] = "act"
        elif is_halving(node) or is_glu(node) or (half(node) is not None and not is_halving(source)):
            parts[node] = "halves"
        else:  # transparent: part of what it views
            parts[node] = parts.get(source, "other")
    edges = {(cone.down.input, cone.down.node)}
    edges |= {(i, node) for node in cone.region for i in node.all_input_nodes if not is_number(i)}
    named = {(parts.get(head, "other"), parts[tail]) for head, tail in edges}
    return frozenset(f"{head}>{tail}" for head, tail in named if head != tail)
