"""Replaces the activation by one line for all neurons, so that both matrices fold into one: the crudest fold.

``act(z) ≈ s z + t`` with s and t by least squares over all neurons and tokens; ``C = s W2 W1``, ``B = W2 (s b1 + t) +
b2``. The GLU paper (arXiv 2002.05202, section 2) trains gated FFNs without an activation, as bilinear layers. Here
nothing is trained, and a plain FFN without its activation is a single matrix. A gated FFN without its activation is the
product of two projections, which is not affine, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.graph.feed_forward import multiply
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.hot_fold import folded, map_bytes, map_layout
from tardis_fx.passes.layout import Layout
from tardis_fx.passes.static import Choice, StaticRewrite, measured
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.surrogates import Sums, SurrogateSums


class Bilinear(StaticRewrite):
    """Folds each plain FFN with one line fitted to all its activations."""

    name: ClassVar[str] = "bilinear"
    leaves_matrices = True

    def refuse(self, site: Site) -> str | None:
        """Refuses gated sites, which are not affine without their activation."""
        if site.kind == "gated":
            return "gated FFN: without its activation it is the product of two projections, which does not fold"
        return super().refuse(site)

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of the affine map."""
        return map_bytes(weights)

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Folds every site, even if the budget allows more."""
        neurons = yield measured(SurrogateSums, sites)
        return [Choice(map_bytes(s.weights), tensors=_fold(s.weights, neurons[s.fingerprint].sums)) for s in sites]

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Folded weight and bias."""
        return map_layout(weights)

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """The folded weight, read whole."""
        return {"folded_weight": 1.0}

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Folded weight [d_out, d] and bias [d_out]."""
        return {name: tensor.to(weights.up.device) for name, tensor in plan.tensors.items()}

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """Applies the fold as one linear layer."""
        return multiply(x, constants["folded_weight"], constants["folded_bias"])


def _fold(weights: SiteWeights, sums: Sums) -> dict[str, Tensor]:
    of_all = Sums(sums.table.sum(-1, keepdim=True), sums.k)
    slope, intercept = of_all.regress().unbind(1)
    up, down = weights.up.double().cpu(), weights.down.double().cpu()
    shift = intercept.expand(len(up))
    if weights.up_bias is not None:
        shift = shift + slope * weights.up_bias.double().cpu()
    bias = down @ shift
    if weights.down_bias is not None:
        bias = bias + weights.down_bias.double().cpu()
    return folded((slope * down @ up).T, bias, weights)
