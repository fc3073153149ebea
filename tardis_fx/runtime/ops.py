"""The ``torch.library`` ops that rewritten graphs call: opaque to Dynamo and Inductor, with fake implementations.

Every implementation checks its arguments (:mod:`tardis_fx.runtime.arguments`), the fake ones too, so that what does not
fit fails when it is traced.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tardis_fx.runtime import reference, reference_gated
from tardis_fx.runtime.arguments import check, check_codes, check_devices, check_gated, check_lists
from tardis_fx.runtime.cpu import gated as cpu_gated
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.cuda import dispatch as cuda
from tardis_fx.runtime.touched import Touched, counted


def _checked(
    correct: Callable[..., Tensor], check_call: Callable[..., object], row_bits: int | None = None
) -> Callable[..., Tensor]:
    """An implementation that checks its arguments; with the position of ``row_bits``, values of the list as well."""

    def run(*args: Any) -> Tensor:
        check_call(*args)
        check_devices(args[1], *(a for a in args if isinstance(a, Tensor)))
        if row_bits is not None:
            _, _, _, _, w2t, counts, neurons, *_ = args
            check_lists(counts, neurons, w2t.shape[0], args[row_bits] if len(args) > row_bits else 16)
        return correct(*args)

    return run


# Held for the life of the process: dropping it takes its ops away. Library.impl dispatches faster than custom_op.
_LIBRARY = torch.library.Library("tardis", "DEF")
_LIBRARY.define(
    "correct(Tensor folded, Tensor x, Tensor w1, Tensor? b1, Tensor w2t, Tensor counts, Tensor neurons, Tensor codes, "
    "Tensor scale, Tensor zero, Tensor lower, Tensor upper, Tensor slope, Tensor intercept, int bits, str activation, "
    "Tensor? fold=None, int fold_bits=16, int row_bits=16) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_LIBRARY.impl("correct", counted(_checked(reference.correct, check, 18), Touched.add), "CompositeExplicitAutograd")
_LIBRARY.impl("correct", counted(cpu.correct, Touched.add), "CPU")
_LIBRARY.impl("correct", counted(_checked(cuda.correct, check), Touched.add), "CUDA")
_LIBRARY.define(
    "correct_gated(Tensor folded, Tensor x, Tensor gate, Tensor up, Tensor w2t, Tensor counts, Tensor neurons, "
    "Tensor codes, Tensor scale, Tensor zero, Tensor? biases, Tensor guard, Tensor surrogate, int bits, "
    "str activation, Tensor? fold=None, int fold_bits=16, int row_bits=16) -> Tensor",
    # On a CUDA device the reference waits for the device, which no CUDA graph can hold.
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.cudagraph_unsafe),
)
_LIBRARY.impl(
    "correct_gated",
    counted(_checked(reference_gated.correct, check_gated, 17), Touched.add_gated),
    "CompositeExplicitAutograd",
)
_LIBRARY.impl("correct_gated", counted(cpu_gated.correct, Touched.add_gated), "CPU")
_LIBRARY.impl("correct_gated", counted(_checked(cuda.correct_gated, check_gated, 17), Touched.add_gated), "CUDA")
_LIBRARY.define(
    "dequantise(Tensor codes, Tensor scale, Tensor zero, int bits, int columns, ScalarType dtype) -> Tensor"
)


def _dequantise(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    check_codes(codes, scale, zero, bits, columns, dtype)
    return reference.dequantise(codes, scale, zero, bits, columns, dtype)


def _dequantise_fake(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    check_codes(codes, scale, zero, bits, columns, dtype)
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


def _fake(folded: Tensor, x: Tensor, *_: object) -> Tensor:
    return folded.new_empty((*x.shape[:-1], folded.shape[-1]))


_LIBRARY.impl("dequantise", _dequantise, "CompositeExplicitAutograd")
torch.library.register_fake("tardis::correct", _checked(_fake, check), lib=_LIBRARY)
torch.library.register_fake("tardis::correct_gated", _checked(_fake, check_gated), lib=_LIBRARY)
torch.library.register_fake("tardis::dequantise", _dequantise_fake, lib=_LIBRARY)
