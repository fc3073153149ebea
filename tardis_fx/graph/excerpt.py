"""Makes graphs of one FFN alone: as it is in its graph, and rewritten."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from tardis_fx.graph.forms import is_number, walk
from tardis_fx.graph.site import Site


def excerpt(site: Site) -> fx.GraphModule:
    """The original FFN, with the site's input and parameters as inputs; symbolic sizes become those of the example."""
    graph = fx.Graph()
    inputs = [site.input, *site.parameters]
    copies: dict[fx.Node, Any] = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    needed = {*walk(site.output, lambda node: [] if node in inputs or is_number(node) else node.all_input_nodes)}
    for node in site.output.graph.nodes:
        if node not in needed or node in copies:
            continue
        if is_number(node):
            copies[node] = _number(node)
        else:
            assert node.op != "placeholder", f"{site.name} reads {node}, which is none of its parameters"
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = graph.create_node(node.op, node.target, args, kwargs)
    graph.output((copies[site.output],))
    owner = site.output.graph.owning_module
    return fx.GraphModule(torch.nn.Module() if owner is None else owner, graph)


def traced(forward: Callable[[Any, Mapping[str, Any]], Any], constants: Iterable[str]) -> fx.GraphModule:
    """The rewritten FFN ``forward(input, constants)``, with its input and its constants as inputs."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x, *others = (fx.Proxy(graph.placeholder(name), tracer) for name in ("input", *constants))
    graph.output((forward(x, dict(zip(constants, others, strict=True))).node,))
    return fx.GraphModule(torch.nn.Module(), graph)


def _number(node: fx.Node) -> Any:
    """The value of a node that is a number or a shape, with hints in place of symbols."""
    value = node.meta["example_value"]
    return torch.Size(map(concrete, value)) if isinstance(value, torch.Size) else concrete(value)


def concrete(value: Any) -> Any:
    """A number, or the hint of a symbolic one."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value
