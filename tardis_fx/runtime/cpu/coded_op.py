"""``tardis::coded_ffn`` on a CPU: calls ``coded.cpp``, which :mod:`tardis_fx.runtime.cpu.build` compiles."""

import struct

import torch
from jaxtyping import Float
from torch import Tensor

from tardis_fx.runtime import coded_reference
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.coded_arguments import check, check_listed
from tardis_fx.runtime.correction import DTYPE_NUMBERS
from tardis_fx.runtime.cpu import build as cpu_build

_CALL = struct.Struct("32q")  # the kernel's argument: eighteen pointers and fourteen integers


def coded_ffn(call: CodedFFN) -> Float[Tensor, "*tokens d_out"]:
    """The output of an FFN in codes: a fast :func:`tardis_fx.runtime.coded_reference.coded_ffn`.

    The kernel takes up to ``MOST_TOKENS`` tokens of float32, bfloat16 or float16; the reference does the rest, and
    everything without a compiler. Sums are computed in float32 and rounded once. Gradients do not flow through it.
    """
    check(call)
    kernel = cpu_build.load() if call.has_kernel else None
    if kernel is None:
        check_listed(call)
        return coded_reference.coded_ffn(call)
    d, k = call.x.shape[-1], len(call.projections)
    out = call.x.new_empty((*call.x.shape[:-1], call.bias.shape[0]))
    rows = [call.projections[0], call.projections[-1], call.refinements[0], call.refinements[-1]]
    rows += [call.columns, call.column_refinements]
    others = [call.biases, call.norms, call.noise, call.thresholds, call.surrogate, call.fold]
    # Bound to a name, because copies must outlive the call.
    tensors = [
        None if tensor is None else tensor.contiguous()
        for tensor in (out, call.x, call.bias, call.signs, call.out_signs, call.listed, *rows, *others)
    ]
    packed = _CALL.pack(
        *[0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        k,
        call.x.numel() // d,
        d,
        call.bias.shape[0],
        call.columns.shape[0],
        call.bits,
        call.low_bits,
        call.column_bits,
        call.column_low_bits,
        call.fold_bits,
        cpu_build.activation_number(call.activation),
        call.relative,
        DTYPE_NUMBERS[call.x.dtype],
        torch.get_num_threads(),
    )
    if kernel.tardis_coded_ffn(packed):
        check_listed(call)
        raise AssertionError("the kernel refuses numbers that passed the argument checks")
    return out
