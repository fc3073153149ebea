"""Codes that index a table of levels, with one scale for each row of a matrix.

A weight is ``scale * level``. Up to 4 bits, the levels are those with the least squared error for a Gaussian variable
(Lloyd, "Least squares quantization in PCM", 1982; Max, 1960), which rotated weights resemble; from 5 bits on, they are
equally spaced. Up to 7 bits, all are multiples of 1/128, so that a kernel can look them up as 8-bit integers; with 8
bits, they are odd multiples of 1/256. A row of a matrix is one run of bytes: codes in the layout of
:mod:`tardis_fx.runtime.packing`, then the scale, float16.
"""

from functools import cache

import torch
from jaxtyping import Float, Float16, Float32, UInt8
from torch import Tensor

from tardis_fx.runtime.packing import pack, packed_bytes, unpack

#: Positive levels of the Gaussian tables, as multiples of 1/128, by bits per weight.
_GAUSSIAN = {1: (127,), 2: (38, 127), 3: (14, 45, 79, 127), 4: (6, 18, 31, 44, 58, 75, 96, 127)}
#: Standard deviations of a Gaussian variable at which the largest level has the least squared error, by bits.
PEAKS = {1: 0.8, 2: 1.51, 3: 2.15, 4: 2.73, 5: 3.0, 6: 3.33, 7: 3.64, 8: 3.94}


@cache
def levels(bits: int) -> Float32[Tensor, " levels"]:
    """The levels of codes of ``bits`` bits, in rising order."""
    if bits in _GAUSSIAN:
        positive = torch.tensor(_GAUSSIAN[bits], dtype=torch.float32, device="cpu")
        return torch.cat([-positive.flip(0), positive]) / 128
    count = 2**bits
    steps: Tensor = 2 * torch.arange(count, dtype=torch.float32, device="cpu") - (count - 1)
    table: Tensor = steps / count
    return table


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one row of ``columns`` codes with its scale."""
    return packed_bytes(columns, bits) + 2


def join(
    codes: UInt8[Tensor, "rows columns"], scale: Float16[Tensor, " rows"], bits: int
) -> UInt8[Tensor, "rows row_bytes"]:
    """Rows of codes, each below ``2**bits``, with their scales."""
    return torch.cat([pack(codes, bits), scale[:, None].contiguous().view(torch.uint8)], 1)


def scales(rows: UInt8[Tensor, "rows row_bytes"]) -> Float16[Tensor, " rows"]:
    """The scales of rows."""
    return rows[:, -2:].clone(memory_format=torch.contiguous_format).view(torch.float16)[:, 0]


def weights(
    rows: UInt8[Tensor, "rows row_bytes"], bits: int, columns: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows {columns}"]:
    """The matrix that rows of ``columns`` codes stand for."""
    codes = unpack(rows[:, :-2].contiguous(), bits, columns)
    table = levels(bits).to(rows.device, dtype)
    matrix: Tensor = table[codes.int()] * scales(rows).to(dtype)[:, None]
    return matrix
