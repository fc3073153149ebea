"""Weight-only quantisation of both matrices by rounding to nearest.

1. Asymmetric codes in groups of 64 or 128 columns, each group's range clipped to where its squared error is least.
2. The budget picks the widest of 2, 3, 4 and 8 bits that fits, and groups of 64 where these fit, too; scales and zero
   points are counted.
3. ``forward`` makes dense matrices of the codes at every call: a quality baseline, no speed-up on CPU. Rounding to
   nearest is what torchao's weight-only quantisation does, whose kernels run 4 and 8 bits at speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812

from tardis_fx.calibration.predictor import Quantised, quantise
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.passes.static import Choice, StaticRewrite, bias_bytes, biases
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.packing import GROUP_SIZES, row_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.calibration.observe import Observation, ObservedSite
    from tardis_fx.config import Config
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.plan import SitePlan

#: Bits a weight and columns of a group that are tried, by rising bytes.
WIDTHS = tuple((bits, group_size) for bits in (2, 3, 4, 8) for group_size in sorted(GROUP_SIZES, reverse=True))


class Rtn(StaticRewrite):
    """The rules of the module's docstring."""

    name: ClassVar[str] = "rtn"

    def floor(self, weights: SiteWeights) -> int:
        """Both matrices in the fewest bits."""
        return _bytes(weights, *WIDTHS[0])

    def choose(self, observation: Observation, sites: Sequence[ObservedSite], config: Config) -> list[Choice]:
        """Quantises every site."""
        found = []
        for site, grams in zip(sites, self.grams(observation, sites, config), strict=True):
            weights = site.weights
            bits, group_size = [w for w in WIDTHS if _bytes(weights, *w) <= config.budget * weights.bytes][-1]
            tensors: dict[str, Tensor] = {}
            for name, weight, gram in (("w1", weights.w1, grams[0]), ("w2", weights.w2, grams[1])):
                tensors |= _tensors(name, quantise(weight.float().cpu(), gram, bits, group_size))
            shape = {"d": weights.w1.shape[1], "hidden": len(weights.w1)}
            settings = {"bits": bits, "group_size": group_size, **shape}
            found.append(Choice(_bytes(weights, bits, group_size), tensors, settings))
        return found

    def grams(
        self, observation: Observation, sites: Sequence[ObservedSite], config: Config
    ) -> list[tuple[Tensor | None, Tensor | None]]:
        """Of each site, the Gram matrices that W1 and W2 are quantised by: none, to round to nearest."""
        return [(None, None) for _ in sites]

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Codes, scales and zero points of both matrices, and the biases."""
        return {name: tensor.to(weights.w1.device) for name, tensor in plan.tensors.items()} | biases(weights)

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The FFN as it was, its matrices made from codes."""
        bits, dtype = plan.settings["bits"], getattr(torch, plan.dtype.removeprefix("torch."))

        def weight(name: str, columns: int) -> Tensor:
            codes, scale, zero = (constants[f"{name}_{part}"] for part in _PARTS)
            found: Tensor = torch.ops.tardis.dequantise(codes, scale, zero, bits, columns, dtype)
            return found

        w1, w2 = weight("w1", plan.settings["d"]), weight("w2", plan.settings["hidden"])
        activated = ACTIVATIONS[str(plan.activation)].eager(F.linear(x, w1, constants.get("b1")))
        return F.linear(activated, w2, constants.get("b2"))


_PARTS = ("codes", "scale", "zero")


def _tensors(name: str, quantised: Quantised) -> dict[str, Tensor]:
    return {f"{name}_{part}": getattr(quantised, part) for part in _PARTS}


def _bytes(weights: SiteWeights, bits: int, group_size: int) -> int:
    (h, d), d_out = weights.w1.shape, len(weights.w2)
    return h * row_bytes(d, bits, group_size) + d_out * row_bytes(h, bits, group_size) + bias_bytes(weights)
