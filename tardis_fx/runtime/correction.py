"""The arguments of ``tardis::correct``: the only place that lists them."""

import inspect
from typing import NamedTuple

from torch import Tensor

#: Largest number of tokens that kernels take, each a bit of a mask; a call with more is a prefill.
MOST_TOKENS = 16


class Correction(NamedTuple):
    """A call of the op at a site whose neurons have k projections each: k is 1 (up) or 2 (gate, up).

    Tensors with one entry per listed neuron have room for ``capacity`` neurons: codes, scales, zero points, biases,
    guard and surrogates. Only the first ``listed`` entries are used, and ``guarded`` of the predictor and the guard.

    Attributes:
        folded: [..., d_out], ``x C + B``; or [d_out], B, if ``fold`` is given.
        x: [..., d], of the dtype of ``folded``, like the projections and the columns.
        projections: k of [h, d]; with ``row_bits`` below 16, k of [h, row bytes], uint8, from :func:`packing.join`,
            with :func:`packing.low_bits` bits per weight.
        columns: [h, d_out], ``down`` transposed; or [h, row bytes], uint8, with ``row_bits`` bits per weight.
        counts: [2], int64: listed, guarded.
        neurons: [capacity], int32: rows of the projections and the columns.
        codes: [capacity, k, packed bytes], uint8, of the predictor: packed codes of the projections' rows. All codes
            of a call have the same group size.
        scale: [capacity, k, groups], float16; a weight is ``scale * (code - zero)``.
        zero: [capacity, k, groups], uint8.
        biases: [capacity, k], of the projections, in the dtype of the sums; or None.
        guard: [capacity, :func:`guard_width`], float32. For k = 1, lower and upper bound of the estimate without its
            bias; for k = 2, slopes and intercept of the plane from which the score of the estimates is measured, and
            the threshold.
        surrogate: [capacity, k + 1], float32: the slopes and the intercept in the fold.
        bits: bits of a code of the predictor.
        activation: name in the registry.
        fold: C transposed, [d_out, d], or in codes, [d_out, row bytes], uint8; None if ``folded`` includes it.
        fold_bits: bits of a code of ``fold``; 16 if it is not in codes.
        row_bits: bits per weight of the rows; 16 if they are not in codes.
    """

    folded: Tensor
    x: Tensor
    projections: list[Tensor]
    columns: Tensor
    counts: Tensor
    neurons: Tensor
    codes: Tensor
    scale: Tensor
    zero: Tensor
    biases: Tensor | None
    guard: Tensor
    surrogate: Tensor
    bits: int
    activation: str
    fold: Tensor | None = None
    fold_bits: int = 16
    row_bits: int = 16

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the call, including each projection."""
        fields = (*self, *self.projections)
        return [field for field in fields if isinstance(field, Tensor)]


#: Signature of a function that takes the fields of a :class:`Correction`, from which PyTorch infers the op's schema.
SIGNATURE = inspect.signature(Correction).replace(return_annotation=Tensor)


def guard_width(k: int) -> int:
    """Number of values in a neuron's guard: the bounds of an interval, or a plane and a threshold."""
    return 2 if k == 1 else k + 2
