"""Base classes of pruning rewrites: the choice of kept weights, their bytes, and the forward pass.

1. Unstructured: all matrices keep the same share of their weights, set by the budget. Only the kept values count as
   touched, as if the sparse format were free.
2. 2:4: two of each four neighbours in a row are kept; their values count, and 2 bits of position for each.
3. A pruned matrix remains dense, with zeros: a quality baseline, with no speed-up and no storage saved.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tardis_fx.graph.feed_forward import biases, matrices
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import Layout, Tensors, like
from tardis_fx.passes.matrix_forms import Dense, Form, Masked, Weight
from tardis_fx.passes.represented import Represented
from tardis_fx.passes.static import bias_bytes
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.operands import ByMatrix, ColumnNorms


class Sparse(Represented):
    """Base class of rewrites that set weights to zero."""

    leaves_matrices = True
    #: Whether two of each four are kept; otherwise the budget determines the share.
    two_of_four: ClassVar[bool] = False

    @abstractmethod
    def pruned(self, weight: Weight, operand: Float[Tensor, "*columns"], share: float) -> Form:
        """Prunes a matrix by the statistic of its operand, :attr:`operands`, so that a share of the weights is kept."""

    def refuse(self, site: Site) -> str | None:
        """Refuses sites whose rows cannot be divided into fours, for 2:4 sparsity."""
        if self.two_of_four and any(projection.sizes[0] % 4 for projection in (site.up, site.down)):
            return "2:4 sparsity needs input and hidden sizes that are multiples of 4"
        return super().refuse(site)

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of two of four, or of a share with which the shorter rows keep one weight."""
        if self.two_of_four:
            return self.bytes(weights, {"share": 0.5})
        fixed = bias_bytes(weights)
        return math.ceil((weights.bytes - fixed) / min(weights.up.shape)) + fixed

    def settings(self, weights: SiteWeights, budget: float) -> dict[str, Any]:
        """Settings with the share of weights that is kept."""
        fixed = bias_bytes(weights)
        return {"share": 0.5 if self.two_of_four else (budget * weights.bytes - fixed) / (weights.bytes - fixed)}

    def count(self, rows: int, columns: int, share: float) -> int:
        """Number of weights kept in a matrix, or in ``rows`` of its rows."""
        return math.floor(rows * columns * share + 1e-6)

    def bytes(self, weights: SiteWeights, settings: Mapping[str, Any]) -> int:
        """Bytes of the kept weights and the biases, and of the positions for two of four."""
        kept = sum(self.count(len(w), w.shape[1], settings["share"]) for w in matrices(weights).values())
        positions = kept // 4 if self.two_of_four else 0
        return kept * weights.up.element_size() + positions + bias_bytes(weights)

    def fitted(self, index: int, weight: Weight, operand: Any, settings: Mapping[str, Any]) -> Form:
        """Prunes one matrix to the share in the settings."""
        return self.pruned(weight, operand, settings["share"])

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The pruned matrices."""
        share = plan.settings["share"]
        if not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise ValueError(f"setting share must lie in [0, 1], not {share!r:.80}")
        return like(matrices(weights))

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """All matrices, of which only the kept values count."""
        return dict.fromkeys(matrices_of(plan), plan.settings["share"])

    def opened(self, name: str, constants: Tensors, plan: SitePlan) -> Dense:
        """Reads the pruned matrix."""
        return Dense.from_tensors(constants, name)


class Scored(Sparse):
    """Base class of rewrites that keep the weights with the highest scores unchanged; plans hold one bit per weight."""

    #: Whether every row keeps the same number; otherwise scores are compared over the whole matrix.
    by_row: ClassVar[bool] = False
    operands: ClassVar[type[ByMatrix] | None] = ColumnNorms

    @abstractmethod
    def score(self, weight: Weight, norms: Float[Tensor, " columns"]) -> Weight:
        """Importance of each weight of a float32 matrix, given the norms of its operand's columns."""

    def pruned(self, weight: Weight, operand: Float[Tensor, " columns"], share: float) -> Masked:
        """Masks all but the weights with the highest scores."""
        score = self.score(weight.float().cpu().contiguous(), operand.float())
        count = self.count(len(score), score.shape[1], share)
        return Masked.from_matrix(
            weight, two_of_four(score) if self.two_of_four else highest(score, count, self.by_row)
        )

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Masks with one bit per weight."""
        dense = super().layout(plan, weights)
        return {name: mask for n, e in dense.items() for name, mask in Masked.layout(n, e.shape).items()}

    def count(self, rows: int, columns: int, share: float) -> int:
        """Number of weights kept; the same in every row if ``by_row``."""
        return rows * super().count(1, columns, share) if self.by_row else super().count(rows, columns, share)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The matrices with zeros in them, and the biases."""
        pruned = {n: Masked.from_tensors(plan.tensors, n, w).weight for n, w in matrices(weights).items()}
        return pruned | biases(weights)


def highest(score: Weight, count: int, by_row: bool) -> Bool[Tensor, "rows columns"]:
    """Mask of the ``count`` highest scores, equally many in every row if ``by_row``."""
    rows = score if by_row else score.reshape(1, -1)
    kept = torch.zeros_like(rows, dtype=torch.bool)
    return kept.scatter_(1, rows.topk(count // len(rows), 1).indices, True).view_as(score)


def two_of_four(score: Weight) -> Bool[Tensor, "rows columns"]:
    """Mask of the two highest scores of each four neighbours in a row."""
    fours = score.reshape(len(score), -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool)
    return kept.scatter_(2, fours.topk(2, 2).indices, True).view_as(score)
