"""Mean and covariance of a site's inputs: sums, so that memory does not grow with the text and shards can be added.

The products of a batch are float32, their sums over batches float64: in whatever order batches are added, and by how
many processes, what is rounded from the sums comes out the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tardis_fx.observation.merging import Merge

#: Of a mean square, the share that may be rounding in a difference of sums.
ROUNDING = 1e-12


class Moments:
    """Number, sum and Gram matrix of a site's inputs.

    Memory: d² float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"tokens": "sum", "total": "sum", "gram": "sum"}

    def __init__(self, d: int) -> None:
        self.tokens = 0
        self.total = torch.zeros(d, dtype=torch.float64, device="cpu")
        self.gram = torch.zeros(d, d, dtype=torch.float64, device="cpu")

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        self.tokens += len(x)
        self.total += x.sum(0, dtype=torch.float64)
        x = precise(x)
        self.gram += x.T @ x

    @property
    def mean(self) -> Tensor:
        """Mean input, [d], float64."""
        return self.total / self.tokens

    @property
    def covariance(self) -> Tensor:
        """Covariance of the inputs, [d, d], float64."""
        return self.gram / self.tokens - torch.outer(self.mean, self.mean)

    @property
    def noise(self) -> Tensor:
        """What of each variance may be rounding, [d], float64: inputs that hardly vary tell nothing below it."""
        return ROUNDING * self.gram.diagonal() / self.tokens


def precise(x: Tensor) -> Tensor:
    """Tokens, [tokens, d], in float64 where sums of float32 products would lose the variance of a column, or overflow.

    A product of float32 numbers is rounded to 2^-24 of itself. Where the mean of a column is more than a hundred times
    its standard deviation, that is more than a thousandth of its variance. Constant columns are such, too.
    """
    if not len(x):
        return x
    variance, mean = torch.var_mean(x.double(), 0, correction=0)
    square = mean.square()
    lost = (square > 1e4 * variance).any() or float((square + variance).sum()) * len(x) > torch.finfo(torch.float32).max
    return x.double() if lost else x
