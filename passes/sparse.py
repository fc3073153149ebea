"""What pruning rewrites have in common: which weights are kept, what they cost, how they run.

1. Unstructured: of each matrix the share of its weights that the budget leaves, the same share for all. Only the kept
   values are counted as touched, as if the sparse format were free.
2. 2:4: of each four neighbours in a row two are kept; their values are counted, and 2 bits of position for each.
3. A pruned matrix stays a dense one with zeros in it: a quality baseline, no speed-up, and no byte of storage saved.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tardis_fx.graph.feed_forward import biases, matrices
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import like
from tardis_fx.passes.matrix_forms import Dense, Masked
from tardis_fx.passes.represented import Represented
from tardis_fx.passes.static import bias_bytes
from tardis_fx.statistics.operands import ByMatrix, Sizes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.passes.layout import Layout
    from tardis_fx.passes.matrix_forms import Form
    from tardis_fx.plan import SitePlan


class Sparse(Represented):
    """A rewrite that sets weights to zero; see the module's docstring."""

    leaves_matrices = True
    #: Whether two of four are kept; else the budget says how many.
    two_of_four: ClassVar[bool] = False

    @abstractmethod
    def pruned(self, weight: Tensor, operand: Tensor, share: float) -> Form:
        """The form of a matrix.

        Args:
            weight: [rows, columns].
            operand: what :attr:`operands` measured of that which the matrix multiplies.
            share: of the weights that is kept.
        """

    def refuse(self, site: Site) -> str | None:
        """2:4 needs rows that are made of fours."""
        if self.two_of_four and any(projection.sizes[0] % 4 for projection in (site.up, site.down)):
            return "2:4 sparsity needs input and hidden sizes that are multiples of 4"
        return super().refuse(site)

    def floor(self, weights: SiteWeights) -> int:
        """Two of four, or such a share that the shorter rows keep one weight."""
        if self.two_of_four:
            return self.bytes(weights, {"share": 0.5})
        own = bias_bytes(weights)
        return math.ceil((weights.bytes - own) / min(weights.up.shape)) + own

    def settings(self, weights: SiteWeights, budget: float) -> dict[str, Any]:
        """Share of the weights that is kept."""
        own = bias_bytes(weights)
        return {"share": 0.5 if self.two_of_four else (budget * weights.bytes - own) / (weights.bytes - own)}

    def count(self, rows: int, columns: int, share: float) -> int:
        """Weights kept of a matrix, or of so many rows of it."""
        return math.floor(rows * columns * share + 1e-6)

    def bytes(self, weights: SiteWeights, settings: Mapping[str, Any]) -> int:
        """The kept weights, and of two in four their positions."""
        kept = sum(self.count(len(w), w.shape[1], settings["share"]) for w in matrices(weights).values())
        positions = kept // 4 if self.two_of_four else 0
        return kept * weights.up.element_size() + positions + bias_bytes(weights)

    def fitted(self, index: int, weight: Tensor, operand: Any, settings: Mapping[str, Any]) -> Form:
        """The matrix, pruned."""
        return self.pruned(weight, operand, settings["share"])

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The matrices, pruned."""
        _check_share(plan)
        return like(matrices(weights))

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """All; only the kept values are counted."""
        return dict.fromkeys(matrices_of(plan), plan.settings["share"])

    def opened(self, name: str, constants: Mapping[str, Tensor], plan: SitePlan) -> Dense:
        """The matrix with zeros in it."""
        return Dense.from_tensors(constants, name)


class Scored(Sparse):
    """Keeps the weights of the highest scores and leaves them as they are: the plan holds one bit a weight."""

    #: Whether every row keeps as many; else only the matrix as a whole counts.
    by_row: ClassVar[bool] = False
    operands: ClassVar[type[ByMatrix] | None] = Sizes

    @abstractmethod
    def score(self, weight: Tensor, norms: Tensor) -> Tensor:
        """How much a weight matters.

        Args:
            weight: [rows, columns], float32.
            norms: [columns], of what the columns are multiplied with, over the calibration tokens.
        """

    def pruned(self, weight: Tensor, operand: Tensor, share: float) -> Masked:
        """The kept weights."""
        score = self.score(weight.float().cpu().contiguous(), operand.float())
        count = self.count(len(score), score.shape[1], share)
        return Masked.from_matrix(
            weight, two_of_four(score) if self.two_of_four else highest(score, count, self.by_row)
        )

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """A bit for every weight."""
        _check_share(plan)
        found: Layout = {}
        for name, weight in matrices(weights).items():
            found |= Masked.layout(name, weight.shape)
        return found

    def count(self, rows: int, columns: int, share: float) -> int:
        """As many a row where rows count by themselves."""
        return rows * super().count(1, columns, share) if self.by_row else super().count(rows, columns, share)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The matrices with zeros in them, and the biases."""
        own = matrices(weights).items()
        return {name: Masked.from_tensors(plan.tensors, name, w).weight for name, w in own} | biases(weights)


def _check_share(plan: SitePlan) -> None:
    share = plan.settings["share"]
    if not (isinstance(share, (int, float)) and 0 <= share <= 1):
        raise ValueError(f"setting share must lie in [0, 1], not {share!r:.80}")


def highest(score: Tensor, count: int, by_row: bool) -> Tensor:
    """Where the ``count`` highest scores are, in every row as many if ``by_row``: [rows, columns], bool."""
    rows = score if by_row else score.reshape(1, -1)
    kept = torch.zeros_like(rows, dtype=torch.bool)
    return kept.scatter_(1, rows.topk(count // len(rows), 1).indices, True).view_as(score)


def two_of_four(score: Tensor) -> Tensor:
    """Where the two highest scores of each four neighbours of a row are: [rows, columns], bool."""
    fours = score.reshape(len(score), -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool)
    return kept.scatter_(2, fours.topk(2, 2).indices, True).view_as(score)
