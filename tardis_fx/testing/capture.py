"""Captures the Dynamo graph of a model and the sites in it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._guards import TracingContext
from torch.utils._sympy.symbol import SymT, symbol_is_type

from tardis_fx.graph.matcher import find_sites
from tardis_fx.graph.site import Site


class Captured(NamedTuple):
    """A captured graph with its sites, matched immediately because the gradient mode only holds then."""

    gm: fx.GraphModule
    inputs: list[Tensor]
    sites: list[Site]


def capture(
    model: Callable[..., Any], *args: Any, dynamic: bool | None = None, grad: bool = False, **kwargs: Any
) -> Captured:
    """Captures a model with Dynamo as one graph; asserts that matching adds no guards on sizes."""
    graphs: list[Captured] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        fake_mode: Any = TracingContext.get().fake_mode
        guards = fake_mode.shape_env.guards
        before = len(guards)
        graphs.append(Captured(gm, inputs, find_sites(gm.graph)))
        # The constants of an activation are part of its definition.
        added = [guard.expr for guard in guards[before:]]
        bound = [expr for expr in added if not all(symbol_is_type(s, SymT.FLOAT) for s in expr.free_symbols)]
        assert not bound, f"matching bound the graph to {bound}"
        return gm.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    (captured,) = graphs
    return captured


def sites_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[Site]:
    """The sites of a model, including refused ones; arguments as for :func:`capture`."""
    return capture(model, *args, **kwargs).sites
