"""Mean and covariance of a site's inputs, from sums: memory does not grow with the text and shards can be added.

Products within a batch are float32, and sums over batches float64, so that rounded results do not depend on the order
of batches or on the number of processes.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tardis_fx.observation.site import Merge

#: Columns of a Gram matrix that are computed together, from the diagonal on down.
BLOCK = 512
#: Share of a mean square that may be rounding error in a difference of sums.
ROUNDING = 1e-12


class Moments:
    """Number, sum and Gram matrix of a site's inputs.

    Memory: d² / 2 float64, and d² while the Gram matrix is made.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"tokens": "sum", "total": "sum", "_products": "sum"}

    def __init__(self, d: int) -> None:
        self.tokens = 0.0
        self.total = torch.zeros(d, dtype=torch.float64, device="cpu")
        # Of the Gram matrix, BLOCK columns after BLOCK columns, each from the diagonal block on down.
        self._products = torch.zeros(sum(map(math.prod, _shapes(d))), dtype=torch.float64, device="cpu")

    def update(self, x: Float[Tensor, "tokens d"], weight: Float[Tensor, "tokens 1"] | None = None) -> None:
        """Adds tokens, each as often as its weight says; None is 1."""
        weighted = x if weight is None else weight * x
        self.tokens += len(x) if weight is None else float(weight.sum(dtype=torch.float64))
        self.total += weighted.sum(0, dtype=torch.float64)
        x = precise(x)
        weighted = x if weight is None else weight * x
        for block in self._blocks:
            start = x.shape[1] - len(block)
            block += x[:, start:].T @ weighted[:, start : start + BLOCK]

    @property
    def gram(self) -> Float64[Tensor, "d d"]:
        """Sum of x xᵀ, each as often as its weight says."""
        gram = torch.empty(len(self.total), len(self.total), dtype=torch.float64, device="cpu")
        for block in self._blocks:
            start = len(gram) - len(block)
            stop = start + block.shape[1]
            gram[stop:, start:stop] = block[BLOCK:]
            gram[start:stop, stop:] = block[BLOCK:].T
            lower = block[:BLOCK].tril()  # the upper triangle need not be its mirror image to the last bit
            gram[start:stop, start:stop] = lower + lower.tril(-1).T
        return gram

    @property
    def mean(self) -> Float64[Tensor, " d"]:
        """Mean input."""
        return self.total / self.tokens

    @property
    def covariance(self) -> Float64[Tensor, "d d"]:
        """Covariance of the inputs."""
        return self.gram / self.tokens - torch.outer(self.mean, self.mean)

    @property
    def noise(self) -> Float64[Tensor, " d"]:
        """Possible rounding error of each variance; smaller variances carry no information."""
        return ROUNDING * torch.cat([block.diagonal() for block in self._blocks]) / self.tokens

    @property
    def _blocks(self) -> list[Float64[Tensor, "_ _"]]:
        shapes = _shapes(len(self.total))
        parts = self._products.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _shapes(d: int) -> list[tuple[int, int]]:
    return [(d - start, min(BLOCK, d - start)) for start in range(0, d, BLOCK)]


def precise(x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d"]:
    """Tokens in float64 if sums of float32 products would lose the variance of a column, or overflow.

    A float32 product has a relative rounding error of 2^-24. If the mean of a column is more than a hundred times its
    standard deviation, that exceeds a thousandth of the variance. This includes constant columns.
    """
    if not len(x):
        return x
    square, mean_square = x.mean(0).square(), x.square().mean(0)
    lost = (square > 1e4 * (mean_square - square)).any() or mean_square.sum() * len(x) > torch.finfo(torch.float32).max
    return x.double() if lost else x
