"""How low-bit codes lie in memory: 2-bit planes, high bits first, in groups of 64 columns.

A group of 64 codes of ``bits`` bits is stored as ``bits // 2`` planes of 16 bytes, each holding two bits of every
code, and, when ``bits`` is odd, one plane of 8 bytes with the lowest bit. Byte ``k`` of a 2-bit plane holds the codes
of columns ``k, k + 16, k + 32, k + 48``, the first in its lowest bits: one 16-byte load, three shifts and a mask give
64 codes in order. Byte ``k`` of a 1-bit plane holds the columns ``8k .. 8k + 7``, the first in its lowest bit.

A row that is read on its own, of a matrix whose rows are not read in order, is one run of bytes: codes, then the
scales of its groups, float16, then their zero points, uint8.

Rows of W1 in a few bits are nested in the predictor: its codes are the high planes, and the row that a correction reads
holds the low ones, which are codes, with a scale of their own, of what the predictor leaves.
"""

import torch
from torch import Tensor

#: Columns that share a scale and a zero point.
GROUP = 64


def group_count(columns: int) -> int:
    """Number of groups that ``columns`` columns take, the last one padded."""
    return -(-columns // GROUP)


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row of ``columns`` codes: 8 per bit and group."""
    return group_count(columns) * bits * GROUP // 8


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of one row of ``columns`` codes with its scales and zero points."""
    return packed_bytes(columns, bits) + 3 * group_count(columns)


def low_bits(bits: int, row_bits: int) -> int:
    """Bits a weight that a row of W1 holds beside a predictor's of ``bits``, for a row of ``row_bits``; at least 2.

    One bit has no code for what lies in the middle, and would add more error than it takes away.
    """
    return max(2, row_bits - bits)


def join(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Rows of packed codes, scales and zero points as single runs of bytes.

    Args:
        codes: [rows, packed bytes], uint8.
        scale: [rows, groups], float16.
        zero: [rows, groups], uint8.

    Returns:
        [rows, row bytes], uint8.
    """
    return torch.cat([codes, scale.contiguous().view(torch.uint8), zero], dim=1)


def split(rows: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`join`."""
    groups = rows.shape[1] // row_bytes(GROUP, bits)
    codes, scale, zero = rows.split([groups * bits * GROUP // 8, 2 * groups, groups], dim=1)
    whole = scale.clone(memory_format=torch.contiguous_format)  # contiguous() would keep the stride of a single row
    return codes.contiguous(), whole.view(torch.float16), zero


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs rows of codes.

    Args:
        codes: [rows, columns], uint8, every value below ``2**bits``.
        bits: 1 to 8.

    Returns:
        [rows, packed_bytes(columns, bits)], uint8.
    """
    rows, columns = codes.shape
    groups = group_count(columns)
    padded = torch.zeros(rows, groups * GROUP, dtype=torch.uint8, device=codes.device)
    padded[:, :columns] = codes
    padded = padded.view(rows, groups, GROUP)
    planes = []
    for shift in range(bits - 2, -1, -2):
        quarters = (padded >> shift & 3).view(rows, groups, 4, 16)
        planes.append(quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6)
    if bits % 2:
        ones = (padded & 1).view(rows, groups, 8, 8)
        planes.append((ones << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1).to(torch.uint8))
    return torch.cat(planes, dim=-1).view(rows, groups * bits * GROUP // 8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of :func:`pack`: [rows, packed bytes] to codes [rows, columns], uint8."""
    rows, groups = len(packed), group_count(columns)
    blocks = packed.view(rows, groups, bits * GROUP // 8)
    codes = torch.zeros(rows, groups, GROUP, dtype=torch.uint8, device=packed.device)
    for plane, shift in enumerate(range(bits - 2, -1, -2)):
        quarters = blocks[:, :, 16 * plane : 16 * plane + 16]
        codes |= torch.cat([quarters >> 2 * k & 3 for k in range(4)], dim=-1) << shift
    if bits % 2:
        ones = blocks[:, :, -8:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        codes |= ones.view(rows, groups, GROUP)
    return codes.view(rows, groups * GROUP)[:, :columns]
