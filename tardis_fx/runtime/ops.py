"""The ``torch.library`` ops that rewritten graphs call: opaque to Dynamo and Inductor, with fake implementations."""

import torch
from torch import Tensor

from tardis_fx.runtime import cpu, cpu_gated, cuda, reference, reference_gated
from tardis_fx.runtime.touched import Touched, counted

# Held for the life of the process: dropping it takes its ops away. Library.impl dispatches faster than custom_op.
_LIBRARY = torch.library.Library("tardis", "DEF")
_LIBRARY.define(
    "correct(Tensor folded, Tensor x, Tensor w1, Tensor? b1, Tensor w2t, Tensor counts, Tensor neurons, Tensor codes, "
    "Tensor scale, Tensor zero, Tensor lower, Tensor upper, Tensor slope, Tensor intercept, int bits, str activation, "
    "Tensor? fold=None, int fold_bits=16, int row_bits=16) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_LIBRARY.impl("correct", counted(reference.correct, Touched.add), "CompositeExplicitAutograd")
_LIBRARY.impl("correct", counted(cpu.correct, Touched.add), "CPU")
_LIBRARY.impl("correct", counted(cuda.correct, Touched.add), "CUDA")
_LIBRARY.define(
    "correct_gated(Tensor folded, Tensor x, Tensor gate, Tensor up, Tensor w2t, Tensor counts, Tensor neurons, "
    "Tensor codes, Tensor scale, Tensor zero, Tensor? biases, Tensor guard, Tensor surrogate, int bits, "
    "str activation, Tensor? fold=None, int fold_bits=16, int row_bits=16) -> Tensor",
    # On a CUDA device the reference waits for the device, which no CUDA graph can hold.
    tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.cudagraph_unsafe),
)
_LIBRARY.impl("correct_gated", counted(reference_gated.correct, Touched.add_gated), "CompositeExplicitAutograd")
_LIBRARY.impl("correct_gated", counted(cpu_gated.correct, Touched.add_gated), "CPU")
_LIBRARY.impl("correct_gated", counted(cuda.correct_gated, Touched.add_gated), "CUDA")
_LIBRARY.define(
    "dequantise(Tensor codes, Tensor scale, Tensor zero, int bits, int columns, ScalarType dtype) -> Tensor"
)
_LIBRARY.impl("dequantise", reference.dequantise, "CompositeExplicitAutograd")


def _correct_fake(folded: Tensor, x: Tensor, *_: object, **__: object) -> Tensor:
    return folded.new_empty((*x.shape[:-1], folded.shape[-1]))


def _dequantise_fake(
    codes: Tensor, _scale: Tensor, _zero: Tensor, _bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((codes.shape[0], columns), dtype=dtype)


torch.library.register_fake("tardis::correct", _correct_fake, lib=_LIBRARY)
torch.library.register_fake("tardis::correct_gated", _correct_fake, lib=_LIBRARY)
torch.library.register_fake("tardis::dequantise", _dequantise_fake, lib=_LIBRARY)
