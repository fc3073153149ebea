"""Drafts: a site's neurons, predictor and guard before its budget is known."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from jaxtyping import Float, Float32
from torch import Tensor

from tardis_fx.config import Rounding
from tardis_fx.guarded_fold.costs import Costs
from tardis_fx.guarded_fold.guards import Guard, Interval, Score
from tardis_fx.observation.site import Merge, ObservedSite
from tardis_fx.quantisation import Quantised, quantise
from tardis_fx.runtime.packing import low_bits
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.surrogates import SurrogateSums


class DraftObserver:
    """Observer for drafts: moments of the inputs and, if a score needs them, the neurons' sums."""

    merged: ClassVar[Mapping[str, Merge]] = {"inputs": "parts", "surrogates": "parts"}

    def __init__(self, site: ObservedSite) -> None:
        self.inputs = Moments(site.weights.up.shape[1])
        self.surrogates = [] if site.weights.gate is None else [SurrogateSums(site)]

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        self.inputs.update(x)
        for observer in self.surrogates:
            observer.update(x)


@dataclass(frozen=True)
class Quantisation:
    """Settings for quantising a plan's matrices.

    Attributes:
        bits: of the predictor.
        group_size: columns that share a scale and a zero point, in the predictor, the folded weight and the rows.
        rounding: of all matrices except the columns of down: ``"gptq"`` or ``"nearest"``.
    """

    bits: int
    group_size: int
    rounding: Rounding


@dataclass(frozen=True, eq=False)
class Draft:
    """A site before its budget is known, in float32 on the CPU, with a predictor for each of its k projections."""

    site: ObservedSite
    quantisation: Quantisation
    inputs: Moments
    neurons: Neurons
    predictors: tuple[Quantised, ...]
    guard: Guard
    _refinements: dict[int, tuple[Quantised, ...]] = field(default_factory=dict, repr=False)
    _columns: dict[int, Quantised] = field(default_factory=dict, repr=False)

    @classmethod
    def from_observer(cls, site: ObservedSite, seen: DraftObserver, quantisation: Quantisation) -> "Draft":
        """Quantises the predictors and makes the guard."""
        neurons, inputs = Neurons.from_site(site), seen.inputs
        predictors = tuple(
            quantise_projection(matrix, inputs, quantisation, quantisation.bits) for matrix in neurons.projections
        )
        guard: Guard
        if seen.surrogates:
            guard = Score.from_sums(neurons, seen.surrogates[0].sums)
        else:
            guard = Interval.from_inputs(inputs, predictors[0])
        return cls(site, quantisation, inputs, neurons, predictors, guard)

    def estimates(self, x: Float32[Tensor, "tokens d"]) -> list[Float32[Tensor, "tokens h"]]:
        """The predictor's k estimates without biases."""
        return [predictor(x) for predictor in self.predictors]

    def refinements(self, row_bits: int) -> tuple[Quantised, ...]:
        """The k matrices that extend the predictor's rows to ``row_bits`` bits."""
        bits = low_bits(self.quantisation.bits, row_bits)
        if bits not in self._refinements:
            pairs = zip(self.neurons.projections, self.predictors, strict=True)
            self._refinements[bits] = tuple(
                quantise_projection(matrix - predictor.weight, self.inputs, self.quantisation, bits)
                for matrix, predictor in pairs
            )
        return self._refinements[bits]

    def columns(self, row_bits: int) -> Quantised:
        """The columns of down, rounded to nearest."""
        if row_bits not in self._columns:
            self._columns[row_bits] = quantise(self.neurons.down.T, None, row_bits, self.quantisation.group_size)
        return self._columns[row_bits]

    def costs(self, fold_bits: int, row_bits: int) -> Costs:
        """Bytes read by a plan with these widths."""
        bits, group_size = self.quantisation.bits, self.quantisation.group_size
        return Costs.from_weights(self.site.weights, bits, fold_bits, row_bits, group_size)


def quantise_projection(
    matrix: Float[Tensor, "rows d"], inputs: Moments, quantisation: Quantisation, bits: int
) -> Quantised:
    """Quantises a matrix that multiplies the site's inputs."""
    gram = inputs.gram if quantisation.rounding == "gptq" else None
    return quantise(matrix, gram, bits, quantisation.group_size)
