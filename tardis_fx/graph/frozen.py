"""Handles weights inside the graph, where Inductor's freezing keeps them instead of making them inputs.

A rewrite expects weights as inputs. They are lifted before it, and put back into the graph afterwards together with
the inputs that it added, so that Inductor packs them. Freezing assumes that no weight changes; the weights of
rewritten sites are still checked at every call (:class:`tardis_fx.passes.weight_guard.FrozenGraph`).
"""

from collections.abc import Sequence
from operator import attrgetter

from torch import Tensor, fx

from tardis_fx.graph.surgery import copy


def lift(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """Turns a graph's tensors into inputs, after the existing inputs.

    Args:
        gm: a Dynamo graph module.

    Returns:
        A copy and the tensors; the graph itself and no tensors if it holds none, or has no input and so no site.
    """
    if not _tensors(gm) or not gm.graph.find_nodes(op="placeholder"):
        return gm, []
    gm = copy(gm)
    sources = getattr(gm, "_param_name_to_source", {})
    last = next(reversed(gm.graph.find_nodes(op="placeholder")))
    values = []
    for node, value in _tensors(gm):
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(node.name)
        last.meta = node.meta | {"tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
        last._dynamo_source = sources.get(node.target)  # type: ignore[attr-defined]
        node.replace_all_uses_with(last)
        gm.graph.erase_node(node)
        values.append(value)
    gm.recompile()
    return gm, values


def freeze(gm: fx.GraphModule, values: Sequence[Tensor]) -> None:
    """Puts tensors into a graph in place of its last inputs.

    Args:
        gm: the graph, changed in place.
        values: the tensors, in the order of the last inputs.
    """
    for i, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder")[-len(values) :], values, strict=True)):
        name = f"frozen_{i}"
        gm.register_buffer(name, value)
        with gm.graph.inserting_before(node):
            attribute = gm.graph.get_attr(name)
        attribute.meta = node.meta
        node.replace_all_uses_with(attribute)
        gm.graph.erase_node(node)
    if hasattr(gm, "_param_name_to_source"):  # AOTAutograd would look the new ones up there
        del gm._param_name_to_source
    gm.recompile()


def _tensors(gm: fx.GraphModule) -> list[tuple[fx.Node, Tensor]]:
    """The nodes that read tensors of the graph module, each with its tensor."""
    attributes = ((node, attrgetter(str(node.target))(gm)) for node in gm.graph.find_nodes(op="get_attr"))
    return [(node, value) for node, value in attributes if isinstance(value, Tensor)]
