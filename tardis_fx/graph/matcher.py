"""Finds the FFNs of a Dynamo graph.

From each projection the graph is walked backwards over element-wise and transparent nodes; what this cone reaches is
drawn as a small labelled DiGraph, its element-wise nodes drawn as one, and compared with the patterns below by
networkx. The activation is then recognised by what it computes, not by how it is spelt (:func:`activations.recognise`).
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch
from networkx.algorithms.isomorphism import DiGraphMatcher, categorical_node_match
from torch import fx

from tardis_fx.graph.activations import Activation, recognise
from tardis_fx.graph.forms import (
    ELEMENTWISE,
    SPLIT,
    call_name,
    is_number,
    is_parameter,
    is_training_dropout,
    is_transparent,
    projection,
    shape_of,
)
from tardis_fx.graph.site import Kind, Projection, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
    return _named([site for down in projections.values() if (site := _site(down, projections))])


def _site(down: Projection, projections: dict[fx.Node, Projection]) -> Site | None:
    region, sources = _cone(down, projections)
    ups = [projections[node] for node in sources if node in projections]
    if not ups or any(node not in projections and not is_parameter(node) for node in sources):
        return None
    matched = _match(down, region, sources, projections)
    shape = shape_of(ups[0].node)
    entering = shape_of(ups[0].input)
    if shape is None or entering is None or (ups[0].weight is down.weight and matched == "linear"):
        return None
    if matched is None:
        if len(ups) > 2:
            return None
        site = Site("", "plain", None, ups[0], down, None, frozenset({*region, ups[0].node}))
        return (
            site.refused("between its projections stands something that is no activation function")
            if _expands(site)
            else None
        )
    kind = PATTERNS[matched][0]
    gate, activation = None, None
    if kind == "plain":
        function = _function(region, down, ups)
        activation = recognise(function)
    else:
        gate, activation = _gate(region, down, ups, fused=matched == "gated, fused")
    up = next((p for p in ups if p is not gate), ups[0])
    site = Site(
        "", kind, activation.name if activation else None, up, down, gate, frozenset({*region, *(p.node for p in ups)})
    )
    if not _expands(site):
        return None if matched == "linear" else site.refused("its hidden size does not exceed its input's: not an FFN")
    return _checked(site)


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
    order = {node: i for i, node in enumerate(down.node.graph.nodes)} if len(region) > 1 else {}
    return sorted(region, key=lambda n: order.get(n, 0)), sorted(sources, key=lambda n: order.get(n, 0))


def _is_inner(node: fx.Node) -> bool:
    name = call_name(node)
    return bool(name) and (
        name in ELEMENTWISE or name in SPLIT or is_transparent(node) or is_training_dropout(node) or _is_half(node)
    )


def _is_half(node: fx.Node) -> bool:
    """Whether the node takes one part out of a split, or a slice of the last axis."""
    if call_name(node) != "getitem":
        return False
    before, after = shape_of(node.all_input_nodes[0]), shape_of(node)
    return before is None or (after is not None and len(after) > 0 and bool(before[-1] != after[-1]))


def _match(
    down: Projection, region: list[fx.Node], sources: list[fx.Node], projections: dict[fx.Node, Projection]
) -> str | None:
    """Name of the pattern that a cone looks like, or None."""
    labels: dict[Any, str] = {}
    alias: dict[fx.Node, Any] = {}
    for node in region:
        if (name := call_name(node)) in ELEMENTWISE or is_training_dropout(node):
            alias[node] = "act"
        elif name in SPLIT or (_is_half(node) and call_name(node.all_input_nodes[0]) not in SPLIT):
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


def _function(
    region: list[fx.Node], down: Projection, ups: list[Projection], *halves: int
) -> Callable[..., torch.Tensor]:
    """The element-wise function between the projections, as a function of their outputs; shapes do not matter to it.

    Of a fused site the two halves are the arguments.
    """

    def run(*arguments: torch.Tensor) -> torch.Tensor:
        values: dict[fx.Node, Any] = dict(zip((p.node for p in ups), [a.clone() for a in arguments], strict=False))
        if halves:
            values[ups[0].node] = arguments
        for node in region:
            name, first = call_name(node), node.all_input_nodes[0]
            if name in SPLIT:
                values[node] = values[first]
            elif _is_half(node):
                values[node] = values[first][_half_index(node)]
            elif name in ELEMENTWISE:
                args, kwargs = fx.node.map_arg(
                    (node.args, dict(node.kwargs)), lambda n: values[n] if n in values else _number(n)
                )
                values[node] = (
                    getattr(args[0], str(node.target))(*args[1:], **kwargs)
                    if node.op == "call_method"
                    else node.target(*args, **kwargs)
                )  # type: ignore[operator]
            else:
                values[node] = values[first]
        return values[down.input]  # type: ignore[no-any-return]

    return run


def _number(node: fx.Node) -> Any:
    """The value of a number node; Dynamo writes constants as symbolic floats when sizes are dynamic."""
    value = node.meta["example_value"]
    return (
        float(value) if isinstance(value, torch.SymFloat) else int(value) if isinstance(value, torch.SymInt) else value
    )


def _half_index(node: fx.Node) -> int:
    """Which half of the hidden axis a ``getitem`` takes: of a split by its number, of a slice by its start."""
    index = node.args[1]
    if isinstance(index, int):
        return index
    last = index[-1] if isinstance(index, tuple) else index
    return 0 if isinstance(last, slice) and not last.start else 1


def _gate(
    region: list[fx.Node], down: Projection, ups: list[Projection], *, fused: bool
) -> tuple[Projection | None, Activation | None]:
    """Which projection of a gated site the activation sees, and the activation: act(gate) * up."""
    function = _function(region, down, ups, *((0, 1) if fused else ()))
    for first in (True, False):

        def gated(g: torch.Tensor, u: float, first: bool = first) -> torch.Tensor:
            other = torch.full_like(g, u)
            return function(g, other) if first else function(other, g)

        activation = recognise(lambda g, gated=gated: gated(g, 1.0))  # type: ignore[misc]
        if (
            activation
            and activation.name != "identity"
            and recognise(lambda g, gated=gated: gated(g, -2.5) / -2.5) is activation
        ):  # type: ignore[misc]
            return (ups[0] if fused or first else ups[1]), activation
    return None, None


def _expands(site: Site) -> bool:
    hidden, entering = shape_of(site.up.node), shape_of(site.input)
    return hidden is not None and entering is not None and bool(hidden[-1] > entering[-1])


def _checked(site: Site) -> Site:
    """The site with the first reason, if any, why no rewrite may touch it."""
    own = {*site.inner, site.output}
    ups = {site.up, site.gate} - {None}
    if any(is_training_dropout(node) for node in site.inner):
        return site.refused("in training mode: dropout drops")
    if site.activation is None:
        return site.refused("its activation is not in the registry")
    if any(p is not None and p.input is not site.input for p in ups):
        return site.refused("gate and up projection read different inputs")
    for node in sorted(site.inner, key=lambda n: n.name):
        if strangers := [user for user in node.users if user not in own]:
            return site.refused(f"its intermediate value {node.name} is also used by {strangers[0].name}")
    for node in site.parameters:
        if not is_parameter(node):
            return site.refused(f"{node.name} is not a parameter of a module, or is computed in the graph")
        if any(_writes(user, node) for user in node.users):
            return site.refused(f"the graph writes to its weight {node.name}")
    entering, leaving = shape_of(site.input) or (), shape_of(site.output) or ()
    if len(entering) != len(leaving) > 2 and not all(isinstance(size, int) for size in leaving):
        return site.refused("its shape changes between the projections, and is symbolic")
    if torch.is_grad_enabled() and any(_requires_grad(node) for node in (*site.parameters, site.output)):
        return site.refused("it needs gradients: call the model under torch.no_grad() or torch.inference_mode()")
    value = site.output.meta["example_value"]
    if torch.is_autocast_enabled(value.device.type):
        return site.refused("it runs under autocast, which casts the weights at every call")
    return site


def _writes(user: fx.Node, node: fx.Node) -> bool:
    in_place = str(getattr(user.target, "__name__", user.target)).endswith("_") or call_name(user) in (
        "iadd",
        "imul",
        "isub",
        "itruediv",
    )
    return in_place and bool(user.args) and user.args[0] is node


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad


def parameter_name(node: fx.Node) -> str:
    """Name of a lifted parameter as in ``model.named_parameters()``, from the source that Dynamo noted."""
    source = getattr(node, "_dynamo_source", None)
    text = getattr(source, "name", None) or str(node.target)
    text = text() if callable(text) else text
    parts = re.findall(r"\['([^']+)'\]|\.(?!_modules|_parameters|_buffers)(\w+)", text.partition("]")[2])
    return ".".join(a or b for a, b in parts) or str(text)


def _named(sites: Iterable[Site]) -> list[Site]:
    """The sites with their names: the module path that the weights share; the first weight's own where two agree."""
    sites = list(sites)
    modules = [[parameter_name(p.weight).split(".")[:-1] for p in (site.up, site.down)] for site in sites]
    shared = [".".join(_common(*paths)) for paths in modules]
    unique = [
        name if name and shared.count(name) == 1 else ".".join(paths[0])
        for name, paths in zip(shared, modules, strict=True)
    ]
    return [replace(site, name=name) for site, name in zip(sites, unique, strict=True)]


def _common(one: list[str], other: list[str]) -> list[str]:
    """The parts that two module paths begin with."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
