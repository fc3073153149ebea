"""Chooses which neurons are folded, guarded or always exact, and the hot ranges of guarded neurons.

Everything follows from one price. Let ``e`` be the squared error that the surrogate leaves in a bin of a neuron's
histogram (times ``‖down[:, n]‖²``) and ``λ`` the price of a byte read. Then a neuron costs

    folded    Σ e                                        no predictor row, never corrected
    exact     λ · tokens · row                           always corrected, and no predictor row unless it is nested
    guarded   Σ_hot e + λ · (tokens · predictor + Σ_cold count · row)

and takes the cheapest class. The best hot range of a guarded neuron is the one with the smallest
``Σ (e - λ · row · count)`` that its guard allows. A bin is hot if its mean squared error is below ``λ · row``. Within a
layer this is one threshold on the error times the norm of the column of down, as in the paper (section 5.1); between
layers it minimises the total error.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from tardis_fx.guarded_fold.costs import Costs
from tardis_fx.guarded_fold.guards import Guard
from tardis_fx.statistics.surrogates import Sums


@dataclass(frozen=True, eq=False)
class Ranges:
    """Hot ranges and classes of the neurons of one site.

    Attributes:
        hot: all bins of a folded neuron are hot, and none of an exact one.
        exact: neurons that are always corrected.
        touched: expected bytes per token.
    """

    hot: Bool[Tensor, "bins h"]
    guarded: Bool[Tensor, " h"]
    exact: Bool[Tensor, " h"]
    touched: float


@dataclass(frozen=True, eq=False)
class PricedSite:
    """One site's surrogates, and its ranges as a function of the price of a byte.

    Attributes:
        sums: of the neurons, by bins.
        guard: determines the possible hot ranges.
        importance: weights of the neurons' squared errors.
        surrogate: k slopes and the intercept.
    """

    sums: Sums
    guard: Guard
    importance: Float64[Tensor, " h"]
    costs: Costs
    surrogate: Float64[Tensor, "h coefficients"]

    @classmethod
    def from_sums(cls, sums: Sums, guard: Guard, importance: Float64[Tensor, " h"], costs: Costs) -> "PricedSite":
        """Makes a priced site with the surrogates that fit all tokens."""
        return cls(sums, guard, importance, costs, sums.total.regress())

    @cached_property
    def tokens(self) -> float:
        """Number of tokens seen."""
        return float(self.sums.count[:, 0].sum())

    def refit(self, hot: Bool[Tensor, "bins h"]) -> "PricedSite":
        """Refits the surrogates to the hot bins; the surrogate of an exact neuron is zero."""
        return replace(self, surrogate=self.sums.within(hot).regress())

    @cached_property
    def error(self) -> Float64[Tensor, "bins h"]:
        """Squared error that the surrogates leave in the site's output."""
        return self.sums.error(self.surrogate) * self.importance

    def at(self, price: float) -> Ranges:
        """The cheapest ranges at a price per byte read."""
        error, count, tokens = self.error, self.sums.count, self.tokens
        row = price * self.costs.row
        hot = self.guard.cheapest(error - row * count)
        folded_cost = error.sum(0)
        exact_cost = torch.full_like(folded_cost, price * self.costs.exact * tokens)
        guarded_cost = torch.where(hot, error, row * count).sum(0) + price * self.costs.predictor * tokens
        choice = torch.stack([folded_cost, exact_cost, guarded_cost]).argmin(0)
        return self.touching((hot | (choice == 0)) & (choice != 1), choice == 2, choice == 1)

    def touching(self, hot: Bool[Tensor, "bins h"], guarded: Bool[Tensor, " h"], exact: Bool[Tensor, " h"]) -> Ranges:
        """Makes ranges with the bytes that they read."""
        corrected = torch.where(hot, 0, self.sums.count).sum().item() / self.tokens
        read = guarded | exact & self.costs.nested
        touched = self.costs.fold + self.costs.predictor * int(read.sum()) + self.costs.row * corrected
        return Ranges(hot, guarded, exact, touched)
