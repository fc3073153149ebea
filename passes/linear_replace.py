"""Replaces whole FFNs by their best affine map if it fits well (arXiv 2606.19379; ReplaceMe, arXiv 2505.02819).

1. The map is the ridge regression of the FFN's output on its input, in closed form from sums over the tokens.
2. The sites with the highest R² on held-back tokens are replaced first, until the model's bytes are within the budget.
   The budget takes the place of a threshold on R².
"""

from typing import ClassVar

from torch import Tensor

from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.affine import AffineRewrite, folded
from tardis_fx.passes.whole import WholeSites
from tardis_fx.statistics.regression import Residual


class LinearReplace(AffineRewrite, WholeSites):
    """Replaces whole FFNs by their best affine map."""

    name: ClassVar[str] = "linear_replace"

    def replaced(self, output: Residual, weights: SiteWeights) -> tuple[float, str, dict[str, Tensor]]:
        """The loss is the variance that the map does not explain."""
        affine = output.solve()
        explained = output.explained(affine.weight, affine.bias)
        return 1 - explained, f"R² of its best affine map {explained:.3f}", folded(affine, weights)
