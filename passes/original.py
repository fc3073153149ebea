"""The FFN as it is: what other rewrites are put around. Registered nowhere, for by itself it does nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch.nn import functional as F  # noqa: N812

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.passes.static import Choice, StaticRewrite, biases

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.calibration.observe import Observation, ObservedSite
    from tardis_fx.config import Config
    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.plan import SitePlan


class Original(StaticRewrite):
    """The rule of the module's docstring."""

    name: ClassVar[str] = "original"

    def refuse(self, site: Site) -> str | None:
        """Gated sites, and what no rewrite takes."""
        return "gated FFN: not yet rewritten by it" if site.kind == "gated" else super().refuse(site)

    def floor(self, weights: SiteWeights) -> int:
        """All bytes."""
        return weights.bytes

    def choose(self, observation: Observation, sites: Sequence[ObservedSite], config: Config) -> list[Choice]:
        """Nothing is chosen."""
        return [Choice(site.weights.bytes) for site in sites]

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """Both, read whole."""
        return {"w1": 1.0, "w2": 1.0}

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The weights."""
        return {"w1": weights.w1, "w2": weights.w2} | biases(weights)

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The FFN."""
        hidden = ACTIVATIONS[str(plan.activation)].eager(F.linear(x, constants["w1"], constants.get("b1")))
        return F.linear(hidden, constants["w2"], constants.get("b2"))
