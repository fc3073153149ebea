"""What calibration measures at a gated site: sums over gate ``g``, up projection ``u``, product ``p = act(g) u``.

A neuron's surrogate is the plane ``alpha g + beta u + gamma`` that is nearest to ``p``, by least squares. How far the
plane is from the product is known beforehand only roughly, from the estimates of ``g`` and ``u``: that distance is the
score, and tokens are binned by it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tardis_fx.observation.merging import Merge

#: Bins of a neuron's scores, each so many times as wide as the one before; the first and the last are open.
BINS = 40
GROWTH = 1.25
#: Upper edge of the first bin, as a share of the root mean square that the plane misses.
LEAST = 1 / 128

#: Ridge, as a share of the variance of a pre-activation.
RIDGE = 1e-4
#: A pre-activation whose variance is below this share of its mean square is taken for constant: sums are in float32.
CONSTANT = 1e-6

#: Gives pre-activations of gate and up projection and their product, [tokens, h] each, from [tokens, d].
Neurons = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class ProductSums:
    """Sums over the tokens of each bin, by neuron; all [bins, h], float64."""

    count: Tensor
    g: Tensor
    u: Tensor
    p: Tensor
    gg: Tensor
    gu: Tensor
    uu: Tensor
    gp: Tensor
    up: Tensor
    pp: Tensor

    def error(self, alpha: Tensor, beta: Tensor, gamma: Tensor) -> Tensor:
        """Sum of (p - alpha g - beta u - gamma)² of each bin, [bins, h], from planes, [h] each."""
        squares = self.pp + alpha**2 * self.gg + beta**2 * self.uu + gamma**2 * self.count
        planes = alpha * beta * self.gu + alpha * gamma * self.g + beta * gamma * self.u
        crossed = alpha * self.gp + beta * self.up + gamma * self.p
        return (squares + 2 * (planes - crossed)).clamp(min=0)

    def regress(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Least squares of p on g and u over the chosen bins, [bins, h] bool: alpha, beta and gamma, [h] each.

        A neuron without any chosen bin gets zeros.
        """
        count, g, u, p, gg, gu, uu, gp, up = (
            torch.where(chosen, s, 0).sum(0)
            for s in (self.count, self.g, self.u, self.p, self.gg, self.gu, self.uu, self.gp, self.up)
        )
        some = count.clamp(min=1)
        g, u, p = g / some, u / some, p / some
        var_g, var_u = (
            (1 + RIDGE) * (square / some - mean**2).clamp(min=0) + CONSTANT * square / some
            for square, mean in ((gg, g), (uu, u))
        )
        cov_gu, cov_gp, cov_up = gu / some - g * u, gp / some - g * p, up / some - u * p
        determinant = var_g * var_u - cov_gu**2
        inverse = torch.where(determinant > 0, 1 / determinant, 0)
        alpha, beta = (cov_gp * var_u - cov_up * cov_gu) * inverse, (cov_up * var_g - cov_gp * cov_gu) * inverse
        return alpha, beta, p - alpha * g - beta * u


class Products:
    """The sums over all tokens, in one bin."""

    merged: ClassVar[Mapping[str, Merge]] = {"_sums": "sum"}

    def __init__(self, h: int, neurons: Neurons) -> None:
        """Starts at zero.

        Args:
            h: neurons.
            neurons: the exact ones.
        """
        self._neurons = neurons
        self._sums = torch.zeros(10, 1, h, dtype=torch.float64, device="cpu")

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        terms = _terms(*(t.double() for t in self._neurons(x)))
        self._sums += torch.stack([t.sum(0, keepdim=True) for t in terms])

    @property
    def plane(self) -> Tensor:
        """The plane nearest to each neuron's product, alpha, beta and gamma: [h, 3], float32."""
        return torch.stack(self._fitted, 1).float()

    @property
    def missed(self) -> Tensor:
        """Root mean square of what the planes miss, [h], float32."""
        sums = ProductSums(*self._sums)
        return (sums.error(*self._fitted)[0] / sums.count[0].clamp(min=1)).sqrt().float()

    @property
    def _fitted(self) -> tuple[Tensor, Tensor, Tensor]:
        sums = ProductSums(*self._sums)
        return sums.regress(torch.ones_like(sums.count, dtype=torch.bool))


class ScoreHistogram:
    """The sums by bins of the score, every neuron's laid by what its plane misses.

    Memory: 10 bins h float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"_sums": "sum", "greatest": "greatest"}

    def __init__(self, missed: Tensor, exact: Neurons, estimated: Callable[[Tensor], Tensor]) -> None:
        """Lays the bins.

        Args:
            missed: [h], root mean square of what each neuron's plane misses.
            exact: the neurons.
            estimated: their scores as the guard will see them, [tokens, h], from [tokens, d].
        """
        self._exact, self._estimated = exact, estimated
        self._least = LEAST * missed.clamp(min=1e-12)
        self.greatest = torch.zeros_like(missed)
        self._sums = torch.zeros(10, BINS * len(missed), dtype=torch.float64, device="cpu")

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        scores, h = self._estimated(x), len(self._least)
        self.greatest = torch.maximum(self.greatest, scores.amax(0))
        steps = (scores / self._least).log_().div_(torch.tensor(GROWTH, dtype=torch.float32, device="cpu").log())
        index = (
            steps.floor_()
            .add_(1)
            .clamp_(0, BINS - 1)
            .long()
            .mul_(h)
            .add_(torch.arange(h, dtype=torch.int64, device="cpu"))
            .view(-1)
        )
        for total, value in zip(self._sums, _terms(*self._exact(x)), strict=True):
            total.scatter_add_(0, index, value.reshape(-1).double())

    @property
    def sums(self) -> ProductSums:
        """The sums so far."""
        return ProductSums(*self._sums.view(10, BINS, -1))

    @property
    def edges(self) -> Tensor:
        """Edges of the bins, [bins + 1, h], float32; the last is the greatest score seen, or beyond."""
        edges = self._least * GROWTH ** torch.arange(-1.0, BINS, dtype=torch.float32, device="cpu")[:, None]
        edges[0], edges[-1] = -torch.inf, torch.maximum(self.greatest, edges[-1])
        return edges


def _terms(g: Tensor, u: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    """What is summed, in the order of :class:`ProductSums`."""
    return torch.ones_like(p), g, u, p, g * g, g * u, u * u, g * p, u * p, p * p
