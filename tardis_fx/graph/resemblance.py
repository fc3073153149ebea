"""Lists what resembles an FFN but is none that the matcher knows, so that nothing is passed over in silence.

It resembles an FFN when a projection widens its input, nothing but the nodes below stands between it and a projection
that narrows again, and nothing else flows in: attention, recurrences and residual streams do not qualify.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tardis_fx.graph.cone import LARGEST_CONE, Cone, cone_of, is_inner
from tardis_fx.graph.forms import (
    ARITHMETIC,
    CASTS,
    DROPOUT,
    ELEMENTWISE,
    MIXING,
    SPLIT,
    VIEWS,
    call_name,
)
from tardis_fx.graph.site import Projection, Site

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

_BETWEEN = ELEMENTWISE | VIEWS | CASTS | DROPOUT | SPLIT | MIXING | {"glu"}

#: What may cut a mask or a scale out of another tensor.
_CUTS = frozenset({"getitem", "expand", "repeat", "transpose"})


def resembling(down: Projection, projections: Mapping[fx.Node, Projection]) -> Site | None:
    """The refused site that ends in a projection, or None where nothing of the kind ends there.

    Args:
        down: a projection at which no FFN was matched.
        projections: all projections of the graph.
    """
    entering, leaving = down.sizes
    cone = cone_of(down, projections, lambda node: call_name(node) in _BETWEEN) if entering > leaving else None
    if cone is None or not cone.ups:
        return None
    up = cone.ups[0]
    if any(p.input is not up.input for p in cone.ups) or up.sizes[0] >= up.sizes[1]:
        return None
    unread = next((p.reason for p in (*cone.ups, down) if p.reason), None)
    reason = unread or _reason(cone, up, down, projections)
    if reason is None:
        return None
    inner = frozenset({*cone.region, *(n for p in cone.ups for n in (p.product, p.node)), down.product} - {down.node})
    return Site("", "plain" if len(cone.ups) == 1 else "gated", None, up, down, None, inner, reason)


def _reason(cone: Cone, up: Projection, down: Projection, projections: Mapping[fx.Node, Projection]) -> str | None:
    """What keeps the cone from being an activation function; None where it is no FFN at all."""
    odd = [node for node in cone.region if not is_inner(node)]
    if not cone.strangers:
        own = {*cone.region, down.product}
        if not odd or any(user not in own for node in cone.region for user in node.users):
            return None  # what another branch reads as well belongs to more than an FFN: a scan, a memory
        return f"{call_name(odd[0])} stands between its projections, and is no activation function"
    activates = any(call_name(n) not in ARITHMETIC and call_name(n) in ELEMENTWISE for n in cone.region)
    if any(call_name(node) not in _CUTS for node in odd) or not activates:
        return None  # a norm of a residual stream, or only a sum
    if any(_is_projected(node, up, projections) for node in cone.strangers):
        return None
    return f"{cone.strangers[0].name} joins in between its projections"


def _is_projected(node: fx.Node, up: Projection, projections: Mapping[fx.Node, Projection]) -> bool:
    """Whether a node comes from other projections without passing the site's input: attention, a recurrence."""
    front, seen = [node], {node, up.input}
    while front:
        found = front.pop()
        if found in projections or len(seen) > LARGEST_CONE:
            return True
        front += [i for i in found.all_input_nodes if i not in seen]
        seen.update(found.all_input_nodes)
    return False
