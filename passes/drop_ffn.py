"""Replaces whole FFNs by their mean output, those with the least variance first (after LLM-Drop, arXiv 2406.15786).

The choice is measured, and does not depend on their position. Only the FFN of a residual block is visible at a site, so
the loss is the part that the residual stream loses: the variance of the output, in the stream's units, for each byte
saved. The mean remains as a bias.
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.layout import Expected, Layout, Tensors
from tardis_fx.passes.whole import WholeSites
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.regression import Residual


class DropFfn(WholeSites):
    """Replaces whole FFNs by their mean output."""

    name: ClassVar[str] = "drop_ffn"

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of one bias."""
        return len(weights.down) * weights.down.element_size()

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The mean output, [d_out]."""
        return {"mean": Expected(weights.down.dtype, (len(weights.down),))}

    def replaced(self, output: Residual, weights: SiteWeights) -> tuple[float, str, dict[str, Tensor]]:
        """The loss is the variance of the output per byte saved."""
        mean = output.mean
        missed = output.missed(mean.new_zeros(weights.up.shape[1], len(mean)), mean)
        loss = missed / (weights.bytes - self.floor(weights))
        return loss, f"its output varies by {missed:.3g}", {"mean": mean.to(weights.down.dtype)}

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Returns the mean for every token."""
        return torch.zeros_like(x[..., :1]) + constants["mean"]
