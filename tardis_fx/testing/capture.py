"""The graph that Dynamo makes of a model, and the sites in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch.utils._sympy.symbol import SymT, symbol_is_type

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
    """Runs a model through Dynamo, which must make one graph of it, bound to no more sizes once it is matched."""
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        fake_mode: Any = TracingContext.get().fake_mode
        guards = fake_mode.shape_env.guards
        before = len(guards)
        graphs.append(Captured(gm, inputs, find_sites(gm.graph)))
        # The numbers of an activation are part of what it is.
        added = [guard.expr for guard in guards[before:]]
        bound = [expr for expr in added if not all(symbol_is_type(s, SymT.FLOAT) for s in expr.free_symbols)]
        assert not bound, f"matching bound the graph to {bound}"
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
