"""Checks whether any rewrite may touch a site, and gives the reason if not."""

import math
from collections.abc import Iterator, Sequence

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
    walk,
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
    reason = next(_reasons(site, writes), None)
    return site if reason is None else site.refused(reason)


def _reasons(site: Site, writes: Sequence[Write]) -> Iterator[str]:
    yield from _foreign(site)
    if any(is_training_dropout(node) for node in site.inner):
        yield "it runs in training mode, where its dropout drops values"
    if site.activation is None and site.kind != "linear":
        yield f"its activation, made of {_made_of(site)}, is not in the registry"
    if site.gate is not None and site.gate is not site.up:
        if site.gate.input is not site.up.input:
            yield "gate and up projection read different inputs"
        if site.gate.weight is site.up.weight:
            yield "gate and up projection have the same weights"
        if site.gate.sizes != site.up.sizes:
            yield "gate and up projection differ in size"
    inside = {*site.inner, site.output}
    for node in sorted(site.inner, key=lambda n: n.name):
        if outside := [user for user in node.users if user not in inside]:
            yield f"its intermediate value {node.name} is also used by {outside[0].name}"
    for node in site.parameters:
        if node.op == "get_attr":
            yield "its weights are part of the graph (freezing): a rewrite of them needs a plan"
        if not is_parameter(node):
            yield f"{node.name} is not a parameter of a module, or is computed in the graph"
        if any(write.reaches([node]) for write in writes):
            yield f"the graph writes to its weight {node.name}"
    yield from _changed(site, writes)
    if _is_routed(site):
        yield "it is an expert of a mixture: its tokens are routed"
    entering, leaving = (shape_of(node) or torch.Size() for node in (site.input, site.output))
    if any(free_unbacked_symbols(size) for size in entering if isinstance(size, torch.SymInt)):
        yield "its number of tokens depends on the data"
    if not same(math.prod(entering[:-1]), math.prod(leaving[:-1])):
        yield "its output does not have as many tokens as its input, or their numbers cannot be compared"
    symbolic = not all(isinstance(size, int) for size in leaving)
    if symbolic and len(leaving) != 2 and not same_tokens(entering, leaving):
        yield "its shape changes between the projections, and is symbolic"
    if _grad_enabled(site.output.graph) and any(_requires_grad(node) for node in (*site.parameters, site.output)):
        yield "it needs gradients: call the model under torch.no_grad() or torch.inference_mode()"
    if _autocasts(site.output):
        yield "it runs under autocast, which casts the weights at every call"
    yield from _mixed(site)


def _foreign(site: Site) -> Iterator[str]:
    """Reasons why rewritten code cannot read the site's tensors."""
    for name, nodes in (("weights", site.parameters), ("inputs", (site.input, site.output))):
        for value in map(value_of, nodes):
            if kind := subclass_name(value):
                yield f"its {name} are {kind}: a rewrite reads plain tensors only"
            if value is not None and value.device.type == "meta":
                yield f"its {name} are on the meta device: there is nothing to read"
    if _is_transformed(site.output.graph):
        yield "it runs under forward-mode differentiation or a transform of torch.func, which no rewrite supports"


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


def _is_routed(site: Site) -> bool:
    """Whether the site reads tokens that an index picked, and an index puts its results back."""
    source = site.input
    while is_transparent(source):
        source = source.all_input_nodes[0]
    if not _picks(source):
        return False
    keeping = walk(site.output, lambda node: [user for user in node.users if call_name(user) in _KEEPS])
    return any(_picks(user) or call_name(user) in _PUTS for node in keeping for user in node.users)


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


def _changed(site: Site, writes: Sequence[Write]) -> Iterator[str]:
    """Reasons why a site's values may change between their reads: a rewrite reads the input only once."""
    reads = sorted({p.product for p in (site.up, site.gate) if p is not None})
    if write := changes(writes, site.input, reads[0], reads[-1]):
        yield f"{write.node.name} writes to its input between the reads of its gate and its up projection"
    for write in (w for w in writes if reads[0] <= w.node <= site.output):
        if write.node in site.inner or write.node is site.output:
            if write.reaches(n for n in site.output.graph.nodes if n < reads[0]):
                yield f"{write.node.name} writes to a tensor that is used outside the site"
        elif write.reaches(site.inner):
            yield f"{write.node.name} writes to its intermediate value"


def _mixed(site: Site) -> Iterator[str]:
    """Names the tensors whose dtype or device differs from that of the up projection's, or the layer's, weights."""
    nodes: dict[str, fx.Node] = {}
    roles = {"gate": site.gate, "up": site.up, "down": site.down}
    if site.kind == "linear":
        nodes, roles = dict(zip(("its weight", "its bias"), site.parameters, strict=False)), {}
    for role, projection in roles.items():
        parts = () if projection is None else zip(("weight", "bias"), projection.parameters, strict=False)
        nodes |= {f"the {part} of its {role} projection": node for part, node in parts}
    compared = "its weight" if site.kind == "linear" else "the weight of its up projection"
    nodes |= {"its input": site.input, "its output": site.output}
    weight = site.up.weight.meta["example_value"]
    if weight.dtype not in _TYPES:
        yield f"its weights are {weight.dtype}"
    for name, node in nodes.items():
        value = node.meta["example_value"]
        for actual, required in ((value.dtype, weight.dtype), (value.device, weight.device)):
            if actual != required:
                yield f"{name} is {actual}, but {compared} is {required}"
    limits = torch.finfo(weight.dtype)
    for node in sorted(site.inner):
        value = value_of(node)
        if value is not None and value.is_floating_point():
            precision = torch.finfo(value.dtype)
            if precision.eps > limits.eps or precision.max < limits.max:
                yield f"its intermediate value {node.name} is {value.dtype}, coarser than its weights, {weight.dtype}"


def _requires_grad(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.requires_grad
