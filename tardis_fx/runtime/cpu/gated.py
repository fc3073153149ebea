"""The correction op of gated sites on a CPU, by the kernel that :mod:`tardis_fx.runtime.cpu.op` builds."""

import struct

import torch
from torch import Tensor

from tardis_fx.runtime import reference_gated
from tardis_fx.runtime.arguments import check_gated, check_lists
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import op as cpu

_CALL = struct.Struct("37q")  # of the kernel: that of a plain site, four pointers and an integer


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

    The kernel takes what that of plain sites takes (:func:`tardis_fx.runtime.cpu.op.correct`); arguments and result are
    those of the reference, which does the rest.
    """
    plan = (counts, neurons, codes, scale, zero, biases, guard, surrogate)
    sizes = check_gated(folded, x, gate, up, w2t, *plan, bits, activation, fold, fold_bits, row_bits)
    d, d_out = x.shape[-1], folded.shape[-1]
    tokens = x.numel() // max(1, d)
    weights = (folded, gate, up, w2t) if row_bits == 16 else (folded,)
    kernel = cpu.kernel_for(x, tokens, weights if fold_bits != 16 else (*weights, fold))
    if kernel is None:
        check_lists(counts, neurons, w2t.shape[0], row_bits)
        return reference_gated.correct(folded, x, gate, up, w2t, *plan, bits, activation, fold, fold_bits, row_bits)
    # By name, since the copies must outlive the call.
    gate, gate_stride = cpu.rows_apart(gate)
    up, up_stride = cpu.rows_apart(up)
    w2t, w2t_stride = cpu.rows_apart(w2t)
    folded, x = folded.contiguous(), x.contiguous()
    given = [None if tensor is None else tensor.contiguous() for tensor in (*plan, fold)]
    *own, own_biases, own_guard, own_surrogate, own_fold = [0 if t is None else t.data_ptr() for t in given]
    out = torch.empty_like(x) if d == d_out else x.new_empty((*x.shape[:-1], d_out))
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
        d,
        d_out,
        w2t.shape[0],
        neurons.shape[0],
        scale.shape[2],
        sizes.column_groups,
        up_stride,
        w2t_stride,
        bits,
        cpu_build.activation_number(activation),
        fold_bits,
        row_bits,
        sizes.low,
        cpu.DTYPE_NUMBERS[x.dtype],
        torch.get_num_threads(),
        gate.data_ptr(),
        own_biases,
        own_guard,
        own_surrogate,
        gate_stride,
    )
    if kernel.tardis_correct_gated(call):
        cpu.refuse(counts, neurons, w2t.shape[0], row_bits)
    return out
