"""The specification of the run-time ops' arguments, for kernels, references and fake implementations.

Kernels trust the sizes that they are given. So every call checks the shape, dtype and device of every tensor, and the
numbers that a kernel looks up in tables; kernels check entries of lists of neurons as they read them. Only
:func:`check_lists` reads values of a tensor.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tardis_fx.errors import PlanMismatchError
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import tables
from tardis_fx.runtime.correction import Correction, guard_width
from tardis_fx.runtime.packing import GROUP_SIZES, group_count, groups_of_row, low_bits, packed_bytes
from tardis_fx.runtime.reference import compute_dtype

_Shape = tuple[int, ...]
_WRONG_AXES = "a tensor of a rewritten FFN has the wrong number of axes: the plan does not fit these weights"


class Layout(NamedTuple):
    """Shapes and dtypes of a call's tensors, derived from its numbers."""

    low: int  #: bits per weight of a coded row of a projection
    column_groups: int  #: scales of a coded row of the columns, else 0
    projection: _Shape  #: of each projection
    fold: _Shape  #: if it is given
    columns: _Shape
    row_dtype: torch.dtype | None  #: of projections and columns; None for any floating point
    fold_dtype: torch.dtype | None  #: likewise
    #: Dtypes and shapes of the tensors that the plan determines, by field.
    planned: tuple[tuple[str, torch.dtype, _Shape], ...]


@lru_cache(maxsize=1024)
def _derive_layout(
    k: int, d: int, d_out: int, hidden: int, capacity: int, groups: int, column: int, bits: int, activation: str,
    fold_bits: int, row_bits: int,
) -> Layout:  # fmt: skip
    """Derives the shapes and dtypes of a call's tensors from its numbers.

    A predictor's row and every other coded row of ``d`` columns have ``groups`` scales. ``column`` is the number of
    entries of a row of the columns.

    Raises:
        PlanMismatchError: the op does not support a number.
    """
    if k not in (1, 2):
        raise PlanMismatchError(f"a neuron has {k} projections, but the op takes one or two")
    if activation not in ACTIVATIONS:
        raise PlanMismatchError(f"unknown activation {activation!r}; registered are {', '.join(ACTIVATIONS)}")
    for name, value, uncoded in (("bits", bits, 8), ("fold_bits", fold_bits, 16), ("row_bits", row_bits, 16)):
        if not (1 <= value <= 8 or value == uncoded):
            raise PlanMismatchError(f"{name} is {value}; codes have 1 to 8 bits")
    _check_groups(d, groups)
    low, coded = low_bits(bits, row_bits), row_bits != 16
    column_groups = groups_of_row(column, row_bits, d_out) if coded else 0
    if coded:
        _check_groups(d_out, column_groups)
        if packed_bytes(d_out, row_bits) + 3 * column_groups != column:
            raise PlanMismatchError(
                f"rows of columns have {column} bytes, not those of {d_out} codes of {row_bits} bits"
            )
    return Layout(
        low=low,
        column_groups=column_groups,
        projection=(hidden, packed_bytes(d, low) + 3 * groups if coded else d),
        fold=(d_out, d if fold_bits == 16 else packed_bytes(d, fold_bits) + 3 * groups),
        columns=(hidden, column if coded else d_out),
        row_dtype=torch.uint8 if coded else None,
        fold_dtype=None if fold_bits == 16 else torch.uint8,
        planned=(
            ("counts", torch.int64, (2,)),
            ("neurons", torch.int32, (capacity,)),
            ("codes", torch.uint8, (capacity, k, packed_bytes(d, bits))),
            ("scale", torch.float16, (capacity, k, groups)),
            ("zero", torch.uint8, (capacity, k, groups)),
            ("guard", torch.float32, (capacity, guard_width(k))),
            ("surrogate", torch.float32, (capacity, k + 1)),
        ),
    )


def _check_groups(columns: int, groups: int) -> None:
    counts = [group_count(columns, size) for size in GROUP_SIZES]
    if groups not in counts:
        raise PlanMismatchError(f"a row of {columns} codes has {groups} scales, but must have one of {counts}")


