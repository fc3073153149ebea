"""The arguments of ``tardis::correct``: the only place that lists them."""

import inspect
import math
import operator
from functools import reduce
from typing import Any, NamedTuple, get_args, get_origin

import torch
from jaxtyping import AbstractArray, Float, Float16, Float32, Int32, Int64, UInt8
from torch import Tensor

#: Largest number of tokens that kernels take, each a bit of a mask; a call with more is a prefill.
MOST_TOKENS = 16
#: Dtypes that kernels take, numbered as in ``kernel.cpp``.
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Correction(NamedTuple):
    """A call of the op at a site whose neurons have k projections each: k is 1 (up) or 2 (gate, up).

    Tensors with one entry per listed neuron have room for ``capacity`` neurons: codes, scales, zero points, biases,
    guard and surrogates. Only the first ``listed`` entries are used, and ``guarded`` of the predictor and the guard.

    Attributes:
        folded: ``x C + B``; or B alone, if ``fold`` is given.
        x: of the dtype of ``folded``, like the projections and the columns.
        projections: k matrices, or rows of :func:`packing.join` with :func:`packing.low_bits` bits per weight.
        columns: ``down`` transposed, or rows of :func:`packing.join`.
        counts: listed, guarded.
        neurons: rows of the projections and the columns.
        codes: of the predictor: packed codes of the projections' rows. All codes of a call have the same group size.
        scale: a weight is ``scale * (code - zero)``.
        zero: points of the codes.
        biases: of the projections, in the dtype of the sums; or None.
        guard: for k = 1, lower and upper bound of the estimate without its bias; for k = 2, slopes and intercept of
            the plane from which the score of the estimates is measured, and the threshold.
        surrogate: the slopes and the intercept in the fold.
        bits: bits of a code of the predictor.
        activation: name in the registry.
        fold: C transposed, or rows of :func:`packing.join`; None if ``folded`` includes it.
        fold_bits: bits of a code of ``fold``; 16 if it is not in codes.
        row_bits: bits per weight of the rows; 16 if they are not in codes.
    """

    folded: Float[Tensor, "*tokens d_out"] | Float[Tensor, " d_out"]
    x: Float[Tensor, "*tokens d"]
    projections: list[Float[Tensor, "h d"] | UInt8[Tensor, "h row_bytes"]]
    columns: Float[Tensor, "h d_out"] | UInt8[Tensor, "h row_bytes"]
    counts: Int64[Tensor, "2"]
    neurons: Int32[Tensor, " capacity"]
    codes: UInt8[Tensor, "capacity k packed"]
    scale: Float16[Tensor, "capacity k groups"]
    zero: UInt8[Tensor, "capacity k groups"]
    biases: Float[Tensor, "capacity k"] | None
    guard: Float32[Tensor, "capacity guard_width"]
    surrogate: Float32[Tensor, "capacity k+1"]
    bits: int
    activation: str
    fold: Float[Tensor, "d_out d"] | UInt8[Tensor, "d_out row_bytes"] | None = None
    fold_bits: int = 16
    row_bits: int = 16

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the call, including each projection."""
        return [field for field in (*self, *self.projections) if isinstance(field, Tensor)]

    @property
    def has_kernel(self) -> bool:
        """Whether kernels take the call: a few tokens, and one of their dtypes for everything that is not in codes."""
        shape, dtype = self.x.shape, self.x.dtype
        if dtype not in DTYPE_NUMBERS or shape[-1] == 0 or not 0 < math.prod(shape[:-1]) <= MOST_TOKENS:
            return False
        if self.row_bits == 16:
            for matrix in (*self.projections, self.columns):
                if matrix.dtype is not dtype:
                    return False
        if self.fold is not None and self.fold_bits == 16 and self.fold.dtype is not dtype:
            return False
        return self.folded.dtype is dtype


def without_shapes(annotation: Any) -> Any:
    """An annotation of an op's argument with ``Tensor`` in place of each type that states a shape."""
    members = [without_shapes(member) for member in get_args(annotation)]
    if members:
        return list[members[0]] if get_origin(annotation) is list else reduce(operator.or_, members)  # type: ignore[valid-type]
    return Tensor if issubclass(annotation, AbstractArray) else annotation


#: Signature of a function that takes the fields of a :class:`Correction`, from which PyTorch infers the op's schema.
SIGNATURE = inspect.Signature(
    [
        field.replace(annotation=without_shapes(field.annotation))
        for field in inspect.signature(Correction).parameters.values()
    ],
    return_annotation=Tensor,
)


def guard_width(k: int) -> int:
    """Number of values in a neuron's guard: the bounds of an interval, or a plane and a threshold."""
    return 2 if k == 1 else k + 2
