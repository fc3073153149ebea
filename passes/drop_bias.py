"""Drops the biases before the activation; ``down_bias`` absorbs their mean effect on the calibration tokens.

The rewritten site is an FFN whose only bias is the last one, and other rewrites can be fitted to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit
from tardis_fx.observation.site import Merge, ObservedSite
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import Expected, Layout, Tensors
from tardis_fx.passes.static import Choice, StaticRewrite, bias_bytes, measured
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.operands import Operands


class DropBias(StaticRewrite):
    """Drops the biases before the activation."""

    name: ClassVar[str] = "drop_bias"
    leaves_matrices = True
    leaves_ffn = True

    def refuse(self, site: Site) -> str | None:
        """Refuses sites without a bias before the activation."""
        if all(projection is None or projection.bias is None for projection in (site.up, site.gate)):
            return "it has no bias in front of its activation"
        return super().refuse(site)

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of the matrices and of the last bias."""
        return weights.bytes - bias_bytes(weights) + len(weights.down) * weights.down.element_size()

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Measures the mean effect of the biases in one run."""
        effects = yield measured(BiasEffect, sites)
        return [Choice(self.floor(s.weights), {"bias": effects[s.fingerprint].bias(s.weights)}) for s in sites]

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The last bias, [d_out]."""
        return {"bias": Expected(weights.down.dtype, (len(weights.down),))}

    def weights(self, plan: SitePlan, weights: SiteWeights) -> SiteWeights:
        """The original matrices and the new last bias."""
        return replace(bare(weights), down_bias=plan.tensors["bias"].to(weights.down.device))

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """All matrices, read whole."""
        return dict.fromkeys(matrices_of(plan), 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Matrices and bias of :meth:`weights`."""
        changed = self.weights(plan, weights)
        return matrices(changed) | biases(changed)

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Applies the FFN with only the last bias."""
        return dense(x, constants, str(plan.activation))


class BiasEffect(Operands):
    """Observer of the mean effect of the biases before the activation on each response."""

    merged: ClassVar[Mapping[str, Merge]] = {"_sum": "sum", "_tokens": "sum"}

    def __init__(self, site: ObservedSite) -> None:
        super().__init__(site)
        self._bare = Neurons.from_site(replace(site, weights=bare(site.weights)))
        self._sum, self._tokens = torch.zeros(len(site.weights.up), dtype=torch.float64, device="cpu"), 0

    def add(self, x: Float32[Tensor, "tokens d"], hidden: Float32[Tensor, "tokens h"]) -> None:
        """Adds the effect of the biases on the responses."""
        self._sum += (hidden - self._bare.evaluate(x)[1]).sum(0, dtype=torch.float64)
        self._tokens += len(x)

    def bias(self, weights: SiteWeights) -> Float[Tensor, " d_out"]:
        """The last bias that compensates for the effect, in the dtype of the weights."""
        bias = weights.down.double().cpu() @ (self._sum / max(1, self._tokens))
        if weights.down_bias is not None:
            bias = bias + weights.down_bias.double().cpu()
        return bias.to(weights.down.dtype)


def bare(weights: SiteWeights) -> SiteWeights:
    """The weights without biases before the activation."""
    return replace(weights, up_bias=None, gate_bias=None)
