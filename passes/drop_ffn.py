"""Whole FFNs by their mean output, those first whose output varies least (after LLM-Drop, arXiv 2406.15786).

Which go is measured, not read off their position. Of a residual block nothing but the FFN is visible at a site, so the
loss is what leaves the residual stream with it: the variance of the output, in the stream's own units, for each byte
that goes. The mean stays as a bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.passes.layout import Expected
from tardis_fx.passes.whole import WholeSites

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.passes.layout import Layout
    from tardis_fx.plan import SitePlan
    from tardis_fx.statistics.regression import Residual


class DropFfn(WholeSites):
    """The rules of the module's docstring."""

    name: ClassVar[str] = "drop_ffn"

    def floor(self, weights: SiteWeights) -> int:
        """One bias."""
        return len(weights.down) * weights.down.element_size()

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The mean."""
        return {"mean": Expected(weights.down.dtype, (len(weights.down),))}

    def replaced(self, output: Residual, weights: SiteWeights) -> tuple[float, str, dict[str, Tensor]]:
        """Lost is the variance of the output."""
        mean = output.mean
        missed = output.missed(torch.zeros(weights.up.shape[1], len(mean), dtype=mean.dtype, device=mean.device), mean)
        loss = missed / (weights.bytes - self.floor(weights))
        return loss, f"its output varies by {missed:.3g}", {"mean": mean.to(weights.down.dtype)}

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The mean for every token."""
        return torch.zeros_like(x[..., :1]) + constants["mean"]
