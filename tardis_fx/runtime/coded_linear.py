"""A linear layer in rotated codes: its arguments, their checks and the eager specification.

``tardis::coded_linear`` takes all but the input as one prepared tensor (:mod:`tardis_fx.runtime.cpu.coded_layout`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from tardis_fx.errors import PlanMismatchError
from tardis_fx.runtime import tables
from tardis_fx.runtime.coded_arguments import check_tensor
from tardis_fx.runtime.coded_reference import rounded
from tardis_fx.runtime.reference import compute_dtype

#: Rows that the reference dequantises together: the head of a language model has a row for every token.
TOGETHER = 4096


class CodedLinear(NamedTuple):
    """A call; the input is rounded to 8 bits, or to 16 for codes of 8 bits.

    Attributes:
        x: the input.
        rows: codes of the weight for rotated inputs, in the layout of :mod:`tardis_fx.runtime.tables`.
        signs: of the rotation of the input.
        bias: of the dtype of ``x``, or None.
        bits: of ``rows``.
    """

    x: Float[Tensor, "*tokens d"]
    rows: UInt8[Tensor, "d_out row_bytes"]
    signs: Int8[Tensor, " d"]
    bias: Float[Tensor, " d_out"] | None
    bits: int

    @property
    def wide(self) -> bool:
        """Whether the input is rounded to 16 bits."""
        return self.bits == 8

    @property
    def bytes(self) -> int:
        """Weight bytes that every token reads."""
        return sum(tensor.nbytes for tensor in (self.rows, self.signs, self.bias) if tensor is not None)


def coded_linear(call: CodedLinear) -> Float[Tensor, "*tokens d_out"]:
    """Rotates and rounds the input, and multiplies it with the matrix that the codes stand for.

    Half precision is multiplied in float32.
    """
    dtype, d = compute_dtype(call.x.dtype), call.x.shape[-1]
    x = rounded(call.x.reshape(-1, d).float(), call.signs, wide=call.wide).to(dtype)
    parts = [x @ tables.weights(rows, call.bits, d, dtype).T for rows in call.rows.split(TOGETHER)]
    output = torch.cat(parts, -1)
    output = output if call.bias is None else output + call.bias.to(dtype)
    return output.to(call.x.dtype).view(*call.x.shape[:-1], len(call.rows))


def check(call: CodedLinear) -> None:
    """Checks the bits, and the shape, dtype and device of every tensor, before a kernel trusts them.

    Raises:
        PlanMismatchError: an argument does not fit the others, or the op does not take it.
    """
    if not 1 <= call.bits <= 8:
        raise PlanMismatchError(f"bits of a linear layer is {call.bits}; codes have 1 to 8 bits")
    if call.x.ndim < 1 or call.rows.ndim != 2:
        raise PlanMismatchError("a tensor of a linear layer in codes has the wrong number of axes")
    if not call.x.dtype.is_floating_point:
        raise PlanMismatchError(f"x of a linear layer has dtype {call.x.dtype}, but the op takes floating point")
    d, d_out = call.x.shape[-1], call.rows.shape[0]
    expected = {
        "x": (call.x.dtype, tuple(call.x.shape)),
        "rows": (torch.uint8, (d_out, tables.row_bytes(d, call.bits))),
        "signs": (torch.int8, (d,)),
        "bias": (call.x.dtype, (d_out,)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = getattr(call, name)
        if tensor is not None:
            check_tensor(f"{name} of a linear layer in codes", tensor, dtype, shape, call.x.device)
