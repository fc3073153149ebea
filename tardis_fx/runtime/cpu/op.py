"""The correction op on a CPU: calls ``kernel.cpp``, which :mod:`tardis_fx.runtime.cpu.build` compiles.

The kernel is compiled on the first call. It shares PyTorch's OpenMP runtime, because PyTorch is loaded first and both
ask for a library of the same name. Without a compiler the eager reference runs, after a warning.
"""

import ctypes
import struct
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from tardis_fx.runtime import reference
from tardis_fx.runtime.arguments import check, check_lists
from tardis_fx.runtime.cpu import build as cpu_build

#: More tokens than this are a prefill, for which the kernel's row by row work is not made; its arrays are this long.
DECODE_TOKENS = 16

#: How the kernel numbers dtypes.
DTYPE_NUMBERS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CALL = struct.Struct("32q")  # of the kernel: sixteen pointers and sixteen integers


def correct(
    folded: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2t: Tensor,
    counts: Tensor,
    neurons: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    lower: Tensor,
    upper: Tensor,
    slope: Tensor,
    intercept: Tensor,
    bits: int,
    activation: str,
    fold: Tensor | None = None,
    fold_bits: int = 16,
    row_bits: int = 16,
) -> Tensor:
    """Adds the exact terms of the predicted outliers: :func:`tardis_fx.runtime.reference.correct`, fast.

    The kernel takes up to ``DECODE_TOKENS`` tokens of float32, bfloat16 or float16; the reference does the rest. Sums
    are taken in float32 and rounded once. Rows of ``w1`` and ``w2t`` should be contiguous: others are copied, whole, at
    every call. Gradients do not flow through it. Arguments and result are those of the reference.
    """
    plan = (counts, neurons, codes, scale, zero, lower, upper, slope, intercept)
    sizes = check(folded, x, w1, b1, w2t, *plan, bits, activation, fold, fold_bits, row_bits)
    d, d_out = x.shape[-1], folded.shape[-1]
    tokens = x.numel() // max(1, d)
    weights = (folded, b1, w1, w2t) if row_bits == 16 else (folded, b1)
    kernel = kernel_for(x, tokens, weights if fold_bits != 16 else (*weights, fold))
    if kernel is None:
        check_lists(counts, neurons, w2t.shape[0], row_bits)
        return reference.correct(folded, x, w1, b1, w2t, *plan, bits, activation, fold, fold_bits, row_bits)
    # By name, since the copies must outlive the call.
    w1, w1_stride = rows_apart(w1)
    w2t, w2t_stride = rows_apart(w2t)
    folded, x = folded.contiguous(), x.contiguous()
    b1 = None if b1 is None else b1.contiguous()
    fold = None if fold is None else fold.contiguous()
    own = [tensor.contiguous() for tensor in plan]
    out = torch.empty_like(x) if d == d_out else x.new_empty((*x.shape[:-1], d_out))
    call = _CALL.pack(
        out.data_ptr(),
        folded.data_ptr(),
        x.data_ptr(),
        w1.data_ptr(),
        0 if b1 is None else b1.data_ptr(),
        w2t.data_ptr(),
        *[tensor.data_ptr() for tensor in own],
        0 if fold is None else fold.data_ptr(),
        tokens,
        d,
        d_out,
        w2t.shape[0],
        neurons.shape[0],
        scale.shape[1],
        sizes.column_groups,
        w1_stride,
        w2t_stride,
        bits,
        cpu_build.activation_number(activation),
        fold_bits,
        row_bits,
        sizes.low,
        DTYPE_NUMBERS[x.dtype],
        torch.get_num_threads(),
    )
    if kernel.tardis_correct(call):
        refuse(counts, neurons, w2t.shape[0], row_bits)
    return out


def refuse(counts: Tensor, neurons: Tensor, hidden: int, row_bits: int) -> NoReturn:
    """Says why the kernel refused a call; arguments as of :func:`tardis_fx.runtime.arguments.check_lists`."""
    check_lists(counts, neurons, hidden, row_bits)
    raise AssertionError("the kernel refuses numbers that its entry let pass")


def take_fold(output: fx.Node) -> None:
    """Makes the op at a rewritten site multiply with the folded weight, too, where a linear layer does it before.

    Inductor has a product of few rows done by a library that reads the weight at half the speed.
    """
    corrected = output.args[0] if output.target is torch.reshape else output
    assert isinstance(corrected, fx.Node)
    if corrected.target not in (torch.ops.tardis.correct, torch.ops.tardis.correct_gated):
        return
    folded, *rest = corrected.args
    at = [argument.name for argument in corrected.target.default._schema.arguments].index("fold")
    if isinstance(folded, fx.Node) and folded.target is F.linear and rest[at - 1] is None and len(folded.users) == 1:
        _, weight, bias = folded.args
        corrected.args = (bias, *rest[: at - 1], weight, *rest[at:])
        corrected.graph.erase_node(folded)


def kernel_for(x: Tensor, tokens: int, whole: Sequence[Tensor | None]) -> ctypes.CDLL | None:
    """The compiled functions, or None where they do not take such a call.

    Args:
        x: the tokens.
        tokens: how many.
        whole: the tensors that must be of its dtype.
    """
    dtype = x.dtype
    if not 0 < tokens <= DECODE_TOKENS or dtype not in DTYPE_NUMBERS:
        return None
    for tensor in whole:
        if tensor is not None and tensor.dtype is not dtype:
            return None
    return cpu_build.load()


def rows_apart(weight: Tensor) -> tuple[Tensor, int]:
    """A matrix whose rows are contiguous, copied if need be, and how many entries lie between their beginnings."""
    far, near = weight.stride()
    return (weight, far) if near == 1 else (weight.contiguous(), weight.shape[1])
