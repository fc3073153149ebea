"""Guards: decide from the estimates of a neuron's pre-activations whether to correct it.

A guard computes one number from the estimates, the level, divides it into bins, and knows which runs of bins can be a
hot range.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tardis_fx.quantisation import Quantised
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.surrogates import Sums


class Guard(ABC):
    """Base class of guards: computes a level of every neuron, [tokens, h], and compares it with limits."""

    #: Number of bins of the level.
    bins: ClassVar[int]

    @abstractmethod
    def level(self, estimates: Sequence[Tensor]) -> Tensor:
        """Level, [tokens, h], of estimates without biases, k times [tokens, h]."""

    @abstractmethod
    def bin(self, level: Tensor) -> Tensor:
        """Index of the bin of each level, [tokens, h], int64."""

    @abstractmethod
    def edges(self, least: Tensor, greatest: Tensor) -> Tensor:
        """The edges of the bins, [bins + 1, h], float32.

        Args:
            least: [h], the smallest level of each neuron.
            greatest: [h], the largest.
        """

    @abstractmethod
    def cheapest(self, values: Tensor) -> Tensor:
        """The possible hot range with the smallest sum of values, [bins, h]: [bins, h] bool."""

    @abstractmethod
    def limits(self, hot: Tensor, edges: Tensor) -> Tensor:
        """Limits of the level for given hot bins: [h, limits], float32.

        Args:
            hot: [bins, h], bool, as from :meth:`cheapest`, or all or none of a neuron's bins.
            edges: [bins + 1, h].
        """

    @abstractmethod
    def quantiles(self, level: Tensor, rate: float) -> Tensor:
        """Limits that a share ``rate`` of each neuron's levels, [tokens, h], exceeds: [h, limits], float32."""

    @abstractmethod
    def leaves(self, level: Tensor, limits: Tensor) -> Tensor:
        """Whether levels leave the hot range, [tokens, h] bool."""

    @abstractmethod
    def tensor(self, limits: Tensor) -> Tensor:
        """The guard tensor of the op, [h, numbers], float32: see :class:`tardis_fx.runtime.correction.Correction`."""


@dataclass(frozen=True, eq=False)
class Interval(Guard):
    """Guard of neurons with one pre-activation: the level is the estimate, and a hot range is any interval.

    Attributes:
        low: [h], lower edge of the first bin.
        width: [h], of a bin.
    """

    low: Tensor
    width: Tensor

    #: Bins over ``SPREAD`` standard deviations of the estimate on both sides of its mean; the outer two are open.
    bins: ClassVar[int] = 96
    SPREAD: ClassVar[float] = 6.0

    @classmethod
    def from_inputs(cls, inputs: Moments, predictor: Quantised) -> Interval:
        """Places the bins over the distribution of the estimates."""
        rows = predictor.weight.double()
        spread = cls.SPREAD * (rows @ inputs.covariance * rows).sum(1).clamp(min=1e-24).sqrt()
        return cls((rows @ inputs.mean - spread).float(), (2 * spread / cls.bins).float())

    def level(self, estimates: Sequence[Tensor]) -> Tensor:
        """The estimate itself."""
        (estimate,) = estimates
        return estimate

    def bin(self, level: Tensor) -> Tensor:
        """Index of the bin, from the distance to the first edge."""
        return ((level - self.low) / self.width).clamp_(0, self.bins - 1).long()

    def edges(self, least: Tensor, greatest: Tensor) -> Tensor:
        """Equally spaced edges; the outermost are extended to the smallest and largest estimates."""
        edges = self.low + torch.arange(self.bins + 1, dtype=torch.int64, device="cpu")[:, None] * self.width
        edges[0], edges[-1] = torch.minimum(least, edges[0]), torch.maximum(greatest, edges[-1])
        return edges

    def cheapest(self, values: Tensor) -> Tensor:
        """The cheapest run of adjacent bins: a minimum-subarray problem, solved for all neurons by prefix sums."""
        prefix = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
        highest, where = prefix.cummax(0)
        stop = (prefix - highest).argmin(0)
        return _run(where.gather(0, stop[None])[0], stop, len(values))

    def limits(self, hot: Tensor, edges: Tensor) -> Tensor:
        """Lower and upper bound; bounds that no estimate satisfies for a neuron without hot bins."""
        some, start = hot.any(0), hot.byte().argmax(0)
        stop = start + hot.sum(0)
        lower = torch.where(some, edges.gather(0, start[None])[0], torch.inf)
        upper = torch.where(some, edges.gather(0, stop[None])[0], -torch.inf)
        return torch.stack([lower, upper], 1)

    def quantiles(self, level: Tensor, rate: float) -> Tensor:
        """Bounds with half of the share outside on either side."""
        return torch.stack([_quantile(level, rate / 2), _quantile(level, 1 - rate / 2)], 1)

    def leaves(self, level: Tensor, limits: Tensor) -> Tensor:
        """Whether estimates are outside the bounds."""
        lower, upper = limits.unbind(1)
        return (level < lower) | (level > upper)

    def tensor(self, limits: Tensor) -> Tensor:
        """The bounds, [h, 2]."""
        return limits


