"""Replaces a graph's planned sites by modules, so that they can be trained in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from tardis_fx.graph.site import SiteWeights
from tardis_fx.graph.surgery import replace
from tardis_fx.passes import pipeline
from tardis_fx.plan import Plan, SitePlan


def graft(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    plan: Plan,
    module_of: Callable[[SitePlan, SiteWeights], nn.Module | None],
) -> list[pipeline.Outcome]:
    """Replaces a graph's planned sites by modules, and returns the outcome of every site.

    Args:
        gm: the observer's copy of a Dynamo graph module.
        example_inputs: inputs of the next call of the graph.
        plan: with the sites to replace.
        module_of: makes the module from an entry and the site's weights; returns None to skip the site.
    """
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    with torch.no_grad():  # the matcher refuses graphs that record gradients, since compilation would lose them
        found = pipeline.outcomes(gm, example_inputs, plan)
    moved: dict[fx.Node, fx.Node] = {}  # outputs of sites that feed another site
    for i, (site, entry, reason) in enumerate((o.site, o.plan, o.reason) for o in found):
        if not isinstance(entry, SitePlan) or reason:
            continue
        module = module_of(entry, SiteWeights.from_site(site, [values[p] for p in site.parameters]))
        if module is None:
            continue
        name = f"tardis_{i}"
        gm.add_submodule(name, module)

        def forward(x: Any, _: Any, name: str = name) -> Any:
            return x.tracer.create_proxy("call_module", name, (x,), {})

        moved[site.output] = replace(gm.graph, site, moved.get(site.input, site.input), forward, {})
    gm.graph.lint()
    gm.recompile()
    return found
