"""Guards: decide from the estimates of a neuron's pre-activations whether to correct it.

A guard computes one number from the estimates, the level, divides it into bins, and knows which runs of bins can be a
hot range.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from tardis_fx.quantisation import Quantised
from tardis_fx.runtime.reference import surrogate_error
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.surrogates import Sums


class Guard(ABC):
    """Base class of guards: computes a level of every neuron and compares it with limits."""

    #: Number of bins of the level.
    bins: ClassVar[int]
    #: Whether a hot range may be any run of bins; if not, it starts at the first bin.
    two_sided: ClassVar[bool]

    @abstractmethod
    def level(self, estimates: Sequence[Float[Tensor, "tokens h"]]) -> Float[Tensor, "tokens h"]:
        """Level of k estimates without biases."""

    @abstractmethod
    def bin(self, level: Float[Tensor, "tokens h"]) -> Int64[Tensor, "tokens h"]:
        """Index of the bin of each level."""

    @abstractmethod
    def edges(self, least: Float32[Tensor, " h"], greatest: Float32[Tensor, " h"]) -> Float32[Tensor, "edges h"]:
        """The edges of the bins, from the smallest and the largest level of each neuron."""

    def cheapest(self, values: Float[Tensor, "bins h"]) -> Bool[Tensor, "bins h"]:
        """The possible hot range, a run of adjacent bins, with the smallest sum of values.

        This is a minimum-subarray problem, solved for all neurons by prefix sums.
        """
        prefix = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
        highest, position = prefix.cummax(0) if self.two_sided else (0, torch.zeros_like(prefix, dtype=torch.int64))
        stop = (prefix - highest).argmin(0)
        start = position.gather(0, stop[None])[0]
        number = torch.arange(len(values), dtype=torch.int64, device="cpu")[:, None]
        return (number >= start) & (number < stop)

    def limits(self, hot: Bool[Tensor, "bins h"], edges: Float32[Tensor, "bins+1 h"]) -> Float32[Tensor, "h 2"]:
        """Lower and upper bound of the hot bins, a run for each neuron; bounds that no level meets without hot bins."""
        some, start = hot.any(0), hot.byte().argmax(0)
        stop = start + hot.sum(0)
        lower = torch.where(some, edges.gather(0, start[None])[0], torch.inf)
        upper = torch.where(some, edges.gather(0, stop[None])[0], -torch.inf)
        return torch.stack([lower, upper], 1)

    def quantiles(self, level: Float[Tensor, "tokens h"], rate: float) -> Float[Tensor, "h 2"]:
        """Bounds that leave out a share ``rate`` of each neuron's levels, half of it on either side if two-sided."""
        share = rate / 2 if self.two_sided else rate
        upper = _quantile(level, 1 - share)
        lower = _quantile(level, share) if self.two_sided else torch.full_like(upper, -torch.inf)
        return torch.stack([lower, upper], 1)

    def leaves(self, level: Float[Tensor, "tokens h"], limits: Float[Tensor, "h 2"]) -> Bool[Tensor, "tokens h"]:
        """Whether levels are outside the bounds."""
        lower, upper = limits.unbind(1)
        return (level < lower) | (level > upper)

    @abstractmethod
    def tensor(self, limits: Float32[Tensor, "h 2"]) -> Float32[Tensor, "h numbers"]:
        """The guard tensor of the op: see :class:`tardis_fx.runtime.correction.Correction`."""