def check(call: Correction) -> Layout:
    """Checks a call of ``tardis::correct``.

    Raises:
        PlanMismatchError: an argument does not fit the others, or the op does not take it.
    """
    k = len(call.projections)
    try:
        d, d_out, groups, capacity = (
            call.x.shape[-1], call.folded.shape[-1], call.scale.shape[-1], call.neurons.shape[0],
        )  # fmt: skip
        hidden, column = call.columns.shape
    except (IndexError, ValueError):
        raise PlanMismatchError(_WRONG_AXES) from None
    numbers = (
        k, d, d_out, hidden, capacity, groups, column, call.bits, call.activation, call.fold_bits, call.row_bits,
    )  # fmt: skip
    try:
        layout = _derive_layout(*numbers)
    except TypeError:  # symbolic sizes are not hashable
        layout = _derive_layout.__wrapped__(*numbers)
    for name, dtype, shape in layout.planned:
        tensor = getattr(call, name)
        if tensor.shape != shape or tensor.dtype is not dtype:
            _check(name, tensor, dtype, shape)
    for projection in call.projections:
        _check("projections", projection, layout.row_dtype, layout.projection)
    _check("columns", call.columns, layout.row_dtype, layout.columns)
    if call.biases is not None:
        _check("biases", call.biases, compute_dtype(call.x.dtype), (capacity, k))
    if call.fold is not None:
        _check("fold", call.fold, layout.fold_dtype, layout.fold)
    _check("folded", call.folded, None, (*call.x.shape[:-1], d_out) if call.fold is None else (d_out,))
    _check("x", call.x, None, call.x.shape)
    return layout


def check_devices(call: Correction) -> None:
    """Checks that all tensors are dense and on one device.

    Raises:
        PlanMismatchError: a tensor is sparse or on another device.
    """
    for tensor in call.tensors:
        if tensor.device != call.x.device or tensor.layout is not torch.strided:
            raise PlanMismatchError(
                f"a tensor of a rewritten FFN is {tensor.layout} on {tensor.device}, but its input is on"
                f" {call.x.device}: move the whole model to one device, and compile it again"
            )


def check_lists(call: Correction) -> None:
    """Checks the values of a call's list of neurons, which synchronises with their device.

    Raises:
        PlanMismatchError: the list is too long, or names a neuron that does not exist.
    """
    (listed, guarded), hidden, neurons = call.counts.tolist(), call.columns.shape[0], call.neurons
    if not 0 <= guarded <= listed <= len(neurons):
        raise PlanMismatchError(f"a plan lists {listed} neurons, {guarded} guarded, with room for {len(neurons)}")
    if call.row_bits != 16 and guarded != listed:
        raise PlanMismatchError(
            f"{listed - guarded} of {listed} listed neurons have no predictor, which coded rows need: calibrate again"
        )
    outside = [n for n in neurons[:listed].tolist() if not 0 <= n < hidden]
    if outside:
        raise PlanMismatchError(
            f"a plan lists neuron {outside[0]} of an FFN that has {hidden}; the plan is damaged: calibrate again"
        )


def check_codes(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int, dtype: torch.dtype) -> None:
    """Checks a call of ``tardis::dequantise``; arguments as in :func:`tardis_fx.runtime.reference.dequantise`.

    Raises:
        PlanMismatchError: an argument does not fit the others, or the op does not take it.
    """
    if not (1 <= bits <= 8 and columns >= 0 and dtype.is_floating_point):
        raise PlanMismatchError(f"codes of {bits} bits cannot be dequantised to {columns} columns of {dtype}")
    if not (codes.ndim == scale.ndim == 2):
        raise PlanMismatchError(_WRONG_AXES)
    rows, groups = codes.shape[0], scale.shape[1]
    _check_groups(columns, groups)
    _check("codes", codes, torch.uint8, (rows, packed_bytes(columns, bits)))
    _check("scale", scale, torch.float16, (rows, groups))
    _check("zero", zero, torch.uint8, (rows, groups))


def check_rows(rows: Tensor, bits: int, columns: int, dtype: torch.dtype) -> None:
    """Checks a call of ``tardis::dequantise_rows``; arguments as in :func:`tardis_fx.runtime.tables.weights`.

    Raises:
        PlanMismatchError: an argument does not fit the others, or the op does not take it.
    """
    if not (1 <= bits <= 8 and columns >= 0 and dtype.is_floating_point):
        raise PlanMismatchError(f"codes of {bits} bits cannot be dequantised to {columns} columns of {dtype}")
    if rows.ndim != 2:
        raise PlanMismatchError(_WRONG_AXES)
    _check("rows", rows, torch.uint8, (rows.shape[0], tables.row_bytes(columns, bits)))


def check_signs(x: Tensor, signs: Tensor) -> None:
    """Checks a call of ``tardis::rotate``.

    Raises:
        PlanMismatchError: an argument does not fit the other, or the op does not take it.
    """
    _check("x", x, None, x.shape)
    _check("signs", signs, torch.int8, x.shape[-1:])


def _check(name: str, tensor: Tensor, dtype: torch.dtype | None, shape: Sequence[int]) -> None:
    """Refuses a tensor with the wrong dtype or shape; a dtype of None is any floating point."""
    same_dtype = tensor.dtype.is_floating_point if dtype is None else tensor.dtype is dtype
    if tensor.shape != shape or not same_dtype:
        raise PlanMismatchError(
            f"{name} of a rewritten FFN has dtype {tensor.dtype} and shape {tuple(tensor.shape)}, but the op takes"
            f" {dtype or 'floating point'} of shape {tuple(shape)}: the plan does not fit these weights"
        )
