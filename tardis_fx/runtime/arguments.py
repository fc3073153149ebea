"""What the run-time ops take: one specification of their arguments, for kernels, references and fake implementations.

Kernels read memory by the sizes that they are told. So every call checks the shape, dtype and device of every tensor,
and the numbers that a kernel looks up in tables; kernels check what they read from lists of neurons as they read it.
Nothing here reads a value of a tensor but :func:`check_lists`.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from tardis_fx.errors import PlanMismatchError
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime.packing import GROUP_SIZES, group_count, groups_of_row, low_bits, packed_bytes

_INT64, _INT32, _UINT8, _HALF, _FLOAT = torch.int64, torch.int32, torch.uint8, torch.float16, torch.float32
_LISTS = ("counts", "neurons", "codes", "scale", "zero")
_PLAIN = (*_LISTS, "lower", "upper", "slope", "intercept")
_PLAIN_DTYPES = [_INT64, _INT32, _UINT8, _HALF, _UINT8, _FLOAT, _FLOAT, _FLOAT, _FLOAT]
_GATED = (*_LISTS, "guard", "surrogate")
_GATED_DTYPES = [_INT64, _INT32, _UINT8, _HALF, _UINT8, _FLOAT, _FLOAT]


class Layout(NamedTuple):
    """Sizes that follow from the numbers of a call."""

    packed: int  #: bytes of a predictor's row
    low: int  #: bits a weight of a coded row of W1
    row: int  #: entries of a row of W1: of codes, bytes
    column: int  #: entries of a row of the transposed W2
    column_groups: int  #: scales of a coded row of the transposed W2, else 0
    fold: int  #: entries of a row of the fold


@lru_cache(maxsize=1024)
def layout(
    d: int, d_out: int, groups: int, column: int, bits: int, activation: str, fold_bits: int, row_bits: int
) -> Layout:
    """The sizes of a call.

    Args:
        d: input width.
        d_out: output width.
        groups: scales of a predictor's row; all coded rows of ``d`` columns have as many.
        column: entries of a row of the transposed W2.
        bits: bits of a code of the predictor.
        activation: name in the registry.
        fold_bits: bits of a code of the fold, or 16.
        row_bits: bits of a code of the rows, or 16.

    Raises:
        PlanMismatchError: a number is in no table.
    """
    if activation not in ACTIVATIONS:
        raise PlanMismatchError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    for name, value, whole in (("bits", bits, 8), ("fold_bits", fold_bits, 16), ("row_bits", row_bits, 16)):
        if not (1 <= value <= 8 or value == whole):
            raise PlanMismatchError(f"{name} is {value}; codes have 1 to 8 bits")
    if groups not in _group_counts(d):
        raise PlanMismatchError(f"a row of {d} codes has {groups} scales, where it can have {_group_counts(d)}")
    low, coded = low_bits(bits, row_bits), row_bits != 16
    column_groups = groups_of_row(column, row_bits, d_out) if coded else 0
    if coded and (
        column_groups not in _group_counts(d_out) or packed_bytes(d_out, row_bits) + 3 * column_groups != column
    ):
        raise PlanMismatchError(f"rows of w2t have {column} bytes, which {d_out} codes of {row_bits} bits cannot take")
    return Layout(
        packed=packed_bytes(d, bits),
        low=low,
        row=packed_bytes(d, low) + 3 * groups if coded else d,
        column=column if coded else d_out,
        column_groups=column_groups,
        fold=d if fold_bits == 16 else packed_bytes(d, fold_bits) + 3 * groups,
    )


def _group_counts(columns: int) -> list[int]:
    return [group_count(columns, size) for size in GROUP_SIZES]


def check(
    folded: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2t: Tensor, counts: Tensor, neurons: Tensor,
    codes: Tensor, scale: Tensor, zero: Tensor, lower: Tensor, upper: Tensor, slope: Tensor, intercept: Tensor,
    bits: int, activation: str, fold: Tensor | None = None, fold_bits: int = 16, row_bits: int = 16,
) -> Layout:  # fmt: skip
    """Checks a call of ``tardis::correct``; arguments as of :func:`tardis_fx.runtime.reference.correct`.

    Raises:
        PlanMismatchError: an argument does not fit the others, or is none that the op takes.
    """
    sizes, hidden, n, groups = _sizes(folded, x, w2t, neurons, scale, bits, activation, fold_bits, row_bits)
    plan, vector = (counts, neurons, codes, scale, zero, lower, upper, slope, intercept), (n,)
    shapes = [(2,), vector, (n, sizes.packed), (n, groups), (n, groups), vector, vector, vector, vector]
    if [t.shape for t in plan] != shapes or [t.dtype for t in plan] != _PLAIN_DTYPES:
        _refuse(_PLAIN, plan, shapes, _PLAIN_DTYPES)
    if w1.shape != (hidden, sizes.row) or _other(w1, row_bits):
        _refuse(("w1",), (w1,), [(hidden, sizes.row)], [_stored(row_bits)])
    if b1 is not None and (b1.shape != (hidden,) or _other(b1, 16)):
        _refuse(("b1",), (b1,), [(hidden,)], [None])
    _check_outer(folded, x, w2t, fold, fold_bits, row_bits, sizes)
    return sizes


def check_gated(
    folded: Tensor, x: Tensor, gate: Tensor, up: Tensor, w2t: Tensor, counts: Tensor, neurons: Tensor, codes: Tensor,
    scale: Tensor, zero: Tensor, biases: Tensor | None, guard: Tensor, surrogate: Tensor, bits: int, activation: str,
    fold: Tensor | None = None, fold_bits: int = 16, row_bits: int = 16,
) -> Layout:  # fmt: skip
    """Checks a call of ``tardis::correct_gated``; arguments as of :func:`tardis_fx.runtime.reference_gated.correct`.

    Raises:
        PlanMismatchError: an argument does not fit the others, or is none that the op takes.
    """
    sizes, hidden, n, groups = _sizes(folded, x, w2t, neurons, scale, bits, activation, fold_bits, row_bits)
    plan, scales = (counts, neurons, codes, scale, zero, guard, surrogate), (n, 2, groups)
    shapes = [(2,), (n,), (n, 2, sizes.packed), scales, scales, (n, 4), (n, 3)]
    if [t.shape for t in plan] != shapes or [t.dtype for t in plan] != _GATED_DTYPES:
        _refuse(_GATED, plan, shapes, _GATED_DTYPES)
    if biases is not None and (biases.shape != (n, 2) or biases.dtype is not _FLOAT):
        _refuse(("biases",), (biases,), [(n, 2)], [_FLOAT])
    rows = (hidden, sizes.row)
    if gate.shape != rows or up.shape != rows or _other(gate, row_bits) or _other(up, row_bits):
        _refuse(("gate", "up"), (gate, up), [rows] * 2, [_stored(row_bits)] * 2)
    _check_outer(folded, x, w2t, fold, fold_bits, row_bits, sizes)
    return sizes


def check_devices(x: Tensor, *tensors: Tensor | None) -> None:
    """Checks that all tensors lie on one device, as dense ones.

    Raises:
        PlanMismatchError: one does not.
    """
    for tensor in tensors:
        if tensor is not None and (tensor.device != x.device or tensor.layout is not torch.strided):
            raise PlanMismatchError(
                f"a tensor of a rewritten FFN is {tensor.layout} on {tensor.device}, its input on {x.device}:"
                " move the model as a whole, and compile it again"
            )


def check_lists(counts: Tensor, neurons: Tensor, hidden: int, row_bits: int) -> None:
    """Checks the values of a plan's list of neurons, which waits for their device.

    Args:
        counts: [2], int64: listed, guarded.
        neurons: [capacity], int32.
        hidden: rows of the weights that the list points into.
        row_bits: bits of a code of the rows, or 16.

    Raises:
        PlanMismatchError: the list is longer than it can be, or names a neuron that is not there.
    """
    listed, guarded = counts.tolist()
    if not 0 <= guarded <= listed <= len(neurons):
        raise PlanMismatchError(f"a plan lists {listed} neurons, {guarded} guarded, and has room for {len(neurons)}")
    if row_bits != 16 and guarded != listed:
        raise PlanMismatchError(f"rows are codes, and {listed - guarded} of {listed} listed neurons have no predictor")
    outside = [n for n in neurons[:listed].tolist() if not 0 <= n < hidden]
    if outside:
        raise PlanMismatchError(
            f"a plan lists neuron {outside[0]} of an FFN that has {hidden}; the plan is damaged: calibrate again"
        )


def check_codes(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int, dtype: torch.dtype) -> None:
    """Checks a call of ``tardis::dequantise``; arguments as of :func:`tardis_fx.runtime.reference.dequantise`.

    Raises:
        PlanMismatchError: an argument does not fit the others, or is none that the op takes.
    """
    if not (1 <= bits <= 8 and columns >= 0 and dtype.is_floating_point):
        raise PlanMismatchError(f"no op makes {columns} numbers in {dtype} of codes of {bits} bits")
    if not (codes.ndim == scale.ndim == 2):
        raise PlanMismatchError("a tensor of a rewritten FFN has too few axes, or too many")
    rows, groups = codes.shape[0], scale.shape[1]
    if groups not in _group_counts(columns):
        raise PlanMismatchError(f"a row of {columns} codes has {groups} scales, it can have {_group_counts(columns)}")
    shapes: list[tuple[int, ...]] = [(rows, packed_bytes(columns, bits)), (rows, groups), (rows, groups)]
    tensors, dtypes = (codes, scale, zero), [_UINT8, _HALF, _UINT8]
    if [t.shape for t in tensors] != shapes or [t.dtype for t in tensors] != dtypes:
        _refuse(("codes", "scale", "zero"), tensors, shapes, dtypes)


def _sizes(
    folded: Tensor, x: Tensor, w2t: Tensor, neurons: Tensor, scale: Tensor, bits: int, activation: str,
    fold_bits: int, row_bits: int,
) -> tuple[Layout, int, int, int]:  # fmt: skip
    """The sizes of a call, and how many neurons there are, and may be listed, and scales in a row."""
    try:
        d, d_out, groups, n = x.shape[-1], folded.shape[-1], scale.shape[-1], neurons.shape[0]
        hidden, column = w2t.shape
    except (IndexError, ValueError):
        raise PlanMismatchError("a tensor of a rewritten FFN has too few axes, or too many") from None
    numbers = (d, d_out, groups, column, bits, activation, fold_bits, row_bits)
    try:
        return layout(*numbers), hidden, n, groups
    except TypeError:  # a symbolic size has no hash
        return layout.__wrapped__(*numbers), hidden, n, groups


def _check_outer(
    folded: Tensor, x: Tensor, w2t: Tensor, fold: Tensor | None, fold_bits: int, row_bits: int, sizes: Layout
) -> None:
    """Checks what plain and gated calls share of what the model decides."""
    hidden, d_out = w2t.shape[0], folded.shape[-1]
    if w2t.shape[1] != sizes.column or _other(w2t, row_bits):
        _refuse(("w2t",), (w2t,), [(hidden, sizes.column)], [_stored(row_bits)])
    if fold is None:
        shape = (*x.shape[:-1], d_out)
    else:
        shape = (d_out,)
        if fold.shape != (d_out, sizes.fold) or _other(fold, fold_bits):
            _refuse(("fold",), (fold,), [(d_out, sizes.fold)], [_stored(fold_bits)])
    if folded.shape != shape or _other(folded, 16) or _other(x, 16):
        _refuse(("folded", "x"), (folded, x), [shape, tuple(x.shape)], [None, None])


def _stored(bits: int) -> torch.dtype | None:
    """What a matrix is stored in: codes, or, as None, any floating point."""
    return None if bits == 16 else _UINT8


def _other(tensor: Tensor, bits: int) -> bool:
    """Whether a matrix is not of the dtype that it is stored in."""
    return not tensor.dtype.is_floating_point if bits == 16 else tensor.dtype is not _UINT8


def _refuse(
    names: Sequence[str], tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[torch.dtype | None],
) -> NoReturn:  # fmt: skip
    """Says of the first tensor that is not as it should be what it is and what it should be."""
    for name, tensor, shape, dtype in zip(names, tensors, shapes, dtypes, strict=True):
        right = tensor.dtype is dtype if dtype else tensor.dtype.is_floating_point
        if tuple(tensor.shape) != shape or not right:
            raise PlanMismatchError(
                f"{name} of a rewritten FFN is {tensor.dtype} of shape {tuple(tensor.shape)}, where the op takes"
                f" {dtype or 'floating point'} of shape {shape}: the plan does not fit these weights"
            )
    raise AssertionError("nothing to refuse")
