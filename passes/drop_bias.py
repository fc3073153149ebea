"""The biases go, all else stays: what an ablation without biases costs a model that was trained with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.activations import ACTIVATIONS
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
        if site.up.bias is None and site.down.bias is None:
            return "it has no bias"
        return super().refuse(site)

    def floor(self, weights: SiteWeights) -> int:
        """Both matrices."""
        return weights.bytes - bias_bytes(weights)

    def choose(self, observation: Observation, sites: Sequence[ObservedSite], config: Config) -> list[Choice]:
        """Nothing is measured."""
        return [Choice(self.floor(site.weights)) for site in sites]

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The matrices as they are."""
        return {"w1": weights.w1, "w2": weights.w2}

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The FFN without biases."""
        return F.linear(ACTIVATIONS[str(plan.activation)].eager(F.linear(x, constants["w1"])), constants["w2"])
