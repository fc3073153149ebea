"""Replaces all matrices by products of two thin ones that minimise the output error on the calibration tokens.

1. With ``L Lᵀ`` the Gram matrix of W's operand, the best rank r in ``‖X Wᵀ - X (A B)ᵀ‖`` is the truncated SVD of
   ``W L = U S Vᵀ``: ``A = U_r S_r``, ``B = V_rᵀ L⁻¹`` (truncation-aware whitening, SVD-LLM, arXiv 2403.07378).
2. All matrices get the same share of their full rank, the largest that the budget allows.
3. A budget of all bytes keeps the matrices unchanged, because factors of full rank would be larger.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from tardis_fx.graph.feed_forward import matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import Layout
from tardis_fx.passes.matrix_forms import Dense, Factored, Form
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
        return _bytes(weights, [1] * len(matrices(weights)))

    def settings(self, weights: SiteWeights, budget: float) -> dict[str, Any]:
        """The rank of every matrix, or None if they stay unchanged."""
        return {"ranks": None if budget == 1 else _ranks(weights, budget)}

    def bytes(self, weights: SiteWeights, settings: Mapping[str, Any]) -> int:
        """Bytes of the factors."""
        return weights.bytes if settings["ranks"] is None else _bytes(weights, settings["ranks"])

    def fitted(self, index: int, weight: Tensor, operand: Any, settings: Mapping[str, Any]) -> Form | None:
        """Factors a matrix, or returns None if it stays unchanged."""
        ranks = settings["ranks"]
        return None if ranks is None else Factored.from_matrix(weight, ranks[index], operand)

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The factors with the ranks in the settings, or no tensors."""
        ranks, own = plan.settings["ranks"], matrices(weights)
        if ranks is None:
            return {}
        found: Layout = {}
        for (name, weight), rank in zip(own.items(), ranks, strict=True):
            if type(rank) is not int or not 1 <= rank <= min(weight.shape):
                raise ValueError(f"the rank of {name} must be from 1 to {min(weight.shape)}, not {rank!r:.80}")
            found |= Factored.layout(name, weight.shape, rank, weight.dtype)
        return found

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """The factors, or the matrices."""
        return dict.fromkeys(plan.tensors or matrices_of(plan), 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Factors ``up_a`` [h, r1], ``up_b`` [r1, d], ``down_a`` [d_out, r2], ..., or the matrices."""
        found = super().constants(plan, weights)
        return found if plan.settings["ranks"] else found | matrices(weights)

    def opened(self, name: str, constants: Mapping[str, Tensor], plan: SitePlan) -> Form:
        """The factored or unchanged matrix."""
        return (Dense if plan.settings["ranks"] is None else Factored).from_tensors(constants, name)


def _ranks(weights: SiteWeights, budget: float) -> list[int]:
    """The largest ranks within a budget, the same share of full rank for all, in the order of the matrices."""
    full = [min(w.shape) for w in matrices(weights).values()]
    for step in range(max(full), 0, -1):
        ranks = [max(1, f * step // max(full)) for f in full]
        if _bytes(weights, ranks) <= budget * weights.bytes:
            break
    return ranks


def _bytes(weights: SiteWeights, ranks: Sequence[int]) -> int:
    numbers = sum(rank * sum(w.shape) for rank, w in zip(ranks, matrices(weights).values(), strict=True))
    return numbers * weights.up.element_size() + bias_bytes(weights)
