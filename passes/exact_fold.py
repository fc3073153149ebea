"""Folds FFNs that are already affine: exact to rounding, without calibration.

1. The activation is an affine function ``s z + t``: none at all, a scale, ``leaky_relu(1)``.
2. Or it is a ReLU, and the sign of every neuron's pre-activation follows from the weights and the bounds of the input
   (for example, the output of a ReLU or a softmax): then ``s`` is 1 or 0 for each neuron.
3. The lines fold as in :func:`tardis_fx.passes.affine.fold`.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.config import Config
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.affine import fold
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.layout import Expected, Layout, Tensors, setting
from tardis_fx.plan import KeptSite, Planned, SitePlan


class ExactFold(Rewrite):
    """Folds affine FFNs; the rewrite that needs no plan."""

    name: ClassVar[str] = "exact_fold"
    exact = True

    def refuse(self, site: Site) -> str | None:
        """Refuses sites that are not affine, as far as the graph shows."""
        if site.kind == "gated":
            return "it is gated, and the product of two projections is not affine"
        if site.affine is not None or site.activation == "relu":
            return None
        return "it is not affine"

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> list[Planned]:
        """Folds sites without measuring; keeps sites whose weights do not make them affine."""
        return [
            self.unaided(s.site, s.parameters)
            or KeptSite.from_site(s.site, s.parameters, reason="the sign of a pre-activation is not known")
            for s in sites
        ]

    def unaided(self, site: Site, parameters: Sequence[Tensor]) -> SitePlan | None:
        """Entry of the fold, without calibration; None if the site is not affine."""
        if site.reason is not None or self.refuse(site) is not None:
            return None
        weights = SiteWeights.from_site(site, parameters)
        line = _line(site, weights)
        if line is None:
            return None
        bias = any(b is not None for b in (weights.up_bias, weights.down_bias)) or bool(line[1].any())
        touched = weights.up.shape[1] * weights.down.shape[0] + bias * weights.down.shape[0]
        return SitePlan.from_site(
            site,
            parameters,
            method=self.name,
            stored_bytes=touched * weights.up.element_size(),
            touched_bytes=touched * weights.up.element_size(),
            settings={"bias": bias},
            tensors={"slope": line[0], "intercept": line[1]},
        )

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Slope and intercept of every neuron."""
        setting(plan, "bias", (True, False))
        line = Expected(torch.float64, (len(weights.up),))
        return {"slope": line, "intercept": line}

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Folded weight and, if there is one, bias."""
        slope, intercept = (plan.tensors[name].to(weights.up.device) for name in ("slope", "intercept"))
        constants = fold(weights, slope, intercept)
        if not plan.settings["bias"]:
            del constants["folded_bias"]
        return constants

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Applies the fold as one linear layer."""
        return F.linear(x, constants["folded_weight"], constants.get("folded_bias"))


def _line(site: Site, weights: SiteWeights) -> tuple[Float64[Tensor, " h"], Float64[Tensor, " h"]] | None:
    """Slope and intercept of every neuron; None if the activation is not affine for each."""
    ones = torch.ones(len(weights.up), dtype=torch.float64, device="cpu")
    if site.affine is not None:
        return site.affine[0] * ones, site.affine[1] * ones
    lower, upper = _range(weights, site.bounds)
    positive, negative = lower >= 0, upper <= 0
    return (positive.double(), 0 * ones) if bool((positive | negative).all()) else None


def _range(weights: SiteWeights, bounds: tuple[float, float]) -> tuple[Float64[Tensor, " h"], Float64[Tensor, " h"]]:
    """Lowest and highest pre-activation of every neuron, up to rounding."""
    up = weights.up.double().cpu()
    up_bias = torch.zeros_like(up[:, 0]) if weights.up_bias is None else weights.up_bias.double().cpu()

    def least(weight: Float64[Tensor, "h d"]) -> Float64[Tensor, " h"]:
        rise, fall = weight.clamp(min=0), weight.clamp(max=0)
        return (torch.where(rise == 0, 0, rise * bounds[0]) + torch.where(fall == 0, 0, fall * bounds[1])).sum(1)

    return least(up) + up_bias, up_bias - least(-up)
