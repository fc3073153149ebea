"""Which neurons are folded, guarded or always exact, and where a guarded neuron is hot.

Everything follows from one price. With ``e`` the squared error that the surrogate leaves in a bin of a neuron's
histogram (times ``‖W2[:, n]‖²``) and a price ``λ`` for a byte read, a neuron costs

    folded    Σ e                                        no predictor row, never corrected
    exact     λ · tokens · row                           always corrected, and no predictor row where it is not read
    guarded   Σ_hot e + λ · (tokens · predictor + Σ_cold count · row)

and takes the cheapest. Of a guarded neuron, the best hot range is the run of neighbouring bins with the least
``Σ (e - λ · row · count)``: a minimum-subarray problem, solved for all neurons at once by prefix sums.
A bin is hot when its mean squared error is below ``λ · row``: within a layer one threshold on the error times the norm
of the W2 column, as the paper has it (section 5.1), and between layers the threshold of least total error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tardis_fx.runtime.packing import low_bits, row_bytes

if TYPE_CHECKING:
    from tardis_fx.partial_linear.histogram import Histogram, Sums


@dataclass(frozen=True)
class Costs:
    """Bytes read for one token.

    Attributes:
        fold: by the folded weight and bias.
        predictor: by a predictor row.
        row: by a correction.
        nested: whether a correction needs the predictor row, too.
    """

    fold: int
    predictor: int
    row: int
    nested: bool = False

    @property
    def exact(self) -> int:
        """By a neuron that is always corrected."""
        return self.row + self.nested * self.predictor

    @classmethod
    def of(
        cls,
        d: int,
        d_out: int,
        bits: int,
        size: int,
        fold_bits: int = 16,
        row_bits: int = 16,
        *,
        group_size: int,
        bias: bool,
        gated: bool = False,
    ) -> Costs:
        """Of a site; scales, zero points, bounds, surrogates and indices of neurons counted.

        Args:
            d: columns of W1.
            d_out: rows of W2.
            bits: of the predictor.
            size: bytes of a weight in the model's own dtype.
            fold_bits: of the folded weight; 16 is the model's own dtype.
            row_bits: of the rows of W1 and columns of W2 that a correction reads; likewise. Below 16, a row of W1
                is the predictor's and what the correction reads beside it.
            group_size: columns that share a scale and a zero point.
            bias: whether the first projection has one; of a gated site, whether gate or up projection has, and then
                both the guard and a correction read a number for each.
            gated: whether there is a gate beside W1, of its size.
        """

        def row(columns: int, width: int) -> int:
            return columns * size if width == 16 else row_bytes(columns, width, group_size)

        nested = row_bits < 16
        projections, beside, surrogate = (2, 16, 16 + 8 * bias) if gated else (1, 8, 12 + 4 * bias)
        predictor = projections * row_bytes(d, bits, group_size) + beside + 8 * (gated and bias)
        correction = projections * row(d, low_bits(bits, row_bits) if nested else 16) + row(d_out, row_bits) + surrogate
        return cls((row(d, fold_bits) + size) * d_out, predictor, correction, nested)


@dataclass(frozen=True)
class Ranges:
    """The choice at one site.

    Attributes:
        hot: [bins, h], bool; all of a folded neuron's bins are hot, none of an exact one's.
        guarded: [h], bool.
        exact: [h], bool.
        touched: expected bytes per token.
    """

    hot: Tensor
    guarded: Tensor
    exact: Tensor
    touched: float


class SiteRanges:
    """One site's surrogates, and its ranges as a function of the price of a byte."""

    def __init__(self, histogram: Histogram, w2_norm: Tensor, costs: Costs) -> None:
        """Starts with the surrogates that fit all tokens.

        Args:
            histogram: of the site.
            w2_norm: [h], norms of the columns of W2.
            costs: bytes.
        """
        self.sums: Sums = histogram.sums
        self._begin(self.sums.count, w2_norm, costs)

    def _begin(self, count: Tensor, w2_norm: Tensor, costs: Costs) -> None:
        self.costs, self._count = costs, count
        self._importance = w2_norm.double() ** 2
        self._tokens = float(count[:, 0].sum())
        self.refit(torch.ones_like(count, dtype=torch.bool))

    def refit(self, hot: Tensor) -> None:
        """Fits the surrogates to the hot bins; an exact neuron's is zero, which keeps it out of the fold."""
        self.slope, self.intercept = self.sums.regress(hot)
        self._error = self.sums.error(self.slope, self.intercept) * self._importance

    def at(self, price: float) -> Ranges:
        """The ranges of least cost at a price per byte read."""
        error, count = self._error, self._count
        row = price * self.costs.row
        start, stop = self._cheapest(error - row * count)
        bins = torch.arange(len(error), dtype=torch.int64, device="cpu")[:, None]
        hot = (bins >= start) & (bins < stop)
        folded_cost = error.sum(0)
        exact_cost = torch.full_like(folded_cost, price * self.costs.exact * self._tokens)
        guarded_cost = torch.where(hot, error, row * count).sum(0) + price * self.costs.predictor * self._tokens
        choice = torch.stack([folded_cost, exact_cost, guarded_cost]).argmin(0)
        hot = (hot | (choice == 0)) & (choice != 1)
        cold = torch.where(hot, 0, count).sum().item() / self._tokens
        read = (choice == 2) | (choice == 1) & self.costs.nested
        touched = self.costs.fold + self.costs.predictor * int(read.sum()) + self.costs.row * cold
        return Ranges(hot, choice == 2, choice == 1, touched)

    def _cheapest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Start and stop of every neuron's hot bins: of the least sum over [bins, h]."""
        return _cheapest_run(values)


def _cheapest_run(values: Tensor) -> tuple[Tensor, Tensor]:
    """Start and stop of the run of least sum in every column of [bins, h]; an empty run where all sums are positive."""
    prefix = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
    highest, where = prefix.cummax(0)
    stop = (prefix - highest).argmin(0)
    return where.gather(0, stop[None])[0], stop
