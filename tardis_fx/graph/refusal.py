"""Checks whether any rewrite may touch a site, and gives the reason if not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tardis_fx.graph.forms import (
    ARITHMETIC,
    CASTS,
    ELEMENTWISE,
    VIEWS,
    call_name,
    is_parameter,
    is_training_dropout,
    is_transparent,
    same,
    same_tokens,
    shape_of,
    value_of,
)
from tardis_fx.graph.site import Site
from tardis_fx.graph.subclasses import subclass_name
from tardis_fx.graph.writes import Write, changes

#: Dtypes that the weights may have.
_TYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})

#: Put rows back at indexed positions.
_PUTS = frozenset("index_add index_copy index_put scatter scatter_add scatter_reduce setitem".split())

#: Keep rows separate.
_KEEPS = ELEMENTWISE | VIEWS | CASTS


def checked(site: Site, writes: Sequence[Write]) -> Site:
    """The site, refused with the first reason why no rewrite may touch it, if there is one.

    Args:
        site: as matched.
        writes: all writes of its graph.
    """
    own = {*site.inner, site.output}
    ups = {site.up, site.gate} - {None}
    if foreign := _foreign(site):
        return site.refused(foreign)
    if any(is_training_dropout(node) for node in site.inner):
        return site.refused("in training mode: dropout drops")
    if site.activation is None:
        return site.refused(f"its activation, made of {_made_of(site)}, is not in the registry")
    if any(p is not None and p.input is not site.input for p in ups):
        return site.refused("gate and up projection read different inputs")
    if site.gate is not None and site.gate is not site.up:
        if site.gate.weight is site.up.weight:
            return site.refused("gate and up projection have the same weights")
        if site.gate.sizes != site.up.sizes:
            return site.refused("gate and up projection differ in size")
    for node in sorted(site.inner, key=lambda n: n.name):
        if strangers := [user for user in node.users if user not in own]:
            return site.refused(f"its intermediate value {node.name} is also used by {strangers[0].name}")
    for node in site.parameters:
        if node.op == "get_attr":
            return site.refused("its weights are part of the graph (freezing): that takes a plan")
        if not is_parameter(node):
            return site.refused(f"{node.name} is not a parameter of a module, or is computed in the graph")
        if any(write.reaches([node]) for write in writes):
            return site.refused(f"the graph writes to its weight {node.name}")
    if reason := _changed(site, writes):
        return site.refused(reason)
    if _is_routed(site):
        return site.refused("it is an expert of a mixture: its tokens are routed")
    entering, leaving = (shape_of(node) or torch.Size() for node in (site.input, site.output))
    if any(free_unbacked_symbols(size) for size in entering if isinstance(size, torch.SymInt)):
        return site.refused("how many tokens it gets depends on the data")
    if not same(_tokens(entering), _tokens(leaving)):
        return site.refused("its result has not as many tokens as its input, or it is not known whether it has")
    symbolic = not all(isinstance(size, int) for size in leaving)
    if symbolic and len(leaving) != 2 and not same_tokens(entering, leaving):
        return site.refused("its shape changes between the projections, and is symbolic")
    if _grad_enabled(site.output.graph) and any(_requires_grad(node) for node in (*site.parameters, site.output)):
        return site.refused("it needs gradients: call the model under torch.no_grad() or torch.inference_mode()")
    if _autocasts(site.output):
        return site.refused("it runs under autocast, which casts the weights at every call")
    return site.refused(reason) if (reason := _mixed(site)) else site


def _foreign(site: Site) -> str | None:
    """Why rewritten code cannot read the site's tensors, or None."""
    for what, nodes in (("weights", site.parameters), ("inputs", (site.input, site.output))):
        for value in map(value_of, nodes):
            if kind := subclass_name(value):
                return f"its {what} are {kind}: a rewrite reads plain tensors only"
            if value is not None and value.device.type == "meta":
                return f"its {what} are on the meta device: there is nothing to read"
    if _is_transformed(site.output.graph):
        return "it runs under forward-mode differentiation or a transform of torch.func, which rewrites know nothing of"
    return None


