"""Replaces all matrices by products of two thin ones that minimise the output error on the calibration tokens.

1. With ``L Lᵀ`` the Gram matrix of W's operand, the best rank r in ``‖X Wᵀ - X (A B)ᵀ‖`` is the truncated SVD of
   ``W L = U S Vᵀ``: ``A = U_r S_r``, ``B = V_rᵀ L⁻¹`` (truncation-aware whitening, SVD-LLM, arXiv 2403.07378).
2. All matrices get the same share of their full rank, the largest that the budget allows.
3. A budget of all bytes keeps the matrices unchanged, because factors of full rank would be larger.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from tardis_fx.graph.feed_forward import matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import Layout, Tensors
from tardis_fx.passes.matrix_forms import Dense, Factored, Form, Weight
from tardis_fx.passes.represented import Represented
from tardis_fx.passes.static import bias_bytes
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.operands import ByMatrix, Grams


class LowRank(Represented):
    """Replaces all matrices by products of two thin ones."""

    name: ClassVar[str] = "low_rank"
    leaves_matrices = True
    operands: ClassVar[type[ByMatrix] | None] = Grams

    def floor(self, weights: SiteWeights) -> int:
        """Bytes with rank 1 for all matrices."""
        return self.bytes(weights, {"ranks": [1] * len(matrices(weights))})

    def settings(self, weights: SiteWeights, budget: float) -> dict[str, Any]:
        """The largest ranks, the same share of full rank for every matrix; None if they stay unchanged."""
        if budget == 1:
            return {"ranks": None}
        full = [min(w.shape) for w in matrices(weights).values()]
        for step in range(max(full), 0, -1):
            settings = {"ranks": [max(1, f * step // max(full)) for f in full]}
            if self.bytes(weights, settings) <= budget * weights.bytes:
                break
        return settings

    def bytes(self, weights: SiteWeights, settings: Mapping[str, Any]) -> int:
        """Bytes of the factors."""
        if settings["ranks"] is None:
            return weights.bytes
        numbers: int = sum(r * sum(w.shape) for r, w in zip(settings["ranks"], matrices(weights).values(), strict=True))
        return numbers * weights.up.element_size() + bias_bytes(weights)

    def fitted(self, index: int, weight: Weight, operand: Any, settings: Mapping[str, Any]) -> Form | None:
        """Factors a matrix, or returns None if it stays unchanged."""
        ranks = settings["ranks"]
        return None if ranks is None else Factored.from_matrix(weight, ranks[index], operand)

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The factors with the ranks in the settings, or no tensors."""
        ranks, layout = plan.settings["ranks"], Layout()
        if ranks is None:
            return layout
        for (name, weight), rank in zip(matrices(weights).items(), ranks, strict=True):
            if type(rank) is not int or not 1 <= rank <= min(weight.shape):
                raise ValueError(f"the rank of {name} must be from 1 to {min(weight.shape)}, not {rank!r:.80}")
            layout |= Factored.layout(name, weight.shape, rank, weight.dtype)
        return layout

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """The factors, or the matrices."""
        return dict.fromkeys(plan.tensors or matrices_of(plan), 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Factors ``up_a`` [h, r1], ``up_b`` [r1, d], ``down_a`` [d_out, r2], ..., or the matrices."""
        return super().constants(plan, weights) | ({} if plan.settings["ranks"] else matrices(weights))

    def opened(self, name: str, constants: Tensors, plan: SitePlan) -> Form:
        """The factored or unchanged matrix."""
        return (Dense if plan.settings["ranks"] is None else Factored).from_tensors(constants, name)
