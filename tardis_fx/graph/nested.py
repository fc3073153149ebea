"""Lists, as refused, the sites inside other graphs (higher-order ops) and fused ops that a graph calls."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import fx
from torch.utils._pytree import tree_leaves

from tardis_fx.graph.forms import call_name
from tardis_fx.graph.site import Projection, Site
from tardis_fx.graph.unfuse import is_fused

FUSED = "it runs inside a fused encoder layer with a mask: torch.backends.mha.set_fastpath_enabled(False) unfuses it"


def nested_sites(node: fx.Node, find: Callable[[fx.Graph], list[Site]]) -> list[Site]:
    """The sites of the graphs that a node calls (``torch.utils.checkpoint``, ``torch.cond``, a nested region).

    Their parameters are mapped to those of the outer graph, which gives them names and weights.

    Args:
        node: any node.
        find: finds the sites of one graph.
    """
    if node.op != "call_function" or node.graph.owning_module is None:
        return []
    sites: list[Site] = []
    for called in filter(None, map(called_graph, tree_leaves((node.args, node.kwargs)))):
        inputs = called.graph.find_nodes(op="placeholder")
        values = [o for o in tree_leaves(node.args) if called_graph(o) is None][-len(inputs) :]
        outer = {i: v for i, v in zip(inputs, values, strict=len(values) == len(inputs)) if isinstance(v, fx.Node)}
        reason = f"it is computed inside {call_name(node)}, in a graph of its own"
        sites += [_lifted(replace(site, reason=reason), outer) for site in find(called.graph)]
    return sites


def called_graph(operand: object) -> fx.GraphModule | None:
    """The graph that an operand of a higher-order op stands for, or None."""
    if not (isinstance(operand, fx.Node) and operand.op == "get_attr"):
        return None
    called = getattr(operand.graph.owning_module, str(operand.target), None)
    return called if isinstance(called, fx.GraphModule) else None


def _lifted(site: Site, outer: Mapping[fx.Node, fx.Node]) -> Site:
    """The site with the parameters of the outer graph."""

    def lift(p: Projection) -> Projection:
        return replace(p, weight=outer.get(p.weight, p.weight), bias=p.bias and outer.get(p.bias, p.bias))

    up = lift(site.up)
    gate = up if site.gate is site.up else site.gate and lift(site.gate)
    return replace(site, up=up, down=up if site.down is site.up else lift(site.down), gate=gate)


def fused_site(node: fx.Node) -> Site | None:
    """The FFN inside the fused op of ``nn.TransformerEncoderLayer`` in eval mode, or None."""
    if not is_fused(node):
        return None
    x, gelu, entering, leaving = node.args[0], node.args[7], node.args[14:16], node.args[16:18]
    up, down = (Projection(node, node, x, weight, bias, False) for weight, bias in (entering, leaving))  # type: ignore[arg-type]
    return Site("", "plain", "gelu" if gelu else "relu", up, down, None, frozenset(), FUSED)
