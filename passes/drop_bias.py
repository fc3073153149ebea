"""The biases in front of the activation go; their mean effect on the calibration tokens goes into ``down_bias``.

After it the site is an FFN without biases but the last one, which other rewrites can be fitted to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import Expected
from tardis_fx.passes.static import Choice, StaticRewrite, bias_bytes, measured
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.operands import Operands

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.observation.merging import Merge
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.observation.run import Fit
    from tardis_fx.passes.layout import Layout
    from tardis_fx.plan import SitePlan


class DropBias(StaticRewrite):
    """The rules of the module's docstring."""

    name: ClassVar[str] = "drop_bias"
    leaves_matrices = True
    leaves_ffn = True

    def refuse(self, site: Site) -> str | None:
        """Sites that have no bias in front of the activation to lose."""
        if all(projection is None or projection.bias is None for projection in (site.up, site.gate)):
            return "it has no bias in front of its activation"
        return super().refuse(site)

    def floor(self, weights: SiteWeights) -> int:
        """The matrices, and the last bias."""
        return weights.bytes - bias_bytes(weights) + len(weights.down) * weights.down.element_size()

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """One run, of the means."""
        lost = yield measured(Lost, sites)
        return [Choice(self.floor(s.weights), {"bias": lost[s.fingerprint].bias(s.weights)}) for s in sites]

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The last bias."""
        return {"bias": Expected(weights.down.dtype, (len(weights.down),))}

    def weights(self, plan: SitePlan, weights: SiteWeights) -> SiteWeights:
        """The matrices as they are, and the last bias."""
        return replace(bare(weights), down_bias=plan.tensors["bias"].to(weights.down.device))

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """All."""
        return dict.fromkeys(matrices_of(plan), 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Of :meth:`weights`."""
        left = self.weights(plan, weights)
        return matrices(left) | biases(left)

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The FFN without biases but the last."""
        return dense(x, constants, str(plan.activation))


class Lost(Operands):
    """The mean of what the biases in front of the activation add to what each neuron gives, [h], float64."""

    merged: ClassVar[Mapping[str, Merge]] = {"_sum": "sum", "_tokens": "sum"}

    def __init__(self, site: ObservedSite) -> None:
        super().__init__(site)
        self._bare = Neurons.from_site(replace(site, weights=bare(site.weights)))
        self._sum, self._tokens = torch.zeros(len(site.weights.up), dtype=torch.float64, device="cpu"), 0

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """Adds the difference that they make."""
        self._sum += (hidden - self._bare.evaluate(x)[1]).sum(0, dtype=torch.float64)
        self._tokens += len(x)

    def bias(self, weights: SiteWeights) -> Tensor:
        """The last bias that makes up for it, [d_out], in the dtype of the weights."""
        bias = weights.down.double().cpu() @ (self._sum / max(1, self._tokens))
        if weights.down_bias is not None:
            bias = bias + weights.down_bias.double().cpu()
        return bias.to(weights.down.dtype)


def bare(weights: SiteWeights) -> SiteWeights:
    """The weights without biases in front of the activation."""
    return replace(weights, up_bias=None, gate_bias=None)
