"""Weight-only quantisation of all matrices by rounding to nearest.

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

from tardis_fx.graph.feed_forward import BIASES, biases, feed_forward, matrices
from tardis_fx.passes.layout import codes, setting
from tardis_fx.passes.static import Choice, StaticRewrite, bias_bytes, measured
from tardis_fx.quantisation import Quantised, quantise
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.packing import GROUP_SIZES, row_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.observation.run import Fit
    from tardis_fx.passes.layout import Layout
    from tardis_fx.plan import SitePlan
    from tardis_fx.statistics.operands import Grams

#: Bits a weight and columns of a group that are tried, by rising bytes.
WIDTHS = tuple((bits, group_size) for bits in (2, 3, 4, 8) for group_size in (128, 64))


class Rtn(StaticRewrite):
    """The rules of the module's docstring."""

    name: ClassVar[str] = "rtn"
    #: What is measured for the rounding: nothing, to round to nearest.
    operands: ClassVar[type[Grams] | None] = None

    def floor(self, weights: SiteWeights) -> int:
        """The matrices in the fewest bits."""
        return _bytes(weights, *WIDTHS[0])

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Quantises every site."""
        found, grams = [], {} if self.operands is None else (yield measured(self.operands, sites))
        for site in sites:
            weights, own = site.weights, grams.get(site.fingerprint)
            bits, group_size = [w for w in WIDTHS if _bytes(weights, *w) <= config.budget * weights.bytes][-1]
            tensors: dict[str, Tensor] = {}
            for name, weight in matrices(weights).items():
                gram = None if own is None else own.of(name)
                tensors |= _tensors(name, quantise(weight.float().cpu(), gram, bits, group_size))
            shape = {"d": weights.up.shape[1], "hidden": len(weights.up)}
            settings = {"bits": bits, "group_size": group_size, **shape}
            found.append(Choice(_bytes(weights, bits, group_size), tensors, settings))
        return found

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Codes of every matrix."""
        hidden, d = weights.up.shape
        setting(plan, "hidden", (hidden,))
        setting(plan, "d", (d,))
        bits, group_size = setting(plan, "bits", range(1, 9)), setting(plan, "group_size", GROUP_SIZES)
        found: Layout = {}
        for name, weight in matrices(weights).items():
            found |= codes(f"{name}_", (len(weight),), weight.shape[1], bits, group_size)
        return found

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Codes, scales and zero points of the matrices, and the biases."""
        return {name: tensor.to(weights.up.device) for name, tensor in plan.tensors.items()} | biases(weights)

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The FFN as it was, its matrices made from codes."""
        bits, dtype = plan.settings["bits"], getattr(torch, plan.dtype.removeprefix("torch."))

        def project(x: Tensor, name: str) -> Tensor:
            parts = (constants[f"{name}_{part}"] for part in _PARTS)
            columns = plan.settings["hidden" if name == "down" else "d"]
            weight: Tensor = torch.ops.tardis.dequantise(*parts, bits, columns, dtype)
            return F.linear(x, weight, constants.get(BIASES[name]))

        return feed_forward(x, project, str(plan.activation), gated=plan.kind == "gated")


_PARTS = ("codes", "scale", "zero")


def _tensors(name: str, quantised: Quantised) -> dict[str, Tensor]:
    return {f"{name}_{part}": getattr(quantised, part) for part in _PARTS}


def _bytes(weights: SiteWeights, bits: int, group_size: int) -> int:
    codes = sum(len(w) * row_bytes(w.shape[1], bits, group_size) for w in matrices(weights).values())
    return codes + bias_bytes(weights)
