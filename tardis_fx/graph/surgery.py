"""Replaces a site in a graph by the traced ``forward`` of a rewrite."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext

from tardis_fx.graph.forms import same_tokens, shape_of
from tardis_fx.graph.site import Site


def copy(gm: fx.GraphModule) -> fx.GraphModule:
    """Copies a Dynamo graph module with the attributes that AOTAutograd reads; Dynamo still needs the original."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    graph.output(result)
    for node in gm.graph.find_nodes(op="placeholder"):
        if hasattr(node, "_dynamo_source"):
            copies[node]._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source
    return copied


def add_input(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    """Adds a graph input after the last one, marked as static in the way Dynamo marks parameters.

    Args:
        graph: the graph.
        name: of the input; made unique.
        value: the tensor that the first call passes.
    """
    last = next(reversed(graph.find_nodes(op="placeholder")))
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta = {"example_value": value, "tensor_dict": {"_dynamo_static_input_type": "unguarded"}}
    node._dynamo_source = None  # type: ignore[attr-defined]  # AOTAutograd asks every input for it
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        # AOTAutograd finds the fake tensor while it lives. Otherwise it would make the sizes symbolic, and Dynamo
        # cannot guard sizes of an input that it does not know. The node must not keep the value itself, which may
        # share the storage of a weight.
        node.meta["example_value"] = node.meta["static"] = context.fake_mode.from_tensor(value, static_shapes=True)
    return node


def replace(
    graph: fx.Graph,
    site: Site,
    x: fx.Node,
    forward: Callable[[Any, Mapping[str, Any]], Any],
    constants: Mapping[str, fx.Node],
) -> fx.Node:
    """Replaces a site by ``forward(input, constants)`` and removes the nodes that nothing reads any more.

    The new nodes are inserted at the site's first projection, so that they read the input before any later write.

    Args:
        graph: the graph.
        site: a site of the graph.
        x: the site's input, or the node that has replaced it.
        forward: plain PyTorch; traced.
        constants: graph inputs by name.

    Returns:
        The node that has replaced the site's output.
    """
    tracer = fx.proxy.GraphAppendingTracer(graph)
    with graph.inserting_before(site.up.product):
        proxies = {name: fx.Proxy(node, tracer) for name, node in constants.items()}
        result: fx.Node = forward(fx.Proxy(x, tracer), proxies).node
        entering, leaving = shape_of(site.input), shape_of(site.output)
        if entering is not None and leaving is not None and not same_tokens(entering, leaving):
            whole = all(isinstance(size, int) for size in leaving)
            shape = tuple(leaving) if whole else (-1, leaving[-1])
            result = graph.call_function(torch.reshape, (result, shape))
    site.output.replace_all_uses_with(result)
    result.meta.setdefault("example_value", site.output.meta["example_value"])
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in sorted({*site.inner, site.output}, key=lambda n: -order[n]):
        if not node.users:
            graph.erase_node(node)
    return result
