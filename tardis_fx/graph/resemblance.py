"""Lists blocks that resemble an FFN but match no pattern, so that none is skipped silently.

A block resembles an FFN if one projection widens its input, another narrows it again, only the nodes below or unknown
ops that keep the shape lie between them, and nothing else flows in. Attention, recurrences and residual streams do not
qualify.
"""

from collections.abc import Mapping

import torch
from torch import fx

from tardis_fx.graph.cone import LARGEST_CONE, NO_ACTIVATION, Cone, cone_of, is_inner
from tardis_fx.graph.forms import (
    ARITHMETIC,
    CASTS,
    DROPOUT,
    ELEMENTWISE,
    MIXING,
    SPLIT,
    VIEWS,
    call_name,
    is_from_parameters,
    same,
    shape_of,
    walk,
)
from tardis_fx.graph.site import Kind, Projection, Site

_BETWEEN = ELEMENTWISE | VIEWS | CASTS | DROPOUT | SPLIT | MIXING | {"glu"}

#: Known to combine two of their inputs: parts of attention.
_COMBINES = frozenset("addbmm addmm baddbmm bmm einsum linear matmul mm scaled_dot_product_attention tensordot".split())

#: Operations that may cut a mask or a scale out of another tensor.
_CUTS = frozenset({"getitem", "expand", "repeat", "transpose"})


def resembling(down: Projection, projections: Mapping[fx.Node, Projection]) -> Site | None:
    """The refused site that ends in a projection, or None if no FFN-like block ends there.

    Args:
        down: a projection at which no FFN was matched.
        projections: all projections of the graph.
    """
    entering, leaving = down.sizes
    cone = cone_of(down, projections, _is_between, constants=True) if entering > leaving else None
    if cone is None or not cone.ups:
        return None
    up = cone.ups[0]
    if any(p.input is not up.input for p in cone.ups) or up.sizes[0] >= up.sizes[1]:
        return None
    reason = cone.unsupported or _reason(cone, projections)
    kind: Kind = "plain" if len(cone.ups) == 1 else "gated"
    return Site("", kind, None, up, down, None, cone.inner, reason) if reason else None


def _is_between(node: fx.Node) -> bool:
    return (call_name(node) in _BETWEEN or _is_unknown(node)) and not is_from_parameters(node, constants=True)


def _is_unknown(node: fx.Node) -> bool:
    """Whether the node is in no table, reads one or two tensors, and keeps or halves their shape."""
    if call_name(node) in _BETWEEN | _COMBINES | {None}:
        return False
    value = node.meta.get("example_value")
    if isinstance(value, (tuple, list)) and len(value) == 1:  # a higher-order op
        (value,) = value
    read = [i.meta["example_value"].shape for i in node.all_input_nodes if _is_activation(i)]
    if not (isinstance(value, torch.Tensor) and value.dim() and 1 <= len(read) <= 2 and same(read[0], read[-1])):
        return False
    *batch, columns = read[0] or (0,)
    return same(value.shape, read[0]) or (len(read) == 1 and same(value.shape, (*batch, columns // 2)))


def _is_activation(node: fx.Node) -> bool:
    return shape_of(node) is not None and not is_from_parameters(node, constants=True)


def _reason(cone: Cone, projections: Mapping[fx.Node, Projection]) -> str | None:
    """Why the cone is not an activation function; None if it is no FFN at all."""
    odd = [node for node in cone.region if not is_inner(node)]
    if not cone.strangers:
        if not odd:
            return NO_ACTIVATION if len(cone.ups) > 2 else None
        inside, unknown = {*cone.region, cone.down.product}, [node for node in odd if _is_unknown(node)]
        if not unknown and any(user not in inside for node in cone.region for user in node.users):
            return None  # a value that another branch also reads belongs to more than an FFN: a scan, a memory
        names = [name for node in unknown or odd if (name := call_name(node)) != "getitem"] or ["getitem"]
        return f"{names[0]} stands between its projections and is not an activation function"
    activates = any(call_name(n) not in ARITHMETIC and call_name(n) in ELEMENTWISE for n in cone.region)
    if any(call_name(node) not in _CUTS for node in odd) or not activates:
        return None  # a norm of a residual stream, or only a sum
    if any(_is_projected(node, cone.ups[0].input, projections) for node in cone.strangers):
        return None
    return f"its intermediate value is combined with {cone.strangers[0].name}, which its projections do not compute"


def _is_projected(node: fx.Node, entering: fx.Node, projections: Mapping[fx.Node, Projection]) -> bool:
    """Whether a node comes from other projections without passing the site's input: attention, a recurrence."""
    ancestors = walk(node, lambda n: [i for i in n.all_input_nodes if i is not entering])
    return any(ancestor in projections or i == LARGEST_CONE for i, ancestor in enumerate(ancestors, 1))
