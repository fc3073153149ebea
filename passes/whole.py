"""Base class of rewrites that replace some whole FFNs by a small map, and keep the others.

1. The budget applies to the model, not to each site: sites are replaced, those with the smallest loss first, until the
   bytes of all sites are within the budget. Neither the number of replaced sites nor a limit on the loss is an option.
2. The reason of a kept site states the loss that it would have had.
"""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import CalibrationError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.run import Fit
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.static import Choice, StaticRewrite, measured
from tardis_fx.statistics.affine import Outputs
from tardis_fx.statistics.regression import Residual


class WholeSites(StaticRewrite):
    """Base class of rewrites that replace whole FFNs."""

    compares_sites = True

    @abstractmethod
    def replaced(self, output: Residual, weights: SiteWeights) -> tuple[float, str, dict[str, Tensor]]:
        """Loss of replacing a site (smallest first), its description, and the plan's tensors.

        Args:
            output: the regression of the site's output.
            weights: of the site.
        """

    def afford(self, sites: Sequence[ObservedSite], config: Config) -> None:
        """Checks the budget against the bytes with all sites replaced.

        Raises:
            CalibrationError: the budget is too small.
        """
        floor, dense = sum(self.floor(site.weights) for site in sites), sum(site.weights.bytes for site in sites)
        if floor > config.budget * dense:
            raise CalibrationError(
                f"a budget of {config.budget:.2%} is too small for {self.name}: with every FFN replaced it reads "
                f"{floor:,} bytes per token, {floor / dense:.2%} of the original's"
            )

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice | str]]:
        """Fits the regression of every site in one run, then chooses the sites to replace."""
        outputs = yield measured(Outputs, sites)
        candidates = [self.replaced(outputs[site.fingerprint].residual, site.weights) for site in sites]
        touched = sum(site.weights.bytes for site in sites)
        allowed = config.budget * touched
        choices: list[Choice | str] = [f"kept, for the budget is met without it: {loss}" for _, loss, _ in candidates]
        for i in sorted(range(len(sites)), key=lambda i: candidates[i][0]):
            if touched <= allowed:
                break
            size = self.floor(sites[i].weights)
            touched -= sites[i].weights.bytes - size
            choices[i] = Choice(size, candidates[i][2])
        return choices
