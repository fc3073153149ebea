"""Memory layout of low-bit codes: 2-bit planes, high bits first, in blocks of 64 columns.

A block of 64 codes of ``bits`` bits is stored as ``bits // 2`` planes of 16 bytes, each holding two bits of every
code, and, if ``bits`` is odd, one plane of 8 bytes with the lowest bit. Byte ``k`` of a 2-bit plane holds the codes
of columns ``k, k + 16, k + 32, k + 48``, the first in its lowest bits: one 16-byte load, three shifts and a mask give
64 codes in order. Byte ``k`` of a 1-bit plane holds the columns ``8k .. 8k + 7``, the first in its lowest bit.

A scale and a zero point belong to a group: half a block, one block, or two adjacent blocks. The number of scales in a
row determines which.

If the rows of a matrix are not read in order, each row is one run of bytes: codes, then the scales of its groups,
float16, then their zero points, uint8.

Low-bit rows of projections are nested in the predictor: its codes are the high planes. The row that a correction reads
holds the low planes, which are codes, with their own scale, of the predictor's residual.
"""

import torch
from jaxtyping import Float16, Shaped, UInt8
from torch import Tensor

#: Number of columns in a block.
BLOCK = 64
#: Numbers of columns that may share a scale and a zero point.
GROUP_SIZES = (BLOCK // 2, BLOCK, 2 * BLOCK)


def block_count(columns: int) -> int:
    """Number of blocks that ``columns`` columns take, the last one padded."""
    return -(-columns // BLOCK)


def group_count(columns: int, group_size: int) -> int:
    """Number of groups that ``columns`` columns take; the last one may have fewer."""
    return -(-columns // group_size)


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row of ``columns`` codes: 8 per bit and block."""
    return block_count(columns) * bits * BLOCK // 8


def row_bytes(columns: int, bits: int, group_size: int) -> int:
    """Bytes of one row of ``columns`` codes with its scales and zero points."""
    return packed_bytes(columns, bits) + 3 * group_count(columns, group_size)


def groups_of_row(length: int, bits: int, columns: int) -> int:
    """Number of groups of a row of ``length`` bytes: the inverse of :func:`row_bytes`."""
    return (length - packed_bytes(columns, bits)) // 3


def group_width(columns: int, groups: int) -> int:
    """Number of columns that share a scale in rows of ``columns`` codes and ``groups`` scales."""
    return next(size for size in GROUP_SIZES if group_count(columns, size) == groups)


def spread(values: Shaped[Tensor, "rows groups"], columns: int) -> Shaped[Tensor, "rows {columns}"]:
    """Repeats scales or zero points for every column of their group."""
    return values.repeat_interleave(group_width(columns, values.shape[1]), dim=1)[:, :columns]


def low_bits(bits: int, row_bits: int) -> int:
    """Bits per weight of the low planes that extend the predictor's ``bits`` to a row of ``row_bits``; at least 2.

    One bit has no code near zero, and would add more error than it removes.
    """
    return max(2, row_bits - bits)


def join(
    codes: UInt8[Tensor, "rows packed"], scale: Float16[Tensor, "rows groups"], zero: UInt8[Tensor, "rows groups"]
) -> UInt8[Tensor, "rows row_bytes"]:
    """Joins packed codes, scales and zero points so that each row is one run of bytes."""
    return torch.cat([codes, scale.contiguous().view(torch.uint8), zero], dim=1)


def split(
    rows: UInt8[Tensor, "rows row_bytes"], bits: int, columns: int
) -> tuple[UInt8[Tensor, "rows packed"], Float16[Tensor, "rows groups"], UInt8[Tensor, "rows groups"]]:
    """The inverse of :func:`join` for rows of ``columns`` codes."""
    groups = groups_of_row(rows.shape[1], bits, columns)
    codes, scale, zero = rows.split([packed_bytes(columns, bits), 2 * groups, groups], dim=1)
    scale = scale.clone(memory_format=torch.contiguous_format)  # contiguous() would keep the stride of a single row
    return codes.contiguous(), scale.view(torch.float16), zero


def pack(codes: UInt8[Tensor, "rows columns"], bits: int) -> UInt8[Tensor, "rows packed"]:
    """Packs rows of codes, each below ``2**bits``, into bit planes."""
    rows, columns = codes.shape
    blocks = block_count(columns)
    padded = torch.zeros(rows, blocks * BLOCK, dtype=torch.uint8, device=codes.device)
    padded[:, :columns] = codes
    padded = padded.view(rows, blocks, BLOCK)
    planes = []
    for shift in range(bits - 2, -1, -2):
        quarters = (padded >> shift & 3).view(rows, blocks, 4, 16)
        planes.append(quarters[:, :, 0] | quarters[:, :, 1] << 2 | quarters[:, :, 2] << 4 | quarters[:, :, 3] << 6)
    if bits % 2:
        ones = (padded & 1).view(rows, blocks, 8, 8)
        planes.append((ones << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1).to(torch.uint8))
    return torch.cat(planes, dim=-1).view(rows, packed_bytes(columns, bits))


def unpack(packed: UInt8[Tensor, "rows packed"], bits: int, columns: int) -> UInt8[Tensor, "rows {columns}"]:
    """The inverse of :func:`pack` for ``columns`` columns."""
    rows, blocks = len(packed), block_count(columns)
    packed = packed.view(rows, blocks, bits * BLOCK // 8)
    codes = torch.zeros(rows, blocks, BLOCK, dtype=torch.uint8, device=packed.device)
    for plane, shift in enumerate(range(bits - 2, -1, -2)):
        quarters = packed[:, :, 16 * plane : 16 * plane + 16]
        codes |= torch.cat([quarters >> 2 * k & 3 for k in range(4)], dim=-1) << shift
    if bits % 2:
        ones = packed[:, :, -8:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        codes |= ones.view(rows, blocks, BLOCK)
    return codes.view(rows, blocks * BLOCK)[:, :columns]
