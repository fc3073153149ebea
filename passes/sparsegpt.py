"""SparseGPT (arXiv 2301.00774): weights are pruned one column after the other, the later ones making up for it.

Quality baseline, no speed-up. With U the upper Cholesky factor of the inverse Gram matrix of a matrix's operands:

1. In each block of 128 columns those weights go whose ``(W[i, j] / U[j, j])²`` is least, over all rows together
   (section 3.3, adaptive mask selection); ``sparsegpt_2_4`` chooses in each four columns when it comes to them.
2. Column by column, what is pruned is taken off the columns behind it in the proportions of ``U[j]`` (algorithm 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.calibration.operands import Grams
from tardis_fx.calibration.predictor import inverse_factor
from tardis_fx.passes.sparse import Sparse, highest, two_of_four
from tardis_fx.passes.static import biases, measured

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from tardis_fx.calibration.observe import Observation, ObservedSite
    from tardis_fx.config import Config
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.plan import SitePlan

#: Columns whose mask is chosen together.
BLOCK = 128


class SparseGPT(Sparse):
    """The rules of the module's docstring."""

    name: ClassVar[str] = "sparsegpt"

    def choose_tensors(
        self, observation: Observation, sites: Sequence[ObservedSite], config: Config
    ) -> list[dict[str, Tensor]]:
        """The pruned matrices, in the model's dtype."""
        grams = measured(observation, Grams, sites, config)
        found = []
        for site in sites:
            weights, gram = site.weights, grams[site.fingerprint]
            share = self.share(weights, config)
            w1 = self.pruned(weights.w1.float().cpu(), gram.up.gram, share)
            w2 = self.pruned(weights.w2.float().cpu(), gram.down.gram, share)
            found.append({"w1": w1.to(weights.w1.dtype), "w2": w2.to(weights.w2.dtype)})
        return found

    def pruned(self, weight: Tensor, gram: Tensor, share: float) -> Tensor:
        """A matrix with as many weights as a share of them allows.

        Args:
            weight: [rows, columns], float32.
            gram: [columns, columns] of what it multiplies.
            share: of the weights that is kept.
        """
        w, upper = weight.clone(), inverse_factor(gram).float()
        rows, columns = w.shape
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            block, errors = w[:, start:stop], torch.zeros(rows, stop - start)
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
        return w

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Both matrices, and the biases."""
        return {name: plan.tensors[name].to(weights.w1.device) for name in ("w1", "w2")} | biases(weights)


class SparseGPT24(SparseGPT):
    """Two of four."""

    name: ClassVar[str] = "sparsegpt_2_4"
    two_of_four: ClassVar[bool] = True