@dataclass(frozen=True, eq=False)
class Interval(Guard):
    """Guard of neurons with one pre-activation: the level is the estimate, and a hot range is any interval.

    Attributes:
        low: lower edge of the first bin.
        width: of a bin.
    """

    low: Float32[Tensor, " h"]
    width: Float32[Tensor, " h"]

    #: Bins over ``SPREAD`` standard deviations of the estimate on both sides of its mean; the outer two are open.
    bins: ClassVar[int] = 96
    two_sided: ClassVar[bool] = True
    SPREAD: ClassVar[float] = 6.0

    @classmethod
    def from_inputs(cls, inputs: Moments, predictor: Quantised) -> "Interval":
        """Places the bins over the distribution of the estimates."""
        rows = predictor.weight.double()
        spread = cls.SPREAD * (rows @ inputs.covariance * rows).sum(1).clamp(min=1e-24).sqrt()
        return cls((rows @ inputs.mean - spread).float(), (2 * spread / cls.bins).float())

    def level(self, estimates: Sequence[Float[Tensor, "tokens h"]]) -> Float[Tensor, "tokens h"]:
        """The estimate itself."""
        (estimate,) = estimates
        return estimate

    def bin(self, level: Float[Tensor, "tokens h"]) -> Int64[Tensor, "tokens h"]:
        """Index of the bin, from the distance to the first edge."""
        return ((level - self.low) / self.width).clamp_(0, self.bins - 1).long()

    def edges(self, least: Float32[Tensor, " h"], greatest: Float32[Tensor, " h"]) -> Float32[Tensor, "edges h"]:
        """Equally spaced edges; the outermost are extended to the smallest and largest estimates."""
        edges = self.low + torch.arange(self.bins + 1, dtype=torch.int64, device="cpu")[:, None] * self.width
        edges[0], edges[-1] = torch.minimum(least, edges[0]), torch.maximum(greatest, edges[-1])
        return edges

    def tensor(self, limits: Float32[Tensor, "h 2"]) -> Float32[Tensor, "h numbers"]:
        """The bounds."""
        return limits


@dataclass(frozen=True, eq=False)
class Score(Guard):
    """Guard of neurons with several pre-activations: the level is the score, and a hot range is all below a threshold.

    The score is the distance between the response and a surrogate of the estimates. The score uses the surrogate fitted
    to all tokens and keeps it, because the bins would otherwise move with the fit.

    Attributes:
        neurons: of the site.
        surrogate: k slopes and the intercept.
        least: upper edge of the first bin.
    """

    neurons: Neurons
    surrogate: Float32[Tensor, "h coefficients"]
    least: Float32[Tensor, " h"]

    #: Each bin is ``GROWTH`` times as wide as the one before; the first and the last are open.
    bins: ClassVar[int] = 40
    two_sided: ClassVar[bool] = False
    GROWTH: ClassVar[float] = 1.25
    #: Upper edge of the first bin, as a share of the surrogate's root mean square error.
    LEAST: ClassVar[float] = 1 / 128

    @classmethod
    def from_sums(cls, neurons: Neurons, sums: Sums) -> "Score":
        """Makes a score with the surrogates that fit the sums, which have no bins."""
        surrogate = sums.regress()
        error = (sums.error(surrogate) / sums.count.clamp(min=1)).sqrt().float()
        return cls(neurons, surrogate.float(), cls.LEAST * error.clamp(min=1e-12))

    def level(self, estimates: Sequence[Float[Tensor, "tokens h"]]) -> Float[Tensor, "tokens h"]:
        """The distance between response and surrogate of the estimates."""
        z = self.neurons.add_biases(estimates)
        return surrogate_error(z, self.surrogate, self.neurons.response(z)).abs()

    def bin(self, level: Float[Tensor, "tokens h"]) -> Int64[Tensor, "tokens h"]:
        """Index of the bin, from the logarithm of the level."""
        growth = torch.tensor(self.GROWTH, dtype=torch.float32, device="cpu")
        steps = (level / self.least).log_().div_(growth.log())
        return steps.floor_().add_(1).clamp_(0, self.bins - 1).long()

    def edges(self, least: Float32[Tensor, " h"], greatest: Float32[Tensor, " h"]) -> Float32[Tensor, "edges h"]:
        """Edges in a geometric series; the last is extended to the largest level."""
        steps = torch.arange(-1.0, self.bins, dtype=torch.float32, device="cpu")
        edges = self.least * self.GROWTH ** steps[:, None]
        edges[0], edges[-1] = -torch.inf, torch.maximum(greatest, edges[-1])
        return edges

    def tensor(self, limits: Float32[Tensor, "h 2"]) -> Float32[Tensor, "h numbers"]:
        """The surrogate of the score, then the threshold."""
        return torch.cat([self.surrogate, limits[:, 1:]], 1)


def _quantile(level: Float[Tensor, "tokens h"], share: float) -> Float[Tensor, " h"]:
    """Quantile between two of each neuron's levels, with at least one level on either side."""
    below = min(max(1, round(share * len(level))), len(level) - 1)
    return level.sort(0).values[below - 1 : below + 1].mean(0)
