"""Puts modules in the place of a graph's planned sites, so that they can be trained where they stand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from tardis_fx.graph.site import SiteWeights
from tardis_fx.graph.surgery import replace
from tardis_fx.passes import pipeline
from tardis_fx.plan import SitePlan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tardis_fx.plan import Plan


def graft(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    plan: Plan,
    module_of: Callable[[SitePlan, SiteWeights], nn.Module | None],
) -> list[pipeline.Outcome]:
    """Puts modules at a graph's planned sites; what was found of every site.

    Args:
        gm: the observer's copy of a Dynamo graph module.
        example_inputs: what it is about to be called with.
        plan: whose sites are looked for.
        module_of: the module of an entry and the site's weights, or None to leave the site alone.
    """
    values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
    with torch.no_grad():  # the matcher refuses what records gradients, for compilation would lose them
        found = pipeline.outcomes(gm, example_inputs, plan)
    moved: dict[fx.Node, fx.Node] = {}  # outputs of sites, where one feeds the next
    for i, (site, entry, reason) in enumerate((o.site, o.plan, o.reason) for o in found):
        if not isinstance(entry, SitePlan) or reason:
            continue
        module = module_of(entry, SiteWeights.of(site, [values[p] for p in site.parameters]))
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
