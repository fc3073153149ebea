"""A site's plan in the making."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.partial_linear.histogram import Histogram
from tardis_fx.partial_linear.ranges import Costs, Ranges, SiteRanges
from tardis_fx.quantisation import Quantised, quantise
from tardis_fx.runtime.packing import low_bits
from tardis_fx.runtime.reference import rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from tardis_fx.config import Rounding
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.partial_linear.products import ScoreHistogram
    from tardis_fx.statistics.moments import Moments


@dataclass(eq=False)
class Draft:
    """A site's plan in the making, in float32 on the CPU.

    Attributes:
        site: the site.
        moments: of its inputs.
        bits: of the predictor.
        group_size: columns that share a scale and a zero point, in the predictor, the folded weight and the rows.
        rounding: of all of them but W2: ``"gptq"``, or ``"nearest"``.
        fold_bits: of the folded weight, 16 for the model's own dtype.
        row_bits: of the rows that corrections read; likewise.
    """

    site: ObservedSite
    moments: Moments
    bits: int
    group_size: int
    rounding: Rounding
    fold_bits: int = 16
    row_bits: int = 16

    def __post_init__(self) -> None:
        weights = self.site.weights

        def real(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.float().cpu()

        self.up, self.down = weights.up.float().cpu(), weights.down.float().cpu()
        self.up_bias, self.down_bias = real(weights.up_bias), real(weights.down_bias)
        self.activation = ACTIVATIONS[str(self.site.site.activation)]
        self.predictor: Quantised = self._quantised(self.up, self.bits)
        self._low = cache(lambda bits: self._quantised(self.up - self.predictor.weight, bits))
        self._columns: Callable[[int], Quantised] = cache(
            lambda bits: quantise(self.down.T, None, bits, self.group_size)
        )

    def at(self, fold_bits: int, row_bits: int) -> Draft:
        """The same draft at other widths, nothing settled; what is costly is shared."""
        other = copy.copy(self)
        other.fold_bits, other.row_bits = fold_bits, row_bits
        return other

    def with_columns(self, columns: Quantised) -> Draft:
        """The same draft with other columns of W2 in its rows, [h, d_out]."""
        other = copy.copy(self)
        other._columns = lambda _: columns
        return other

    @property
    def costs(self) -> Costs:
        """Bytes read."""
        (d_out, _), d, size = self.down.shape, self.up.shape[1], self.site.weights.up.element_size()
        return Costs.of(
            d,
            d_out,
            self.bits,
            size,
            self.fold_bits,
            self.row_bits,
            group_size=self.group_size,
            bias=self.biased,
            gated=self.site.weights.gate is not None,
        )

    @property
    def biased(self) -> bool:
        """Whether a projection in front of the activation has a bias."""
        return self.up_bias is not None

    @property
    def low(self) -> tuple[Quantised, ...] | None:
        """What corrections read of W1 beside the predictor; None for the original weights."""
        return None if self.row_bits == 16 else (self._low(low_bits(self.bits, self.row_bits)),)

    @property
    def columns(self) -> Tensor:
        """What corrections read of W2, transposed: [h, d_out]."""
        return self.down.T if self.row_bits == 16 else self._columns(self.row_bits).weight

    def histogram(self) -> Histogram | ScoreHistogram:
        """An empty histogram of the predictor's estimates."""
        return Histogram(self.moments, self.up, self.up_bias, self.predictor, self.activation)

    def settle(self, surrogate: SiteRanges, ranges: Ranges, edges: Tensor) -> None:
        """Fixes hot ranges, classes and surrogates.

        Args:
            surrogate: slopes and intercepts.
            ranges: hot bins and classes.
            edges: [bins + 1, h] of the bins.
        """
        self.slope, self.intercept = surrogate.slope.float(), surrogate.intercept.float()
        self.guarded, self.exact = ranges.guarded, ranges.exact
        some = ranges.hot.any(0)
        start = ranges.hot.byte().argmax(0)
        stop = start + ranges.hot.sum(0)
        self.lower = torch.where(some, edges.gather(0, start[None])[0], torch.inf)
        self.upper = torch.where(some, edges.gather(0, stop[None])[0], -torch.inf)

    @property
    def copied(self) -> Tensor:
        """Neurons whose columns of W2 the plan holds a copy of: with quantised rows, those that may be corrected."""
        return (self.guarded | self.exact if self.row_bits < 16 else torch.zeros_like(self.exact)).nonzero()[:, 0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The guard: guarded neurons first, then the exact ones; with quantised rows, those of the same neurons.

        There exact neurons are guarded ones that no estimate satisfies, for their rows are nested in the predictor's.
        """
        guarded, exact = self.guarded.nonzero()[:, 0], self.exact.nonzero()[:, 0]
        neurons = torch.cat([guarded, exact])
        rows = {}
        if self.low is not None:
            guarded = neurons
            rows = {"up": self.low[0].rows[neurons], "columns": self._columns(self.row_bits).rows[neurons]}
        return rows | {
            "neurons": neurons.int(),
            "codes": self.predictor.codes[guarded][:, None],
            "scale": self.predictor.scale[guarded][:, None],
            "zero": self.predictor.zero[guarded][:, None],
            "guard": torch.stack([self.lower, self.upper], 1)[guarded],
            "surrogate": torch.stack([self.slope, self.intercept], 1)[neurons],
        }

    def fold(self) -> tuple[Tensor, Tensor]:
        """Folded weight [d_out, d] and bias [d_out], float64: every neuron by its surrogate."""
        up, down, slope = self.up.double(), self.down.double(), self.slope.double()
        shift = (
            self.intercept.double() if self.up_bias is None else self.intercept.double() + slope * self.up_bias.double()
        )
        bias = down @ shift
        return (down * slope) @ up, bias if self.down_bias is None else bias + self.down_bias.double()

    def stored(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """A fold as the plan holds it; what quantisation changes in the mean, the bias makes up for.

        Args:
            weight: [d_out, d], float64.
            bias: [d_out], float64.

        Returns:
            The weight, in the model's dtype or as rows of :func:`tardis_fx.runtime.packing.join`; the bias.
        """
        dtype = self.site.weights.up.dtype
        if self.fold_bits == 16:
            return weight.to(dtype).contiguous(), bias.to(dtype)
        quantised = self._quantised(weight, self.fold_bits)
        bias = bias + (weight - quantised.weight.double()) @ self.moments.mean
        return quantised.rows, bias.to(dtype)

    def opened(self, stored: Tensor) -> Tensor:
        """The folded weight that :meth:`stored` made, [d_out, d], float64."""
        return rows_of(stored, self.fold_bits, self.up.shape[1], torch.float64)

    def _quantised(self, weight: Tensor, bits: int) -> Quantised:
        """A matrix that multiplies the site's inputs, [rows, d]."""
        gram = self.moments.gram if self.rounding == "gptq" else None
        return quantise(weight, gram, bits, self.group_size)
