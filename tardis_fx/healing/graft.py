"""Replaces a model's planned sites by modules, so that they can be trained in place."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import fx, nn

from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.graph.surgery import replace
from tardis_fx.observation.batches import Batch
from tardis_fx.observation.capture import Capture
from tardis_fx.passes import pipeline
from tardis_fx.plan import Plan, SitePlan

M = TypeVar("M", bound=nn.Module)

_log = logging.getLogger("tardis_fx")


class Grafted(ABC, Generic[M]):
    """A model whose planned sites are modules, with the capture and the matcher of compilation.

    Attributes:
        sites: the modules by fingerprint, each made when a batch first reaches its site.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        """Prepares the model for a plan of FFNs.

        Raises:
            ConfigError: the plan has linear layers outside of FFNs.
        """
        if plan.config.linear_bits is not None:
            raise ConfigError("linear layers in codes cannot be trained: take a plan that has no linear_bits")
        self.sites: dict[str, M] = {}
        self._plan, self._outcomes = plan, list[pipeline.Outcome]()
        self._capture = Capture(model, self._graft)

    def __call__(self, batch: Batch, *, gradients: bool = False) -> Any:
        """Runs the model on a batch, with or without gradients."""
        return self._capture(batch, gradients=gradients)

    @abstractmethod
    def _module(self, entry: SitePlan, weights: SiteWeights) -> M | None:
        """Makes the module of a site, or returns None to leave the site as it is."""

    def _warn_of_refused(self, action: str) -> None:
        """Warns of the sites so far that the plan does not rewrite."""
        refused = pipeline.check(self._outcomes, self._plan, strict=False)
        for name, reason in dict.fromkeys((outcome.site.name or "an FFN", outcome.reason) for outcome in refused):
            _log.warning("%s is not %s: %s", name, action, reason)

    def _graft(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        values = dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        with torch.no_grad():  # the matcher refuses graphs that record gradients, since compilation would lose them
            outcomes = pipeline.outcomes(gm, example_inputs, self._plan)
        self._outcomes += outcomes
        moved: dict[fx.Node, fx.Node] = {}  # outputs of sites that feed another site
        for i, (site, entry, reason) in enumerate((o.site, o.plan, o.reason) for o in outcomes):
            if not isinstance(entry, SitePlan) or reason:
                continue
            module = self.sites.get(entry.fingerprint) or self._module(
                entry, SiteWeights.from_site(site, [values[p] for p in site.parameters])
            )
            if module is None:
                continue
            self.sites[entry.fingerprint] = module
            name = f"tardis_{i}"
            gm.add_submodule(name, module)

            def forward(x: Any, _: Any, name: str = name) -> Any:
                return x.tracer.create_proxy("call_module", name, (x,), {})

            moved[site.output] = replace(gm.graph, site, moved.get(site.input, site.input), forward, {})
        gm.graph.lint()
        gm.recompile()
        return gm.forward
