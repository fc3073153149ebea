"""What stands at both ends of a site while a model is observed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from tardis_fx.graph.site import Site
    from tardis_fx.observation.observe import BatchObservation


class Enter(nn.Module):
    """Shows a site's inputs; a copy is kept only where the output is going to be replaced."""

    def __init__(self, observation: BatchObservation, site: Site) -> None:
        super().__init__()
        self._observation, self._site = observation, site

    def forward(self, x: Tensor, *parameters: Tensor) -> Tensor | None:
        """The site's inputs where they are needed to replace its output."""
        self._observation.observe(self._site, list(parameters), x)
        return x.clone() if self._observation.replaced(self._site, list(parameters)) else None


class Leave(nn.Module):
    """Passes a site's output, or what replaces it."""

    def __init__(self, observation: BatchObservation, site: Site) -> None:
        super().__init__()
        self._observation, self._site = observation, site

    def forward(self, output: Tensor, x: Tensor | None, *parameters: Tensor) -> Tensor:
        """The site's output."""
        function = self._observation.replaced(self._site, list(parameters))
        return output if function is None or x is None else function(x).view_as(output)
