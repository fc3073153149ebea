"""Modules inserted before and after a site while a model is observed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from tardis_fx.graph.site import Site
    from tardis_fx.observation.observe import BatchObservation


class Enter(nn.Module):
    """Shows a site's inputs to the observation; keeps a copy only if the output will be replaced."""

    def __init__(self, observation: BatchObservation, site: Site) -> None:
        super().__init__()
        self._observation, self._site = observation, site

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor | None:
        """Observes the inputs, and returns a copy if the site's output will be replaced."""
        self._observation.observe(self._site, list(parameters), x)
        return x.clone() if self._observation.replaced(self._site, list(parameters)) else None


class Leave(nn.Module):
    """Passes on a site's output or its replacement."""

    def __init__(self, observation: BatchObservation, site: Site) -> None:
        super().__init__()
        self._observation, self._site = observation, site

    def forward(self, output: Tensor, x: Tensor | None, *parameters: Tensor) -> Tensor:
        """Returns the site's output or its replacement."""
        function = self._observation.replaced(self._site, list(parameters))
        return output if function is None or x is None else function(x).view_as(output)
