"""The FFN as it is: what other rewrites are put around. Registered nowhere, for by itself it does nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.static import Choice, StaticRewrite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.passes.layout import Layout
    from tardis_fx.plan import SitePlan


class Original(StaticRewrite):
    """The rule of the module's docstring."""

    name: ClassVar[str] = "original"
    leaves_matrices = True

    def floor(self, weights: SiteWeights) -> int:
        """All bytes."""
        return weights.bytes

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> list[Choice]:
        """Nothing is chosen."""
        return [Choice(site.weights.bytes) for site in sites]

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """No tensors."""
        return {}

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """All, read whole."""
        return dict.fromkeys(matrices_of(plan), 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The weights."""
        return matrices(weights) | biases(weights)

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The FFN."""
        return dense(x, constants, str(plan.activation))
