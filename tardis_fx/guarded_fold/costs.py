"""Bytes that a site of a guarded fold reads for one token."""

from dataclasses import dataclass

from tardis_fx.graph.site import SiteWeights
from tardis_fx.runtime.packing import low_bits, row_bytes


@dataclass(frozen=True)
class Costs:
    """Bytes that each part of a site of a guarded fold reads for one token.

    Attributes:
        fold: of the folded weight and bias.
        predictor: of a neuron's predictor rows and guard.
        row: of a correction.
        nested: whether a correction also needs the predictor rows.
    """

    fold: int
    predictor: int
    row: int
    nested: bool = False

    @property
    def exact(self) -> int:
        """Bytes read by a neuron that is always corrected."""
        return self.row + self.nested * self.predictor

    @classmethod
    def from_weights(cls, weights: SiteWeights, bits: int, fold_bits: int, row_bits: int, group_size: int) -> "Costs":
        """Costs of a site with these weights; the other arguments are those of :meth:`from_sizes`."""
        (_, d), size, k = weights.up.shape, weights.up.element_size(), len(weights.projections)
        bias = weights.up_bias is not None or weights.gate_bias is not None
        return cls.from_sizes(
            d, len(weights.down), bits, size, fold_bits, row_bits, k=k, group_size=group_size, bias=bias
        )

    @classmethod
    def from_sizes(
        cls,
        d: int,
        d_out: int,
        bits: int,
        size: int,
        fold_bits: int = 16,
        row_bits: int = 16,
        *,
        k: int,
        group_size: int,
        bias: bool,
    ) -> "Costs":
        """Costs of a site, including scales, zero points, guards, surrogates, biases and indices of neurons.

        Args:
            d: columns of a projection.
            d_out: rows of down.
            bits: of the predictor.
            size: bytes of a weight in the model's own dtype.
            fold_bits: of the folded weight; 16 is the model's own dtype.
            row_bits: of the rows and columns that a correction reads; likewise. Below 16, a projection's row is the
                predictor's row plus its refinement.
            k: pre-activations of a neuron.
            group_size: columns that share a scale and a zero point.
            bias: whether any projection has a bias. If so, a correction and a score each read k more numbers.
        """

        def row(columns: int, width: int) -> int:
            return columns * size if width == 16 else row_bytes(columns, width, group_size)

        nested, biases, index = row_bits < 16, 4 * k * bias, 4
        guard = 8 if k == 1 else 4 * (k + 2) + biases
        predictor = k * row_bytes(d, bits, group_size) + guard
        rows = k * row(d, low_bits(bits, row_bits) if nested else 16) + row(d_out, row_bits)
        return cls((row(d, fold_bits) + size) * d_out, predictor, rows + 4 * (k + 1) + biases + index, nested)
