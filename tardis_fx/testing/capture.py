"""The graph that Dynamo makes of a model, and the sites in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from tardis_fx.graph.matcher import find_sites

if TYPE_CHECKING:
    from collections.abc import Callable

    from tardis_fx.graph.site import Site


class Captured(NamedTuple):
    """A graph as a backend gets it, matched at once: what the matcher asks about gradients holds only then."""

    gm: fx.GraphModule
    inputs: list[Tensor]
    sites: list[Site]


def capture(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = None, grad: bool = False, **kwargs: Any
) -> Captured:
    """Runs a model through Dynamo, which must make one graph of it."""
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(Captured(gm, inputs, find_sites(gm.graph)))
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    (captured,) = graphs
    return captured


def sites_of(
    model: nn.Module, *args: Any, dynamic: bool | None = None, grad: bool = False, **kwargs: Any
) -> list[Site]:
    """The sites of a model, refused ones included."""
    return capture(model, *args, dynamic=dynamic, grad=grad, **kwargs).sites
