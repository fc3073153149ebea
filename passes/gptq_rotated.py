"""GPTQ in rotated bases: the strongest weight-only quantisation of all matrices that this project compares with.

1. Random signs and Hadamard matrices rotate the site's inputs and its outputs, and the matrices with them (QuIP#, arXiv
   2402.04396; QuaRot, arXiv 2404.00456): weights then resemble Gaussian variables, and outliers of the inputs spread
   over many columns. In exact arithmetic, the FFN stays the same.
2. Codes index tables of levels for Gaussian variables (:mod:`tardis_fx.runtime.tables`), with one scale for each row of
   W1 and of a gate, and for each column of W2: for each neuron.
3. Weights are rounded by GPTQ (arXiv 2210.17323), most active columns first, by the Gram matrices of the rotated inputs
   and of the neurons' responses.
4. The budget selects the widest of 2, 3, 4 and 8 bits that fits. ``forward`` makes dense matrices of the codes at every
   call: a quality baseline, with no speed-up.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tardis_fx.graph.feed_forward import matrices
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.passes.layout import Expected, Layout, Tensors, check_settings, setting
from tardis_fx.passes.matrix_forms import CodedRows
from tardis_fx.passes.represented import Represented
from tardis_fx.passes.static import bias_bytes
from tardis_fx.plan import SitePlan
from tardis_fx.quantisation import Feedback
from tardis_fx.runtime.rotation import random_signs, rotate
from tardis_fx.runtime.tables import row_bytes
from tardis_fx.statistics.operands import ByMatrix, Grams

#: Candidate bits of all codes.
BITS = (2, 3, 4, 8)


class GptqRotated(Represented):
    """Quantises all matrices by GPTQ in rotated bases."""

    name: ClassVar[str] = "gptq_rotated"
    operands: ClassVar[type[ByMatrix] | None] = Grams

    def refuse(self, site: Site) -> str | None:
        """Refuses sites without an activation, and rows so short that codes, in blocks of 64, are no smaller."""
        columns = min(site.up.sizes[0], site.down.sizes[1])
        if row_bytes(columns, BITS[0]) >= 2 * columns and site.affine is None:
            return f"a row of {columns} weights in 16 bits is no smaller in codes"
        return super().refuse(site)

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of the matrices with the fewest bits."""
        return self.bytes(weights, {"bits": BITS[0]})

    def settings(self, weights: SiteWeights, budget: float) -> dict[str, Any]:
        """Settings of the widest codes that fit the budget."""
        widest = [bits for bits in BITS if self.bytes(weights, {"bits": bits}) <= budget * weights.bytes][-1]
        return {"bits": widest, "d": weights.up.shape[1], "d_out": len(weights.down)}

    def bytes(self, weights: SiteWeights, settings: Mapping[str, Any]) -> int:
        """Bytes of codes with their scales, signs and biases."""
        (hidden, d), d_out, bits = weights.up.shape, len(weights.down), settings["bits"]
        neuron = len(weights.projections) * row_bytes(d, bits) + row_bytes(d_out, bits)
        return hidden * neuron + d + d_out + bias_bytes(weights)

    def tensors(self, weights: SiteWeights, operands: Grams, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """The rotated matrices in codes, and the signs of both rotations."""
        signs, out_signs = random_signs(settings["d"], 0), random_signs(settings["d_out"], 1)
        gram = rotate(rotate(operands.for_matrix("up"), signs).T, signs)
        inputs, responses = Feedback.from_gram(gram), Feedback.from_gram(operands.for_matrix("down"))
        tensors = {"signs": signs, "out_signs": out_signs}
        for name, weight in matrices(weights).items():
            matrix, down = weight.float().cpu(), name == "down"
            rotated = rotate(matrix.T, out_signs).T if down else rotate(matrix, signs)
            feedback = responses if down else inputs
            tensors |= CodedRows.from_matrix(rotated, feedback, settings["bits"], transposed=down).tensors(name)
        return tensors

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Codes of every matrix, and the signs."""
        d, d_out = weights.up.shape[1], len(weights.down)
        check_settings(plan, "bits", "d", "d_out")
        setting(plan, "d", (d,))
        setting(plan, "d_out", (d_out,))
        bits = setting(plan, "bits", range(1, 9))
        layout: Layout = {"signs": Expected(torch.int8, (d,)), "out_signs": Expected(torch.int8, (d_out,))}
        for name, weight in matrices(weights).items():
            layout |= CodedRows.layout(name, weight.shape, bits, transposed=name == "down")
        return layout

    def opened(self, name: str, constants: Tensors, plan: SitePlan) -> CodedRows:
        """Reads the codes of a matrix."""
        down, dtype = name == "down", getattr(torch, plan.dtype.removeprefix("torch."))
        codes = plan.settings["d_out" if down else "d"]
        return CodedRows.from_tensors(constants, name, plan.settings["bits"], codes, down, dtype)

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Rotates the input, applies the FFN of rotated matrices, and rotates its output back."""
        inner = {name: tensor for name, tensor in constants.items() if name != "down_bias"}
        rotated = super().forward(torch.ops.tardis.rotate(x, constants["signs"], False), inner, plan)
        output: Tensor = torch.ops.tardis.rotate(rotated, constants["out_signs"], True)
        return output if "down_bias" not in constants else output + constants["down_bias"]
