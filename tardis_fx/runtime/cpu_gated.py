"""The correction op of gated sites on a CPU, by the kernel that :mod:`tardis_fx.runtime.cpu` builds."""

import struct

import torch
from torch import Tensor

from tardis_fx.runtime import cpu, reference_gated
from tardis_fx.runtime.packing import groups_of_row, low_bits

_CALL = struct.Struct("35q")  # of the kernel: that of a plain site, four pointers and an integer


def correct(
    folded: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    w2t: Tensor,
    counts: Tensor,
    neurons: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    biases: Tensor | None,
    guard: Tensor,
    surrogate: Tensor,
    bits: int,
    activation: str,
    fold: Tensor | None = None,
    fold_bits: int = 16,
    row_bits: int = 16,
) -> Tensor:
    """Adds the exact terms of the predicted outliers: :func:`tardis_fx.runtime.reference_gated.correct`, fast.

    The kernel takes what that of plain sites takes (:func:`tardis_fx.runtime.cpu.correct`); arguments and result are
    those of the reference, which does the rest.
    """
    plan = (counts, neurons, codes, scale, zero, biases, guard, surrogate)
    tokens, whole = x.shape[:-1].numel(), (gate, up, w2t) if row_bits == 16 else ()
    kernel = cpu.kernel_for(x, activation, (folded, *whole, fold if fold_bits == 16 else None))
    if kernel is None:
        return reference_gated.correct(folded, x, gate, up, w2t, *plan, bits, activation, fold, fold_bits, row_bits)
    gate, up, w2t = (weight if weight.stride(1) == 1 else weight.contiguous() for weight in (gate, up, w2t))
    folded, x = folded.contiguous(), x.contiguous()
    # By name, since the copies must outlive the call.
    given = [None if tensor is None else tensor.contiguous() for tensor in (*plan, fold)]
    *own, own_biases, own_guard, own_surrogate, own_fold = (0 if t is None else t.data_ptr() for t in given)
    out = folded.new_empty((*x.shape[:-1], folded.shape[-1]))
    call = _CALL.pack(
        out.data_ptr(),
        folded.data_ptr(),
        x.data_ptr(),
        up.data_ptr(),
        0,
        w2t.data_ptr(),
        *own,
        0,
        0,
        0,
        0,
        own_fold,
        tokens,
        x.shape[-1],
        folded.shape[-1],
        scale.shape[2],
        0 if row_bits == 16 else groups_of_row(w2t.shape[1], row_bits, folded.shape[-1]),
        up.stride(0),
        w2t.stride(0),
        bits,
        cpu.ACTIVATION_NUMBERS[activation],
        fold_bits,
        row_bits,
        low_bits(bits, row_bits),
        cpu.DTYPE_NUMBERS[x.dtype],
        torch.get_num_threads(),
        gate.data_ptr(),
        own_biases,
        own_guard,
        own_surrogate,
        gate.stride(0),
    )
    kernel.tardis_correct_gated(call)
    return out
