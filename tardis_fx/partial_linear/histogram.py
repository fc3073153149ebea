"""What calibration measures at a site: sums, so that memory does not grow with the text and shards can be added.

The products of a batch are float32, their sums over batches float64: in whatever order batches are added, and by how
many processes, what is rounded from the sums comes out the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tardis_fx.graph.activations import Activation
    from tardis_fx.observation.merging import Merge
    from tardis_fx.quantisation import Quantised
    from tardis_fx.statistics.moments import Moments

#: Bins of a neuron's histogram, over ``SPREAD`` standard deviations on both sides of the mean; the outer two are open.
BINS = 96
SPREAD = 6.0


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens that fall into each bin of a neuron's estimate; all [bins, h], float64."""

    count: Tensor
    z: Tensor
    zz: Tensor
    a: Tensor
    az: Tensor
    aa: Tensor

    def error(self, slope: Tensor, intercept: Tensor) -> Tensor:
        """Sum of (a - slope z - intercept)² of each bin, [bins, h], from slopes and intercepts [h]."""
        squares = self.aa + slope**2 * self.zz + intercept**2 * self.count
        crossed = slope * intercept * self.z - slope * self.az - intercept * self.a
        return (squares + 2 * crossed).clamp(min=0)

    def regress(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Least squares of a on z over the chosen bins, [bins, h] bool: slope [h] and intercept [h]."""
        count, z, zz, a, az = (torch.where(chosen, s, 0).sum(0) for s in (self.count, self.z, self.zz, self.a, self.az))
        some = count.clamp(min=1)
        variance, covariance = zz / some - (z / some) ** 2, az / some - z * a / some**2
        slope = torch.where(variance > 1e-12 * (1 + zz / some), covariance / variance.clamp(min=1e-30), 0)
        return slope, (a - slope * z) / some


class Histogram:
    """Joint sums of estimate, pre-activation and activation of every neuron, by bins of the estimate.

    The bins are laid over the estimate's distribution as the moments give it. Memory: 6 bins h float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"_sums": "sum", "least": "least", "greatest": "greatest"}

    def __init__(
        self, moments: Moments, up: Tensor, up_bias: Tensor | None, predictor: Quantised, activation: Activation
    ) -> None:
        """Lays the bins.

        Args:
            moments: of the site's inputs.
            up: [h, d], float32.
            up_bias: [h], float32, or None.
            predictor: gives the estimates.
            activation: the site's.
        """
        h = len(up)
        self._w1, self._b1, self._predictor, self._activation = up, up_bias, predictor, activation
        effective = predictor.weight.double()
        spread = SPREAD * (effective @ moments.covariance * effective).sum(1).clamp(min=1e-24).sqrt()
        self._low = (effective @ moments.mean - spread).float()
        self._width = (2 * spread / BINS).float()
        self.least = torch.full((h,), torch.inf, dtype=torch.float32, device="cpu")
        self.greatest = torch.full((h,), -torch.inf, dtype=torch.float32, device="cpu")
        self._sums = torch.zeros(6, BINS * h, dtype=torch.float64, device="cpu")

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        z_hat, z = self._predictor(x), x @ self._w1.T
        if self._b1 is not None:
            z += self._b1
        a = self._activation.eager(z)
        self.least = torch.minimum(self.least, z_hat.amin(0))
        self.greatest = torch.maximum(self.greatest, z_hat.amax(0))
        bins = ((z_hat - self._low) / self._width).clamp_(0, BINS - 1).long()
        index = bins.mul_(len(self._low)).add_(torch.arange(len(self._low), dtype=torch.int64, device="cpu")).view(-1)
        for total, value in zip(self._sums, (torch.ones_like(z), z, z * z, a, a * z, a * a), strict=True):
            total += torch.zeros_like(total, dtype=torch.float32).scatter_add_(0, index, value.view(-1))

    @property
    def sums(self) -> Sums:
        """The sums so far."""
        return Sums(*self._sums.view(6, BINS, -1))

    @property
    def edges(self) -> Tensor:
        """Edges of the bins, [bins + 1, h], float32; the outermost are the least and greatest estimate seen."""
        edges = self._low + torch.arange(BINS + 1, dtype=torch.int64, device="cpu")[:, None] * self._width
        edges[0], edges[-1] = torch.minimum(self.least, edges[0]), torch.maximum(self.greatest, edges[-1])
        return edges
