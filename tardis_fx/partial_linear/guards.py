"""Guards: what tells from the estimates of a neuron's pre-activations whether to correct it.

A guard measures one number of the estimates, the level, lays bins over it, and knows which runs of bins can be a hot
range.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tardis_fx.quantisation import Quantised
    from tardis_fx.statistics.moments import Moments
    from tardis_fx.statistics.neurons import Neurons
    from tardis_fx.statistics.surrogates import Sums


class Guard(ABC):
    """Measures a level of every neuron, [tokens, h], and compares it with limits."""

    #: Number of bins of the level.
    bins: ClassVar[int]

    @abstractmethod
    def level(self, estimates: Sequence[Tensor]) -> Tensor:
        """The level, [tokens, h], of estimates without biases, k times [tokens, h]."""

    @abstractmethod
    def bin(self, level: Tensor) -> Tensor:
        """The bin of each level, [tokens, h], int64."""

    @abstractmethod
    def edges(self, least: Tensor, greatest: Tensor) -> Tensor:
        """The edges of the bins, [bins + 1, h], float32.

        Args:
            least: [h], the least level seen of each neuron.
            greatest: [h], the greatest.
        """

    @abstractmethod
    def cheapest(self, values: Tensor) -> Tensor:
        """The hot bins of least sum, [bins, h] bool, of values [bins, h], among those that can be a hot range."""

    @abstractmethod
    def limits(self, hot: Tensor, edges: Tensor) -> Tensor:
        """What a level is compared with: [h, limits], float32.

        Args:
            hot: [bins, h], bool, as of :meth:`cheapest`, or all bins or none of a neuron's.
            edges: [bins + 1, h].
        """

    @abstractmethod
    def quantiles(self, level: Tensor, rate: float) -> Tensor:
        """Limits that this share of each neuron's levels, [tokens, h], leaves: [h, limits], float32."""

    @abstractmethod
    def leaves(self, level: Tensor, limits: Tensor) -> Tensor:
        """Whether levels leave the hot range, [tokens, h] bool."""

    @abstractmethod
    def tensor(self, limits: Tensor) -> Tensor:
        """The guard of the op, [h, numbers], float32: see :class:`tardis_fx.runtime.correction.Correction`."""


@dataclass(frozen=True, eq=False)
class Interval(Guard):
    """Neurons of one pre-activation: the level is the estimate, and a hot range any interval of it.

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
        """Lays the bins over the distribution that a site's inputs give the estimates."""
        rows = predictor.weight.double()
        spread = cls.SPREAD * (rows @ inputs.covariance * rows).sum(1).clamp(min=1e-24).sqrt()
        return cls((rows @ inputs.mean - spread).float(), (2 * spread / cls.bins).float())

    def level(self, estimates: Sequence[Tensor]) -> Tensor:
        """The estimate."""
        (estimate,) = estimates
        return estimate

    def bin(self, level: Tensor) -> Tensor:
        """By the distance from the first edge."""
        return ((level - self.low) / self.width).clamp_(0, self.bins - 1).long()

    def edges(self, least: Tensor, greatest: Tensor) -> Tensor:
        """At equal distances; the outermost are the least and greatest estimates seen, if these lie outside."""
        edges = self.low + torch.arange(self.bins + 1, dtype=torch.int64, device="cpu")[:, None] * self.width
        edges[0], edges[-1] = torch.minimum(least, edges[0]), torch.maximum(greatest, edges[-1])
        return edges

    def cheapest(self, values: Tensor) -> Tensor:
        """A run of neighbouring bins: a minimum-subarray problem, solved for all neurons at once by prefix sums."""
        prefix = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
        highest, where = prefix.cummax(0)
        stop = (prefix - highest).argmin(0)
        return _run(where.gather(0, stop[None])[0], stop, len(values))

    def limits(self, hot: Tensor, edges: Tensor) -> Tensor:
        """Lower and upper bound; of a neuron without a hot bin, bounds that no estimate meets."""
        some, start = hot.any(0), hot.byte().argmax(0)
        stop = start + hot.sum(0)
        lower = torch.where(some, edges.gather(0, start[None])[0], torch.inf)
        upper = torch.where(some, edges.gather(0, stop[None])[0], -torch.inf)
        return torch.stack([lower, upper], 1)

    def quantiles(self, level: Tensor, rate: float) -> Tensor:
        """Bounds with half of the share on either side."""
        return torch.stack([_quantile(level, rate / 2), _quantile(level, 1 - rate / 2)], 1)

    def leaves(self, level: Tensor, limits: Tensor) -> Tensor:
        """Outside the bounds."""
        lower, upper = limits.unbind(1)
        return (level < lower) | (level > upper)

    def tensor(self, limits: Tensor) -> Tensor:
        """The bounds."""
        return limits


