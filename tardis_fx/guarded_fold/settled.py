"""Settled sites: hot ranges, classes and widths are chosen, and only the residuals are still unknown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64, Shaped
from torch import Tensor

from tardis_fx.guarded_fold.costs import Costs
from tardis_fx.guarded_fold.draft import Draft, quantise_projection
from tardis_fx.guarded_fold.ranges import PricedSite, Ranges
from tardis_fx.quantisation import Quantised
from tardis_fx.runtime.reference import rows_of, surrogate_error
from tardis_fx.statistics.neurons import Neurons


@dataclass(frozen=True, eq=False)
class AffineValue:
    """Uncorrected value of neurons: an affine function of their pre-activations, which is part of the fold.

    Attributes:
        surrogate: k slopes, then the intercept.
    """

    surrogate: Float32[Tensor, "h coefficients"]

    def residual(
        self, z: Sequence[Float32[Tensor, "tokens h"]], response: Float32[Tensor, "tokens h"]
    ) -> Float32[Tensor, "tokens h"]:
        """The difference that a correction adds to replace this value by the response."""
        return surrogate_error(z, self.surrogate, response)

    def fold(self, neurons: Neurons) -> tuple[Float64[Tensor, "d_out d"], Float64[Tensor, " d_out"]]:
        """Weight and bias of the fold of all neurons, including the site's bias."""
        *slopes, shift = self.surrogate.double().unbind(1)
        down = neurons.down.double()
        weights = []
        for slope, matrix, bias in zip(slopes, neurons.projections, neurons.biases, strict=True):
            shift = shift if bias is None else shift + slope * bias.double()
            weights.append((down * slope) @ matrix.double())
        folded = down @ shift
        if neurons.down_bias is not None:
            folded = folded + neurons.down_bias.double()
        return sum(weights[1:], weights[0]), folded

    def tensors(self, listed: Int64[Tensor, " listed"]) -> dict[str, Tensor]:
        """Tensors for a plan, restricted to the listed neurons."""
        return {"surrogate": self.surrogate[listed]}


@dataclass(frozen=True, eq=False)
class Settled:
    """A draft with its widths, hot ranges, classes and uncorrected values.

    Attributes:
        fold_bits: of the folded weight, 16 for the model's own dtype.
        row_bits: of the rows and columns that corrections read; likewise.
        uncorrected: value of the neurons while they are not corrected.
        limits: bounds of the guard's level.
        columns: the columns of down that corrections read, in codes; None for the original weights.
    """

    draft: Draft
    fold_bits: int
    row_bits: int
    uncorrected: AffineValue
    limits: Float32[Tensor, "h 2"]
    guarded: Bool[Tensor, " h"]
    exact: Bool[Tensor, " h"]
    columns: Quantised | None

    @classmethod
    def from_choice(
        cls,
        draft: Draft,
        widths: tuple[int, int],
        site: PricedSite,
        ranges: Ranges,
        edges: Float32[Tensor, "edges h"],
    ) -> "Settled":
        """Makes a settled site from the widths of fold and rows, and the ranges with their surrogates."""
        columns = None if widths[1] == 16 else draft.columns(widths[1])
        uncorrected, limits = AffineValue(site.surrogate.float()), draft.guard.limits(ranges.hot, edges)
        return cls(draft, *widths, uncorrected, limits, ranges.guarded, ranges.exact, columns)

    @property
    def costs(self) -> Costs:
        """Bytes that the site reads at its widths."""
        return self.draft.costs(self.fold_bits, self.row_bits)

    @property
    def refinements(self) -> tuple[Quantised, ...] | None:
        """Refinements of the predictors that corrections read; None if they read the original weights."""
        return None if self.row_bits == 16 else self.draft.refinements(self.row_bits)

    @property
    def copied(self) -> Int64[Tensor, " copied"]:
        """Neurons whose columns of down the plan copies: with coded rows, those that may be corrected."""
        none = torch.zeros_like(self.exact)
        return (none if self.columns is None else self.guarded | self.exact).nonzero()[:, 0]

    @property
    def column_change(self) -> Float64[Tensor, "copied d_out"]:
        """Difference of the copied columns from those of down."""
        down = self.draft.neurons.down.T
        return ((down if self.columns is None else self.columns.weight) - down)[self.copied].double()

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the plan entry."""
        return {
            "bits": self.draft.quantisation.bits,
            "fold_bits": self.fold_bits,
            "row_bits": self.row_bits,
            "group_size": self.draft.quantisation.group_size,
            "activation": self.draft.site.site.activation,
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the plan entry except the fold; guarded neurons come first, then exact ones.

        With coded rows, exact neurons are stored as guarded neurons that always leave their hot range, because their
        rows are nested in those of the predictor.
        """
        guarded, exact = self.guarded.nonzero()[:, 0], self.exact.nonzero()[:, 0]
        neurons = torch.cat([guarded, exact])
        rows = {}
        if self.columns is not None and self.refinements is not None:
            guarded = neurons
            names = self.draft.site.weights.projections
            rows = {name: rows.rows[neurons] for name, rows in zip(names, self.refinements, strict=True)}
            rows["columns"] = self.columns.rows[neurons]
        predictors = self.draft.predictors
        return rows | {
            "neurons": neurons.int(),
            "codes": torch.stack([q.codes[guarded] for q in predictors], 1),
            "scale": torch.stack([q.scale[guarded] for q in predictors], 1),
            "zero": torch.stack([q.zero[guarded] for q in predictors], 1),
            "guard": self.draft.guard.tensor(self.limits)[guarded],
            **self.uncorrected.tensors(neurons),
        }

    def store_fold(
        self, weight: Float64[Tensor, "d_out d"], bias: Float64[Tensor, " d_out"]
    ) -> tuple[Shaped[Tensor, "d_out stored"], Float[Tensor, " d_out"]]:
        """Quantises a fold for the plan; the bias compensates for the mean error of quantisation.

        Returns:
            The weight, in the model's dtype or as rows of :func:`tardis_fx.runtime.packing.join`; the bias.
        """
        dtype = self.draft.site.weights.up.dtype
        if self.fold_bits == 16:
            return weight.to(dtype).contiguous(), bias.to(dtype)
        inputs = self.draft.inputs
        quantised = quantise_projection(weight, inputs, self.draft.quantisation, self.fold_bits)
        bias = bias + (weight - quantised.weight.double()) @ inputs.mean
        return quantised.rows, bias.to(dtype)

    def load_fold(self, stored: Shaped[Tensor, "d_out stored"]) -> Float64[Tensor, "d_out d"]:
        """The folded weight that :meth:`store_fold` made."""
        return rows_of(stored, self.fold_bits, self.draft.neurons.projections[0].shape[1], torch.float64)