def _is_transformed(graph: fx.Graph) -> bool:
    """Whether the graph runs under forward-mode differentiation, or enters a transform of torch.func."""
    return forward_ad._current_level >= 0 or any(
        node.op == "call_function" and getattr(node.target, "__name__", "").endswith("_increment_nesting")
        for node in graph.nodes
    )


def _made_of(site: Site) -> str:
    """Names of the operations that compute the activation, without arithmetic unless there is nothing else."""
    names = dict.fromkeys(str(call_name(n)) for n in sorted(site.inner) if call_name(n) in ELEMENTWISE)
    return ", ".join([name for name in names if name not in ARITHMETIC] or names)


def _tokens(shape: torch.Size) -> int | torch.SymInt:
    return math.prod(shape[:-1])


def _is_routed(site: Site) -> bool:
    """Whether the site reads tokens that an index picked, and an index puts its results back."""
    source = site.input
    while is_transparent(source):
        source = source.all_input_nodes[0]
    if not _picks(source):
        return False
    front, seen = [site.output], {site.output}
    while front:
        users = [user for user in front.pop().users if user not in seen]
        if any(_picks(user) or call_name(user) in _PUTS for user in users):
            return True
        seen.update(users)
        front += [user for user in users if call_name(user) in _KEEPS]
    return False


def _picks(node: fx.Node) -> bool:
    """Whether the node selects by an index that is a tensor."""
    indexed = call_name(node) == "getitem" and any(shape_of(i) is not None for i in node.all_input_nodes[1:])
    return indexed or call_name(node) in ("gather", "index", "index_select", "take_along_dim")


def _grad_enabled(graph: fx.Graph) -> bool:
    """Whether gradients are recorded around the graph, or switched on in it."""
    switches = graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    return torch.is_grad_enabled() or any(node.args[0] is True for node in switches)


def _autocasts(output: fx.Node) -> bool:
    inside = output.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast)
    return bool(inside) or torch.is_autocast_enabled(output.meta["example_value"].device.type)


def _changed(site: Site, writes: Sequence[Write]) -> str | None:
    """Why a site's values may change between their reads, or None.

    A rewrite reads the input once and creates the output.
    """
    reads = sorted({p.product for p in (site.up, site.gate) if p is not None})
    if write := changes(writes, site.input, reads[0], reads[-1]):
        return f"{write.node.name} writes to its input between the reads of its gate and its up projection"
    own = {*site.inner, site.output}
    for write in (w for w in writes if reads[0] <= w.node <= site.output):
        if write.node not in own and write.reaches(site.inner):
            return f"{write.node.name} writes to its intermediate value"
        if write.node in own and write.reaches(n for n in site.output.graph.nodes if n < reads[0]):
            return f"{write.node.name} writes to a tensor that is not of the site alone"
    return None


def _mixed(site: Site) -> str | None:
    """Names a tensor whose dtype or device differs from that of the up projection's weights, or None."""
    named: dict[str, fx.Node] = {}
    for role, projection in (("gate", site.gate), ("up", site.up), ("down", site.down)):
        parts = () if projection is None else zip(("weight", "bias"), projection.parameters, strict=False)
        named |= {f"the {part} of its {role} projection": node for part, node in parts}
    named |= {"its input": site.input, "its result": site.output}
    weight = site.up.weight.meta["example_value"]
    if weight.dtype not in _TYPES:
        return f"its weights are {weight.dtype}"
    for name, node in named.items():
        value = node.meta["example_value"]
        for one, other in ((value.dtype, weight.dtype), (value.device, weight.device)):
            if one != other:
                return f"{name} is {one}, the weight of its up projection {other}"
    limits = torch.finfo(weight.dtype)
    for node in sorted(site.inner):
        value = value_of(node)
        if value is None or not value.is_floating_point():
            continue
        if (own := torch.finfo(value.dtype)).eps > limits.eps or own.max < limits.max:
            return f"its intermediate value {node.name} is {value.dtype}, coarser than its weights, {weight.dtype}"
    return None


def _requires_grad(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.requires_grad
