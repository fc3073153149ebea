"""The specification of the arguments of an FFN in codes, which are checked before they are prepared for a kernel."""

import torch
from torch import Tensor

from tardis_fx.errors import PlanMismatchError
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.tables import row_bytes


def check(call: CodedFFN) -> None:
    """Checks a call of ``tardis::coded_ffn``.

    Raises:
        PlanMismatchError: an argument does not fit the others, or the op does not take it.
    """
    k = len(call.projections)
    if k not in (1, 2) or len(call.refinements) != k:
        raise PlanMismatchError(f"a neuron has {k} projections and {len(call.refinements)} refinements")
    if call.activation not in ACTIVATIONS:
        raise PlanMismatchError(f"unknown activation {call.activation!r}; registered are {', '.join(ACTIVATIONS)}")
    for name in ("bits", "low_bits", "column_bits", "column_low_bits", "fold_bits"):
        if not 1 <= getattr(call, name) <= 8:
            raise PlanMismatchError(f"{name} is {getattr(call, name)}; codes have 1 to 8 bits")
    if call.x.ndim < 1 or call.bias.ndim != 1 or call.columns.ndim != 2:
        raise PlanMismatchError("a tensor of a rewritten FFN has the wrong number of axes")
    if (call.fold is None) != (call.surrogate is None):
        raise PlanMismatchError("a rewritten FFN has surrogates but no fold, or a fold but no surrogates")
    d, d_out, capacity = call.x.shape[-1], call.bias.shape[0], call.columns.shape[0]
    if not call.x.dtype.is_floating_point:
        raise PlanMismatchError(f"x of a rewritten FFN has dtype {call.x.dtype}, but the op takes floating point")
    _check(call, "x", call.x, call.x.dtype, tuple(call.x.shape))
    _check(call, "bias", call.bias, call.x.dtype, (d_out,))
    _check(call, "signs", call.signs, torch.int8, (d,))
    _check(call, "out_signs", call.out_signs, torch.int8, (d_out,))
    _check(call, "listed", call.listed, torch.int64, (1,))
    for rows in call.projections:
        _check(call, "projections", rows, torch.uint8, (capacity, row_bytes(d, call.bits)))
    for rows in call.refinements:
        _check(call, "refinements", rows, torch.uint8, (capacity, row_bytes(d, call.low_bits)))
    _check(call, "columns", call.columns, torch.uint8, (capacity, row_bytes(d_out, call.column_bits)))
    low = row_bytes(d_out, call.column_low_bits)
    _check(call, "column_refinements", call.column_refinements, torch.uint8, (capacity, low))
    if call.biases is not None:
        _check(call, "biases", call.biases, call.x.dtype, (capacity, k))
    _check(call, "norms", call.norms, torch.bfloat16, (capacity, k))
    _check(call, "noise", call.noise, torch.float32, (k,))
    _check(call, "thresholds", call.thresholds, torch.float32, (k + 2,))
    if call.fold is not None and call.surrogate is not None:
        _check(call, "surrogate", call.surrogate, torch.bfloat16, (capacity, k + 1))
        _check(call, "fold", call.fold, torch.uint8, (d_out, row_bytes(d, call.fold_bits)))


def check_listed(call: CodedFFN) -> None:
    """Checks the number of listed neurons, which synchronises with their device.

    Raises:
        PlanMismatchError: there is no room for so many.
    """
    listed = int(call.listed)
    if not 0 <= listed <= len(call.columns):
        raise PlanMismatchError(f"a plan lists {listed} neurons, with room for {len(call.columns)}: calibrate again")


def _check(call: CodedFFN, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_tensor(f"{name} of a rewritten FFN", tensor, dtype, shape, call.x.device)


def check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuses a tensor with the wrong dtype, shape, layout or device.

    Raises:
        PlanMismatchError: it has.
    """
    if tensor.shape != shape or tensor.dtype is not dtype:
        raise PlanMismatchError(
            f"{name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}, but the op takes {dtype} of shape"
            f" {tuple(shape)}: the plan does not fit these weights"
        )
    if tensor.device != device or tensor.layout is not torch.strided:
        raise PlanMismatchError(
            f"{name} is {tensor.layout} on {tensor.device}, but its input is on {device}:"
            " move the whole model to one device, and compile it again"
        )
