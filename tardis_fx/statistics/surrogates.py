"""The affine surrogates of neurons: sums over tokens, and least squares on them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from tardis_fx.observation.site import Merge, ObservedSite, fitted_tokens
from tardis_fx.statistics.neurons import Neurons

#: A variance below this share of the mean square, or of 1, may be rounding: the pre-activation gets no slope.
CONSTANT = 1e-12
#: A pre-activation also gets no slope if earlier ones explain all but this share of its variance.
COLLINEAR = 1e-4


def products(
    z: Sequence[Float[Tensor, "tokens h"]], response: Float[Tensor, "tokens h"]
) -> Iterator[Float[Tensor, "tokens h"]]:
    """The terms of :class:`Sums` in order: products of any two of 1, the pre-activations and the response."""
    yield torch.ones_like(response)
    yield from (*z, response)
    yield from (left * right for left, right in combinations_with_replacement((*z, response), 2))


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over tokens that determine the affine surrogates of neurons and their errors.

    Attributes:
        table: in the order of :func:`products`.
        k: number of pre-activations of a neuron.
    """

    table: Float64[Tensor, "products *bins h"]
    k: int

    @classmethod
    def zeros(cls, k: int, *shape: int) -> "Sums":
        """Empty sums for k pre-activations and the given shape of bins and neurons."""
        return cls(torch.zeros((k + 2) * (k + 3) // 2, *shape, dtype=torch.float64, device="cpu"), k)

    @property
    def count(self) -> Float64[Tensor, "*bins h"]:
        """Tokens in each bin."""
        return self.table[0]

    @property
    def total(self) -> "Sums":
        """The sums over all bins."""
        return Sums(self.table.sum(1), self.k)

    def within(self, chosen: Bool[Tensor, "bins h"]) -> "Sums":
        """The sums over the chosen bins."""
        return Sums(torch.where(chosen, self.table, 0).sum(1), self.k)

    def error(self, surrogate: Float[Tensor, "h coefficients"]) -> Float64[Tensor, "*bins h"]:
        """Sum of the squared errors of surrogates (k slopes and an intercept) in each bin."""
        *slopes, intercept = surrogate.double().unbind(1)
        numbered = list(enumerate(slopes, 1))
        squares, crossed = self._sum(-1, -1), torch.zeros_like(self.count)
        for i, slope in numbered:
            squares = squares + slope**2 * self._sum(i, i)
            crossed = crossed + slope * intercept * self._sum(0, i)
        for (i, slope), (j, later) in combinations(numbered, 2):
            crossed = crossed + slope * later * self._sum(i, j)
        for i, slope in numbered:
            crossed = crossed - slope * self._sum(i, -1)
        squares = squares + intercept**2 * self.count
        return (squares + 2 * (crossed - intercept * self._sum(0, -1))).clamp(min=0)

    def regress(self) -> Float64[Tensor, "h coefficients"]:
        """Least-squares surrogates of the response, from sums without bins.

        The pre-activations are eliminated in order. One that is constant, or explained by earlier ones, gets the slope
        0. A neuron without tokens gets slopes and intercept 0.
        """
        some, k = torch.where(self.count > 0, self.count, 1), range(1, self.k + 1)  # counts may be weights
        means = [self._sum(0, i) / some for i in (*k, -1)]
        rows = [
            [self._sum(i, j) / some - means[i - 1] * means[j - 1 if j > 0 else -1] for j in (*k, -1)] for i in k
        ]  # covariances with each other, then with the response
        pivots = []
        for i, row in enumerate(rows):
            square = self._sum(i + 1, i + 1) / some
            variance = square - means[i] ** 2
            pivots.append((row[i] > CONSTANT * (1 + square)) & (row[i] > COLLINEAR * variance))
            for below in rows[i + 1 :]:
                factor = torch.where(pivots[i], below[i] / row[i].clamp(min=1e-30), 0)
                below[:] = [entry - factor * above for entry, above in zip(below, row, strict=True)]
        slopes: list[Tensor] = []
        for i in reversed(range(self.k)):
            explained = sum((rows[i][i + 1 + n] * slope for n, slope in enumerate(slopes)), torch.zeros_like(some))
            slopes.insert(0, torch.where(pivots[i], (rows[i][-1] - explained) / rows[i][i].clamp(min=1e-30), 0))
        fitted = sum((slope * mean for slope, mean in zip(slopes, means, strict=False)), torch.zeros_like(some))
        return torch.stack([*slopes, means[-1] - fitted], 1)

    def _sum(self, i: int, j: int) -> Float64[Tensor, "*bins h"]:
        """Sum of the products of terms i and j: term 0 is 1, then come the pre-activations; term -1 is the response."""
        size = self.k + 2
        i, j = sorted((i % size, j % size))
        return self.table[i * size - i * (i - 1) // 2 + j - i]


class SurrogateSums:
    """Observer of the sums that determine the neurons' best affine surrogates on the fitted tokens."""

    merged: ClassVar[Mapping[str, Merge]] = {"_table": "sum"}

    def __init__(self, site: ObservedSite) -> None:
        self._neurons = Neurons.from_site(site)
        self._table = Sums.zeros(len(self._neurons.projections), len(self._neurons)).table

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        z, response = self._neurons.evaluate(x[: fitted_tokens(len(x))])
        for total, product in zip(self._table, products([p.double() for p in z], response.double()), strict=True):
            total += product.sum(0)

    @property
    def sums(self) -> Sums:
        """The sums so far."""
        return Sums(self._table, len(self._neurons.projections))

    @property
    def output_error(self) -> Float64[Tensor, " h"]:
        """Squared error of each neuron's surrogate in the site's output, summed over the tokens."""
        return self.sums.error(self.sums.regress()) * self._neurons.down.double().square().sum(0)
