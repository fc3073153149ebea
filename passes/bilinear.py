"""Replaces the activation by one line for all neurons, so that both matrices fold into one: the crudest fold.

``act(z) ≈ s z + t`` with s and t by least squares over all neurons and tokens. The GLU paper (arXiv 2002.05202, section
2) trains gated FFNs without an activation, as bilinear layers. Here nothing is trained, and a plain FFN without its
activation is a single matrix. A gated FFN without its activation is the product of two projections, which is not
affine, so it is refused.
"""

from collections.abc import Sequence
from typing import ClassVar

from tardis_fx.config import Config
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.affine import AffineRewrite, fold, map_bytes
from tardis_fx.passes.static import Choice, measured
from tardis_fx.statistics.surrogates import Sums, SurrogateSums


class Bilinear(AffineRewrite):
    """Folds each plain FFN with one line fitted to all its activations."""

    name: ClassVar[str] = "bilinear"

    def refuse(self, site: Site) -> str | None:
        """Refuses gated sites, which are not affine without their activation."""
        if site.kind == "gated":
            return "gated FFN: without its activation it is the product of two projections, which does not fold"
        return super().refuse(site)

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Folds every site, even if the budget allows more."""
        neurons = yield measured(SurrogateSums, sites)
        return [_fold(site.weights, neurons[site.fingerprint].sums) for site in sites]


def _fold(weights: SiteWeights, sums: Sums) -> Choice:
    all_neurons = Sums(sums.table.sum(-1, keepdim=True), sums.k)
    return Choice(map_bytes(weights), fold(weights, *all_neurons.regress().unbind(1)))
