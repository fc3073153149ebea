"""The tardis backend with plans that change nothing, made for each graph as it comes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from builders.ffns import config, exact_plan
from tardis_fx import Plan
from tardis_fx.graph.matcher import find_sites
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.graph.unfuse import unfuse
from tardis_fx.passes import pipeline
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.passes.weight_guard import GuardedGraph
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.fingerprint import fingerprint


class Exact:
    """Rewrites every site that ``guarded_fold`` takes, so that all neurons are always computed exactly.

    Attributes:
        sites: of all graphs, refused ones included.
        plans: of the sites that were rewritten.
        graphs: how many there were.
        rewritten: how many sites were.
    """

    def __init__(self, *, wrong: float = 0) -> None:
        self.sites: list[Site] = []
        self.plans: list[SitePlan] = []
        self.graphs = self.rewritten = 0
        self._wrong = wrong

    def __call__(self, gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Compiles a graph."""
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        unfuse(gm.graph)
        sites = find_sites(gm.graph)
        plans = []
        for site in sites:
            if site.reason is None and GuardedFold().refuse(site) is None:
                parameters = [values[node] for node in site.parameters]
                plan = exact_plan(SiteWeights.from_site(site, parameters), parameters, str(site.activation))
                plans.append(replace(plan, fingerprint=fingerprint(parameters, site.function)))
                plans[-1].tensors["folded_weight"] *= 1 + self._wrong
        result = pipeline.apply(gm, inputs, Plan(tuple(plans), config()), "rewritten")
        self.sites += sites
        self.plans += plans
        self.graphs += 1
        self.rewritten += len(result.guards)
        return GuardedGraph(result.gm, result.guards, _no_other, inputs) if result.modified else gm.forward

    @property
    def found(self) -> list[tuple[str, str, str | None, str | None]]:
        """Name, kind, activation and reason of every site."""
        return [(s.name, s.kind, s.activation, s.reason) for s in self.sites]


def _no_other(unknown: list[str], changed: bool) -> Any:
    raise AssertionError(f"weights that the plan does not know: {unknown}")


def tensors(output: Any) -> list[Tensor]:
    """All floating tensors of a model's output, but for caches."""
    output = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def assert_same(output: Any, expected: Any) -> None:
    """Whether two outputs agree, to the rounding of another order of summation."""
    for one, other in zip(tensors(output), tensors(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def run(
    model: Callable[..., Any], *args: Any, fullgraph: bool = True, dynamic: bool | None = None, **kwargs: Any
) -> Exact:
    """The backend after one call, whose result was the model's."""
    backend = Exact()
    with torch.no_grad():
        expected = model(*args, **kwargs)
        fast = torch.compile(model, backend=backend, fullgraph=fullgraph, dynamic=dynamic)
        assert_same(fast(*args, **kwargs), expected)
    return backend
