"""The correction op on a CPU: calls ``kernel.cpp``, which :mod:`tardis_fx.runtime.cpu.build` compiles.

The kernel is compiled on the first call. It shares PyTorch's OpenMP runtime, because PyTorch is loaded first and both
ask for a library of the same name. Without a compiler the eager reference runs, after a warning.
"""

import struct

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, fx
from torch.nn import functional as F  # noqa: N812

from tardis_fx.runtime import reference
from tardis_fx.runtime.arguments import check, check_lists
from tardis_fx.runtime.correction import DTYPE_NUMBERS, Correction
from tardis_fx.runtime.cpu import build as cpu_build

_CALL = struct.Struct("33q")  # the kernel's argument: fifteen pointers and eighteen integers


def correct(call: Correction) -> Float[Tensor, "*tokens d_out"]:
    """Adds the exact terms of the predicted outliers: a fast :func:`tardis_fx.runtime.reference.correct`.

    The kernel takes up to ``MOST_TOKENS`` tokens of float32, bfloat16 or float16; the reference does the rest. Sums
    are computed in float32 and rounded once. Rows of projections and columns should be contiguous; otherwise the
    whole matrix is copied at every call. Gradients do not flow through it.
    """
    layout = check(call)
    d, d_out = call.x.shape[-1], call.folded.shape[-1]
    kernel = cpu_build.load() if call.has_kernel else None
    if kernel is None:
        check_lists(call)
        return reference.correct(call)
    # Bound to names, because copies must outlive the call.
    projections = [_rows_apart(matrix) for matrix in call.projections]
    columns, column_stride = _rows_apart(call.columns)
    folded, x = call.folded.contiguous(), call.x.contiguous()
    listed = [call.counts, call.neurons, call.codes, call.scale, call.zero, call.guard, call.surrogate]
    others = [None if tensor is None else tensor.contiguous() for tensor in (*listed, call.biases, call.fold)]
    (first, first_stride), (second, second_stride) = projections[0], projections[-1]
    out = torch.empty_like(x) if d == d_out else x.new_empty((*x.shape[:-1], d_out))
    tensors = [out, folded, x, first, second, columns, *others]
    packed = _CALL.pack(
        *[0 if tensor is None else tensor.data_ptr() for tensor in tensors],
        len(projections),
        x.numel() // d,
        d,
        d_out,
        columns.shape[0],
        call.neurons.shape[0],
        call.scale.shape[2],
        layout.column_groups,
        first_stride,
        second_stride,
        column_stride,
        call.bits,
        cpu_build.activation_number(call.activation),
        call.fold_bits,
        call.row_bits,
        layout.low,
        DTYPE_NUMBERS[x.dtype],
        torch.get_num_threads(),
    )
    if kernel.tardis_correct(packed):
        check_lists(call)
        raise AssertionError("the kernel refuses numbers that passed the argument checks")
    return out


def take_fold(output: fx.Node) -> None:
    """Makes the op at a rewritten site multiply with the folded weight, instead of a linear layer before it.

    For a product of few rows, Inductor calls a library that reads the weight at half the speed.
    """
    corrected = output.args[0] if output.target is torch.reshape else output
    assert isinstance(corrected, fx.Node)
    if corrected.target is not torch.ops.tardis.correct:
        return
    call = Correction(*corrected.args)  # type: ignore[arg-type]  # nodes stand for tensors
    folded = call.folded
    if isinstance(folded, fx.Node) and folded.target is F.linear and call.fold is None and len(folded.users) == 1:
        _, weight, bias = folded.args
        corrected.args = tuple(call._replace(folded=bias, fold=weight))
        corrected.graph.erase_node(folded)


def _rows_apart(matrix: Shaped[Tensor, "h row"]) -> tuple[Shaped[Tensor, "h row"], int]:
    """A matrix with contiguous rows, copied if necessary, and its row stride."""
    far, near = matrix.stride()
    return (matrix, far) if near == 1 else (matrix.contiguous(), matrix.shape[1])
