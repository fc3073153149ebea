"""The regression of an FFN's output on its inputs."""

from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Bool, Float32
from torch import Tensor

from tardis_fx.observation.site import Merge, ObservedSite
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.regression import Residual


class Outputs:
    """Observer for the regression of a site's output on its inputs.

    Memory: 2 (d² + d d_out) float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"residual": "parts"}

    def __init__(self, site: ObservedSite, exact: Bool[Tensor, " h"] | None = None) -> None:
        """Allocates the sums of the regression.

        Args:
            site: the site.
            exact: neurons whose contribution is excluded from the regression; None for none.
        """
        self._neurons, self._exact = Neurons.from_site(site), exact
        self.residual = Residual(site.weights.up.shape[1], len(site.weights.down))

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        _, response = self._neurons.evaluate(x)
        output = self._neurons.output(response)
        rest = output if self._exact is None else self._neurons.output(response.masked_fill(self._exact, 0))
        self.residual.update(x, rest, output)
