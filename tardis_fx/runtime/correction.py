"""The arguments of ``tardis::correct``: the only place that lists them."""

import inspect
from typing import NamedTuple

from torch import Tensor

#: Tokens of a call that kernels take, at most: a token is a bit of a mask. More are a prefill.
MOST_TOKENS = 16


class Correction(NamedTuple):
    """A call of the op, of a site whose neurons have k projections each: k is 1 (up) or 2 (gate, up).

    Like all that has one entry a listed neuron, codes, scales, zero points, biases, guard and surrogates have room for
    ``capacity`` neurons; only the first ``listed`` entries mean anything, of the predictor and the guard ``guarded``.

    Attributes:
        folded: [..., d_out], ``x C + B``; or [d_out], B, where ``fold`` is given.
        x: [..., d], of the dtype of ``folded``, as are the projections and the columns.
        projections: k of [h, d]; with ``row_bits`` below 16, of [h, row bytes], uint8, as :func:`packing.join` makes
            them, of :func:`packing.low_bits` a weight.
        columns: [h, d_out], ``down`` transposed; or [h, row bytes], uint8, of ``row_bits`` a weight.
        counts: [2], int64: listed, guarded.
        neurons: [capacity], int32: rows of the projections and the columns.
        codes: [capacity, k, packed bytes], uint8, of the predictor: packed codes of the projections' rows. Groups are
            of the same size in all codes of a call.
        scale: [capacity, k, groups], float16; a weight is ``scale * (code - zero)``.
        zero: [capacity, k, groups], uint8.
        biases: [capacity, k], of the projections, in the dtype that sums are taken in; or None.
        guard: [capacity, :func:`guard_width`], float32. For k = 1, the lower and the upper bound of the estimate
            without its bias; for k = 2, slopes and intercept of the plane that the score of the estimates is measured
            from, and the threshold.
        surrogate: [capacity, k + 1], float32: the slopes and the intercept that the fold has.
        bits: bits of a code of the predictor.
        activation: name in the registry.
        fold: C transposed, [d_out, d], or in codes, [d_out, row bytes], uint8; None where ``folded`` has it.
        fold_bits: bits of a code of ``fold``; 16 where it is no codes.
        row_bits: bits a weight of the rows; 16 where they are no codes.
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
        """All tensors."""
        fields = (*self, *self.projections)
        return [field for field in fields if isinstance(field, Tensor)]


#: Of a function that takes the fields of a :class:`Correction`: what PyTorch makes the op's schema of.
SIGNATURE = inspect.signature(Correction).replace(return_annotation=Tensor)


def guard_width(k: int) -> int:
    """Numbers of a neuron's guard: the bounds of an interval, or a plane and a threshold."""
    return 2 if k == 1 else k + 2
