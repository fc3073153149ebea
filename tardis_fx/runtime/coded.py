"""The arguments of an FFN in codes, each neuron as precise as its token needs.

``tardis::coded_ffn`` takes all but the input as one prepared tensor (:mod:`tardis_fx.runtime.cpu.coded_layout`).
"""

from typing import NamedTuple

from jaxtyping import BFloat16, Float, Float32, Int8, Int64, UInt8
from torch import Tensor

from tardis_fx.runtime import tables


class CodedFFN(NamedTuple):
    """A call at a site whose neurons have k projections each: k is 1 (up) or 2 (gate, up).

    The input and the output are rotated (:mod:`tardis_fx.runtime.rotation`), and the rotated input is rounded to 8 or
    16 bits (:func:`tardis_fx.runtime.coded_reference.rounded`); rows of codes are those of
    :mod:`tardis_fx.runtime.tables`. Every neuron that the plan lists has base codes, which give the estimates of its
    pre-activations, and refinements, which are added to them. While it gives nothing, the fold holds its surrogate.
    Tensors with one entry per listed neuron have room for ``capacity`` neurons, of which ``listed`` are used.

    A neuron's last norm is that of its column. With k = 2, the gated norm comes before it: the norm times the root mean
    square of the second pre-activation. The noise of an estimate, its root-mean-square error, is that of the projection
    times the scale of the row of base codes.

    A part is read where its contribution (:func:`coded_reference.levels`) exceeds its threshold. The ``thresholds`` are
    for k = 2 that of ``up``, and then those of the column, of the refinements of the projections, and of the refinement
    of the column. If ``relative``, they are shares of the token's scale: the root of the sum, over the neurons, of the
    squares of ``act(z)`` of the first pre-activation times the first norm.

    Attributes:
        x: the input.
        bias: added to the output, of the dtype of ``x``.
        signs: of the rotation of the input.
        out_signs: of the rotation of the output.
        listed: number of neurons.
        projections: base codes of k projections.
        refinements: of the projections.
        columns: base codes of the rotated columns of ``down``.
        column_refinements: of the columns.
        biases: of the projections, of the dtype of ``x``, or None.
        norms: of the neurons' columns.
        noise: of the estimates, over the scales of the rows of base codes.
        thresholds: of the parts.
        surrogate: k slopes and the intercept; None without a fold.
        fold: rows of the rotated folded weight, or None.
        bits: of ``projections``.
        low_bits: of ``refinements``.
        column_bits: of ``columns``.
        column_low_bits: of ``column_refinements``.
        fold_bits: of ``fold``.
        activation: name in the registry.
        relative: whether thresholds are shares of each token's scale.
    """

    x: Float[Tensor, "*tokens d"]
    bias: Float[Tensor, " d_out"]
    signs: Int8[Tensor, " d"]
    out_signs: Int8[Tensor, " d_out"]
    listed: Int64[Tensor, "1"]
    projections: list[UInt8[Tensor, "capacity row_bytes"]]
    refinements: list[UInt8[Tensor, "capacity refinement_bytes"]]
    columns: UInt8[Tensor, "capacity column_bytes"]
    column_refinements: UInt8[Tensor, "capacity column_refinement_bytes"]
    biases: Float[Tensor, "capacity k"] | None
    norms: BFloat16[Tensor, "capacity k"]
    noise: Float32[Tensor, " k"]
    thresholds: Float32[Tensor, " k+2"]
    surrogate: BFloat16[Tensor, "capacity k+1"] | None
    fold: UInt8[Tensor, "d_out fold_bytes"] | None
    bits: int
    low_bits: int
    column_bits: int
    column_low_bits: int
    fold_bits: int
    activation: str
    relative: bool

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the call."""
        return [field for field in (*self, *self.projections, *self.refinements) if isinstance(field, Tensor)]

    @property
    def wide(self) -> bool:
        """Whether the input is rounded to 16 bits: refined projections have as many as 8."""
        return self.bits + self.low_bits >= 8

    @property
    def neuron(self) -> "NeuronBytes":
        """Bytes that the parts of a neuron take."""
        widths = (self.bits, self.low_bits, self.column_bits, self.column_low_bits)
        k, fold = len(self.projections), self.fold is not None
        bias_bytes = 0 if self.biases is None else self.biases.element_size()
        return neuron_bytes(self.x.shape[-1], len(self.bias), widths, k=k, bias_bytes=bias_bytes, fold=fold)

    @property
    def fixed_bytes(self) -> int:
        """Weight bytes that every token reads."""
        shared = (self.bias, self.signs, self.out_signs, self.noise, self.thresholds, self.fold)
        fixed = sum(tensor.nbytes for tensor in shared if tensor is not None)
        return fixed + int(self.listed) * (self.neuron.constants + self.neuron.projection)


def neuron_bytes(
    d: int, d_out: int, widths: tuple[int, int, int, int], *, k: int, bias_bytes: int, fold: bool
) -> "NeuronBytes":
    """Bytes that the parts of a neuron take.

    Args:
        d: columns of a projection.
        d_out: rows of down.
        widths: ``bits, low_bits, column_bits, column_low_bits``.
        k: projections of a neuron.
        bias_bytes: of one bias; 0 if no projection has any.
        fold: whether there are surrogates.
    """
    bits, low_bits, column_bits, column_low_bits = widths
    constants = 2 * k + bias_bytes * k + 2 * (k + 1) * fold
    return NeuronBytes(
        constants,
        tables.row_bytes(d, bits),
        tables.row_bytes(d, low_bits),
        tables.row_bytes(d_out, column_bits),
        tables.row_bytes(d_out, column_low_bits),
    )


class NeuronBytes(NamedTuple):
    """Bytes that the parts of a neuron take: constants, one projection, its refinement, the column, its refinement."""

    constants: int
    projection: int
    refinement: int
    column: int
    column_refinement: int
