"""SparseGPT (arXiv 2301.00774): prunes weights column by column, and later columns compensate.

Quality baseline, no speed-up. With U the upper Cholesky factor of the inverse Gram matrix of a matrix's operands:

1. In each block of 128 columns the weights with the smallest ``(W[i, j] / U[j, j])²`` over all rows are pruned
   (section 3.3, adaptive mask selection); ``sparsegpt_2_4`` chooses in each four columns when it reaches them.
2. Column by column, the pruning error is distributed over the following columns in the proportions of ``U[j]``
   (algorithm 1).
"""

from typing import ClassVar

import torch

from tardis_fx.passes.matrix_forms import Dense, Gram, Weight
from tardis_fx.passes.sparse import Sparse, highest, two_of_four
from tardis_fx.quantisation import inverse_factor
from tardis_fx.statistics.operands import ByMatrix, Grams

#: Columns whose mask is chosen together.
BLOCK = 128


class SparseGPT(Sparse):
    """Prunes column by column with compensation."""

    name: ClassVar[str] = "sparsegpt"
    operands: ClassVar[type[ByMatrix] | None] = Grams

    def pruned(self, weight: Weight, operand: Gram, share: float) -> Dense:
        """Prunes a matrix by the Gram matrix of its operand; the result is in the model's dtype."""
        w, upper = weight.float().cpu().clone(), inverse_factor(operand).float()
        rows, columns = w.shape
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            block, errors = w[:, start:stop], torch.zeros(rows, stop - start, dtype=w.dtype, device=w.device)
            diagonal = upper.diagonal()[start:stop]
            kept = torch.zeros_like(block, dtype=torch.bool)
            if not self.two_of_four:
                count = self.count(rows, stop, share) - self.count(rows, start, share)
                kept = highest((block / diagonal).square(), count, by_row=False)
            for i in range(stop - start):
                if self.two_of_four and i % 4 == 0:
                    kept[:, i : i + 4] = two_of_four((block[:, i : i + 4] / diagonal[i : i + 4]).square())
                errors[:, i] = torch.where(kept[:, i], 0, block[:, i]) / diagonal[i]
                block[:, i:] -= errors[:, i : i + 1] * upper[start + i, start + i : stop]
            block.masked_fill_(~kept, 0)
            w[:, stop:] -= errors @ upper[start:stop, stop:]
        return Dense(w.to(weight.dtype))


class SparseGPT24(SparseGPT):
    """SparseGPT pruning that keeps two of each four neighbours."""

    name: ClassVar[str] = "sparsegpt_2_4"
    two_of_four: ClassVar[bool] = True
