"""The original FFN, which other rewrites wrap. It is not registered, because it changes nothing by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import Layout
from tardis_fx.passes.static import Choice, StaticRewrite
from tardis_fx.plan import SitePlan


class Original(StaticRewrite):
    """Leaves the FFN unchanged, for other rewrites to wrap."""

    name: ClassVar[str] = "original"
    leaves_matrices = True

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of all weights."""
        return weights.bytes

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> list[Choice]:
        """Keeps every site unchanged."""
        return [Choice(site.weights.bytes) for site in sites]

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """No tensors: the entry is empty."""
        return {}

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """All matrices, read whole."""
        return dict.fromkeys(matrices_of(plan), 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The original matrices and biases."""
        return matrices(weights) | biases(weights)

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """Applies the original FFN."""
        return dense(x, constants, str(plan.activation))