@dataclass(frozen=True, eq=False)
class Score(Guard):
    """Guard of neurons with several pre-activations: the level is the score, and a hot range is all below a threshold.

    The score is the distance between the response and a surrogate of the estimates. The score uses the surrogate fitted
    to all tokens and keeps it, because the bins would otherwise move with the fit.

    Attributes:
        neurons: of the site.
        surrogate: [h, k + 1], float32.
        least: [h], upper edge of the first bin.
    """

    neurons: Neurons
    surrogate: Tensor
    least: Tensor

    #: Each bin is ``GROWTH`` times as wide as the one before; the first and the last are open.
    bins: ClassVar[int] = 40
    GROWTH: ClassVar[float] = 1.25
    #: Upper edge of the first bin, as a share of the surrogate's root mean square error.
    LEAST: ClassVar[float] = 1 / 128

    @classmethod
    def from_sums(cls, neurons: Neurons, sums: Sums) -> Score:
        """Makes a score with the surrogates that fit the sums, which have no bins."""
        surrogate = sums.regress()
        error = (sums.error(surrogate) / sums.count.clamp(min=1)).sqrt().float()
        return cls(neurons, surrogate.float(), cls.LEAST * error.clamp(min=1e-12))

    def level(self, estimates: Sequence[Tensor]) -> Tensor:
        """The distance between response and surrogate of the estimates."""
        z = self.neurons.add_biases(estimates)
        return surrogate_error(self.surrogate, z, self.neurons.response(z)).abs()

    def bin(self, level: Tensor) -> Tensor:
        """Index of the bin, from the logarithm of the level."""
        growth = torch.tensor(self.GROWTH, dtype=torch.float32, device="cpu")
        steps = (level / self.least).log_().div_(growth.log())
        return steps.floor_().add_(1).clamp_(0, self.bins - 1).long()

    def edges(self, least: Tensor, greatest: Tensor) -> Tensor:
        """Edges in a geometric series; the last is extended to the largest level."""
        steps = torch.arange(-1.0, self.bins, dtype=torch.float32, device="cpu")
        edges = self.least * self.GROWTH ** steps[:, None]
        edges[0], edges[-1] = -torch.inf, torch.maximum(greatest, edges[-1])
        return edges

    def cheapest(self, values: Tensor) -> Tensor:
        """The cheapest run of bins that starts at the first."""
        stop = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)]).argmin(0)
        return _run(torch.zeros_like(stop), stop, len(values))

    def limits(self, hot: Tensor, edges: Tensor) -> Tensor:
        """The threshold; one that every level exceeds for a neuron without hot bins."""
        return edges.gather(0, hot.sum(0)[None]).T

    def quantiles(self, level: Tensor, rate: float) -> Tensor:
        """Threshold that the share exceeds."""
        return _quantile(level, 1 - rate)[:, None]

    def leaves(self, level: Tensor, limits: Tensor) -> Tensor:
        """Whether levels are above the threshold."""
        return level > limits[:, 0]

    def tensor(self, limits: Tensor) -> Tensor:
        """The surrogate of the score, then the threshold: [h, k + 2]."""
        return torch.cat([self.surrogate, limits], 1)


def surrogate_error(surrogate: Tensor, z: Sequence[Tensor], response: Tensor) -> Tensor:
    """Response of neurons minus their surrogates, [h, k + 1]: [tokens, h]."""
    *slopes, intercept = surrogate.unbind(1)
    for slope, one in zip(slopes, z, strict=True):
        response = response - slope * one
    return response - intercept


def _quantile(level: Tensor, share: float) -> Tensor:
    """Quantile between two of each neuron's levels, [tokens, h], with at least one level on either side: [h]."""
    below = min(max(1, round(share * len(level))), len(level) - 1)
    return level.sort(0).values[below - 1 : below + 1].mean(0)


def _run(start: Tensor, stop: Tensor, bins: int) -> Tensor:
    """The bins from start to stop of every neuron, [bins, h] bool."""
    number = torch.arange(bins, dtype=torch.int64, device="cpu")[:, None]
    return (number >= start) & (number < stop)
