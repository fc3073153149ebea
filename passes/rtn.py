"""Weight-only quantisation of all matrices by rounding to nearest.

1. Codes are asymmetric in groups of 64 or 128 columns; each group's range is clipped to minimise its squared error.
2. The budget selects the widest of 2, 3, 4 and 8 bits that fits, and groups of 64 if they also fit, including scales
   and zero points.
3. ``forward`` makes dense matrices of the codes at every call: a quality baseline, no speed-up on CPU. torchao's
   weight-only quantisation also rounds to nearest, and has fast kernels for 4 and 8 bits.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from tardis_fx.graph.feed_forward import matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.layout import Layout, Tensors, setting
from tardis_fx.passes.matrix_forms import Coded, Weight
from tardis_fx.passes.represented import Represented
from tardis_fx.passes.static import bias_bytes
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.packing import GROUP_SIZES, row_bytes

#: Candidate settings, by rising bytes.
WIDTHS = tuple({"bits": bits, "group_size": group_size} for bits in (2, 3, 4, 8) for group_size in (128, 64))


class Rtn(Represented):
    """Quantises all matrices by rounding to nearest."""

    name: ClassVar[str] = "rtn"

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of the matrices with the fewest bits."""
        return self.bytes(weights, WIDTHS[0])

    def settings(self, weights: SiteWeights, budget: float) -> dict[str, Any]:
        """Settings of the widest codes that fit the budget."""
        widest = [widths for widths in WIDTHS if self.bytes(weights, widths) <= budget * weights.bytes][-1]
        return {**widest, "d": weights.up.shape[1], "hidden": len(weights.up)}

    def bytes(self, weights: SiteWeights, settings: Mapping[str, Any]) -> int:
        """Bytes of codes, scales, zero points and biases."""
        bits, group_size = settings["bits"], settings["group_size"]
        codes = sum(len(w) * row_bytes(w.shape[1], bits, group_size) for w in matrices(weights).values())
        return codes + bias_bytes(weights)

    def fitted(self, index: int, weight: Weight, operand: Any, settings: Mapping[str, Any]) -> Coded:
        """Quantises a matrix, by GPTQ if the operand's Gram matrix is given."""
        return Coded.from_matrix(weight.cpu(), operand, settings["bits"], settings["group_size"])

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Codes, scales and zero points of every matrix."""
        hidden, d = weights.up.shape
        setting(plan, "hidden", (hidden,))
        setting(plan, "d", (d,))
        bits, group_size = setting(plan, "bits", range(1, 9)), setting(plan, "group_size", GROUP_SIZES)
        layout: Layout = {}
        for name, weight in matrices(weights).items():
            layout |= Coded.layout(name, weight.shape, bits, group_size)
        return layout

    def opened(self, name: str, constants: Tensors, plan: SitePlan) -> Coded:
        """Reads the codes of a matrix."""
        columns, dtype = plan.settings["hidden" if name == "down" else "d"], plan.dtype.removeprefix("torch.")
        return Coded.from_tensors(constants, name, plan.settings["bits"], columns, getattr(torch, dtype))
