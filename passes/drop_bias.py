"""The biases go, all else stays: what an ablation without biases costs a model that was trained with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tardis_fx.graph.feed_forward import dense, matrices
from tardis_fx.passes.static import Choice, StaticRewrite, bias_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.calibration.observe import Observation, ObservedSite
    from tardis_fx.config import Config
    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.plan import SitePlan


class DropBias(StaticRewrite):
    """The rule of the module's docstring."""

    name: ClassVar[str] = "drop_bias"

    def refuse(self, site: Site) -> str | None:
        """A site without biases has none to lose."""
        if all(projection is None or projection.bias is None for projection in (site.up, site.gate, site.down)):
            return "it has no bias"
        return super().refuse(site)

    def floor(self, weights: SiteWeights) -> int:
        """The matrices."""
        return weights.bytes - bias_bytes(weights)

    def choose(self, observation: Observation, sites: Sequence[ObservedSite], config: Config) -> list[Choice]:
        """Nothing is measured."""
        return [Choice(self.floor(site.weights)) for site in sites]

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The matrices as they are."""
        return matrices(weights)

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The FFN without biases."""
        return dense(x, constants, str(plan.activation))
