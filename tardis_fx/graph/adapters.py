"""Finds low-rank adapters (LoRA): two narrow projections in sequence, whose result is added to a wide one's."""

from collections.abc import Iterable
from dataclasses import replace

from torch import fx

from tardis_fx.graph.forms import call_name, is_training_dropout, is_transparent
from tardis_fx.graph.naming import parameter_name
from tardis_fx.graph.site import Projection


def with_adapters(nodes: Iterable[fx.Node], projections: dict[fx.Node, Projection]) -> dict[fx.Node, Projection]:
    """Merges each projection that has an adapter with it into one projection that no rewrite may take.

    Args:
        nodes: of the graph, in its order.
        projections: by their nodes.
    """
    merged = dict(projections)
    for node in nodes:
        if call_name(node) not in ("add", "iadd") or node in merged:
            continue
        operands = [merged.get(_source(operand)) for operand in node.args[:2] if isinstance(operand, fx.Node)]
        for base, last in (operands, operands[::-1]) if len(operands) == 2 else ():
            first = merged.get(_source(last.input)) if last else None
            if base and last and first and _adapts(base, first, last):
                module = parameter_name(base.weight).removesuffix(".weight").removesuffix(".base_layer")
                reason = f"an adapter (LoRA) adds to {module}: merge it (merge_and_unload) before calibrating"
                for part in (base, first, last):
                    merged.pop(part.node, None)
                merged[node] = replace(base, node=node, reason=reason)
                break
    return merged


def _adapts(base: Projection, first: Projection, last: Projection) -> bool:
    rank = first.sizes[1]
    fits = (first.sizes[0], last.sizes[1]) == base.sizes and rank == last.sizes[0] and rank < min(base.sizes)
    return fits and _source(first.input) is _source(base.input)


def _source(node: fx.Node) -> fx.Node:
    """The node before views, casts, dropout and scalar factors."""
    while True:
        scaled = call_name(node) in ("mul", "div", "truediv", "imul") and len(node.all_input_nodes) == 1
        if not (scaled or is_transparent(node) or is_training_dropout(node)):
            return node
        node = node.all_input_nodes[0]