@dataclass(frozen=True, eq=False)
class Score(Guard):
    """Neurons of several pre-activations: the level is how far the response to the estimates is from a surrogate.

    The surrogate is the best one of all tokens, and stays what it is: the bins would else move with the fit. A hot
    range is every level up to a threshold.

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
        """Measures from the best surrogate of the tokens that sums, without bins, are of."""
        surrogate = sums.regress()
        error = (sums.error(surrogate) / sums.count.clamp(min=1)).sqrt().float()
        return cls(neurons, surrogate.float(), cls.LEAST * error.clamp(min=1e-12))

    def level(self, estimates: Sequence[Tensor]) -> Tensor:
        """The distance between response and surrogate of the estimates."""
        z = self.neurons.add_biases(estimates)
        return surrogate_error(self.surrogate, z, self.neurons.response(z)).abs()

    def bin(self, level: Tensor) -> Tensor:
        """By the logarithm."""
        growth = torch.tensor(self.GROWTH, dtype=torch.float32, device="cpu")
        steps = (level / self.least).log_().div_(growth.log())
        return steps.floor_().add_(1).clamp_(0, self.bins - 1).long()

    def edges(self, least: Tensor, greatest: Tensor) -> Tensor:
        """In a geometric series; the last is the greatest level seen, if that lies beyond."""
        steps = torch.arange(-1.0, self.bins, dtype=torch.float32, device="cpu")
        edges = self.least * self.GROWTH ** steps[:, None]
        edges[0], edges[-1] = -torch.inf, torch.maximum(greatest, edges[-1])
        return edges

    def cheapest(self, values: Tensor) -> Tensor:
        """The first bins."""
        stop = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)]).argmin(0)
        return _run(torch.zeros_like(stop), stop, len(values))

    def limits(self, hot: Tensor, edges: Tensor) -> Tensor:
        """The threshold; of a neuron without a hot bin, one that every level exceeds."""
        return edges.gather(0, hot.sum(0)[None]).T

    def quantiles(self, level: Tensor, rate: float) -> Tensor:
        """A threshold below the share."""
        return _quantile(level, 1 - rate)[:, None]

    def leaves(self, level: Tensor, limits: Tensor) -> Tensor:
        """Above the threshold."""
        return level > limits[:, 0]

    def tensor(self, limits: Tensor) -> Tensor:
        """The surrogate that the level is measured from, then the threshold."""
        return torch.cat([self.surrogate, limits], 1)


def surrogate_error(surrogate: Tensor, z: Sequence[Tensor], response: Tensor) -> Tensor:
    """The response of neurons less their surrogates, [h, k + 1]: [tokens, h]."""
    *slopes, intercept = surrogate.unbind(1)
    for slope, one in zip(slopes, z, strict=True):
        response = response - slope * one
    return response - intercept


def _quantile(level: Tensor, share: float) -> Tensor:
    """Between two of each neuron's levels, [tokens, h], with that share of them below, and one on either side: [h]."""
    below = min(max(1, round(share * len(level))), len(level) - 1)
    return level.sort(0).values[below - 1 : below + 1].mean(0)


def _run(start: Tensor, stop: Tensor, bins: int) -> Tensor:
    """The bins from start to stop of every neuron, [bins, h] bool."""
    number = torch.arange(bins, dtype=torch.int64, device="cpu")[:, None]
    return (number >= start) & (number < stop)
