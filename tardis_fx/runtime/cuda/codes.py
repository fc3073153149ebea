# mypy: ignore-errors
"""Rows of codes in Triton: decoding, and products with tokens. packing.py defines the layout.

Tiles are [ROWS, BLOCKS, 16]: sixteen columns, a quarter of a block, of some blocks of some rows. So one thread reads
the 16 bytes of a plane at once and keeps them. A weight is ``scale * (code - zero)``.

Sizes in capitals: D, columns; TOKENS, leading tokens to multiply at most; BLOCKS, blocks processed together; GROUP,
columns that share a scale; BITS, bits of a code.
"""

import triton
import triton.language as tl


@triton.jit
def pairs_of(blocks, present, PLANE: tl.constexpr):
    """Bytes of a plane of two bits per code, [ROWS, BLOCKS, 16]: byte k has columns k, k + 16, k + 32, k + 48.

    Only this function and :func:`singles_of` know the layout of codes.

    Args:
        blocks: [ROWS, BLOCKS], pointers to the first byte of each block.
        present: [ROWS, BLOCKS], whether to read it; zeros otherwise.
        PLANE: number of the plane, the highest bits first.
    """
    at = blocks[:, :, None] + 16 * PLANE + tl.arange(0, 16)[None, None, :]
    return tl.load(at, mask=present[:, :, None], other=0).to(tl.int32)


@triton.jit
def singles_of(blocks, present, QUARTER: tl.constexpr, BITS: tl.constexpr):
    """The lowest bits of codes of an odd number of bits, [ROWS, BLOCKS, 16]; arguments as in :func:`pairs_of`."""
    k = tl.arange(0, 16)[None, None, :]
    at = blocks[:, :, None] + BITS // 2 * 16 + 2 * QUARTER + k // 8
    return tl.load(at, mask=present[:, :, None], other=0).to(tl.int32) >> k % 8 & 1


@triton.jit
def codes_of(blocks, present, QUARTER: tl.constexpr, BITS: tl.constexpr):
    """Codes of a quarter as floats, [ROWS, BLOCKS, 16]; arguments as in :func:`pairs_of`."""
    codes = tl.zeros((blocks.shape[0], blocks.shape[1], 16), tl.int32)
    for plane in tl.static_range(BITS // 2):
        codes = codes * 4 + (pairs_of(blocks, present, plane) >> 2 * QUARTER & 3)
    if BITS % 2 == 1:
        codes = codes * 2 + singles_of(blocks, present, QUARTER, BITS)
    return codes.to(tl.float32)


@triton.jit
def scales_of(rows, column, present, D: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr):
    """Scales and zero points after the codes in rows of ``packing.join``, float32, [ROWS, BLOCKS] each.

    A scale may lie at an odd address, so it is read byte by byte.

    Args:
        rows: [ROWS], pointers.
        column: [BLOCKS], columns that they belong to.
        present: [ROWS, BLOCKS].
    """
    group, present = (column // GROUP)[None, :], present & (column < D)[None, :]
    at = rows[:, None] + (D + 63) // 64 * (8 * BITS) + group
    low = tl.load(at + group, mask=present, other=0).to(tl.uint16)
    high = tl.load(at + group + 1, mask=present, other=0).to(tl.uint16)
    scale = (low | high << 8).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, tl.load(at + 2 * ((D + GROUP - 1) // GROUP), mask=present, other=0).to(tl.float32)


@triton.jit
def above_one(byte):
    """Puts a byte into the highest bits of the mantissa of a float between 1 and 2, as int32."""
    return byte << 15 | 0x3F800000


@triton.jit
def one_plus(byte, QUARTER: tl.constexpr):
    """``1 + pair / 4**(4 - QUARTER)``, by one bitwise operation on a byte from :func:`above_one`.

    Converting each code to float would take longer than reading it.
    """
    return (byte & (0x7F800000 | 3 << 15 + 2 * QUARTER)).to(tl.float32, bitcast=True)


@triton.jit
def quarter_of(x, block, live, D: tl.constexpr, FIRST: tl.constexpr, GROUP: tl.constexpr, QUARTER: tl.constexpr):
    """Sixteen columns of every block of a token, float32, [BLOCKS, 16]; zeros past the last column.

    Also zeros unless these columns of the block lie between ``FIRST`` and ``FIRST + GROUP``.
    """
    column = block[:, None] * 64 + 16 * QUARTER + tl.arange(0, 16)[None, :]
    live = live & (16 * QUARTER >= FIRST) & (16 * QUARTER < FIRST + GROUP)
    return tl.load(x + column, mask=(column < D) & live, other=0).to(tl.float32)


@triton.jit
def add_products(
    sums, x, block, codes, scale, zero, present, tokens, D: tl.constexpr, TOKENS: tl.constexpr, FIRST: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Sums plus the products of tokens with some blocks of rows of codes, or with halves of blocks.

    Args:
        sums: [ROWS, BLOCKS] for each token.
        x: pointer to [tokens, D].
        block: [BLOCKS], numbers of the blocks.
        codes: [ROWS, BLOCKS], pointers.
        scale: [ROWS, BLOCKS], float32.
        zero: [ROWS, BLOCKS], float32.
        present: [ROWS, BLOCKS].
        FIRST: first column of the scale in every block.
    """
    planes, singles, added = (), (), ()
    for plane in tl.static_range(BITS // 2):
        planes += (above_one(pairs_of(codes, present, plane)),)
    if BITS % 2 == 1:
        for quarter in tl.static_range(4):
            singles += (singles_of(codes, present, quarter, BITS).to(tl.float32),)
    for t in tl.static_range(TOKENS):
        x0 = quarter_of(x + t * D, block, t < tokens, D, FIRST, GROUP, 0)
        x1 = quarter_of(x + t * D, block, t < tokens, D, FIRST, GROUP, 1)
        x2 = quarter_of(x + t * D, block, t < tokens, D, FIRST, GROUP, 2)
        x3 = quarter_of(x + t * D, block, t < tokens, D, FIRST, GROUP, 3)
        y0, y1, y2, y3 = x0 * 256, x1 * 64, x2 * 16, x3 * 4  # undoes the division of one_plus
        ones = tl.sum(y0 + y1 + y2 + y3, axis=1)
        products = tl.zeros((codes.shape[0], codes.shape[1]), tl.float32)
        for plane in tl.static_range(BITS // 2):
            terms = y0[None] * one_plus(planes[plane], 0)
            terms += y1[None] * one_plus(planes[plane], 1)
            terms += y2[None] * one_plus(planes[plane], 2)
            terms += y3[None] * one_plus(planes[plane], 3)
            products = products * 4 + (tl.sum(terms, axis=2) - ones[None])
        if BITS % 2 == 1:
            terms = x0[None] * singles[0] + x1[None] * singles[1] + x2[None] * singles[2] + x3[None] * singles[3]
            products = products * 2 + tl.sum(terms, axis=2)
        inputs = tl.sum(x0 + x1 + x2 + x3, axis=1)
        added += (sums[t] + scale * (products - zero * inputs[None]),)
    return added


@triton.jit
def zero_sums(ROWS: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr):
    """Zeros, [ROWS, BLOCKS] for each token."""
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums += (tl.zeros((ROWS, BLOCKS), tl.float32),)
    return sums


@triton.jit
def sums_over_blocks(sums, TOKENS: tl.constexpr):
    """Sums over the blocks, [ROWS] for each token."""
    totals = ()
    for t in tl.static_range(TOKENS):
        totals += (tl.sum(sums[t], axis=1),)
    return totals


@triton.jit
def products_of_split(
    x, codes, scale, zero, row, live, tokens, D: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Products of tokens with rows whose codes, scales and zero points are separate matrices: [ROWS] for each token.

    Args:
        x: pointer to [tokens, D].
        codes: pointer to [rows, packed bytes].
        scale: pointer to [rows, groups], float16.
        zero: pointer to [rows, groups], uint8.
        row: [ROWS], row numbers.
        live: [ROWS], whether to read the row.
    """
    sums = zero_sums(row.shape[0], BLOCKS, TOKENS)
    for start in range(0, (D + 63) // 64, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        number = row.to(tl.int64)[:, None]
        packed = codes + (number * ((D + 63) // 64) + block[None, :]) * (8 * BITS)
        for first in tl.static_range(0, 64, GROUP):
            column = block * 64 + first
            group = number * ((D + GROUP - 1) // GROUP) + (column // GROUP)[None, :]
            present = live[:, None] & (column < D)[None, :]
            scales = tl.load(scale + group, mask=present, other=0).to(tl.float32)
            zeros = tl.load(zero + group, mask=present, other=0).to(tl.float32)
            sums = add_products(sums, x, block, packed, scales, zeros, present, tokens, D, TOKENS, first, GROUP, BITS)
    return sums_over_blocks(sums, TOKENS)


@triton.jit
def products_of_joined(
    x, rows, live, tokens, D: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Like :func:`products_of_split`, with rows of ``packing.join``; rows: [ROWS], pointers."""
    sums = zero_sums(rows.shape[0], BLOCKS, TOKENS)
    for start in range(0, (D + 63) // 64, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        present = live[:, None] & (block * 64 < D)[None, :]
        codes = rows[:, None] + block[None, :] * (8 * BITS)
        for first in tl.static_range(0, 64, GROUP):
            scale, zero = scales_of(rows, block * 64 + first, present, D, GROUP, BITS)
            sums = add_products(sums, x, block, codes, scale, zero, present, tokens, D, TOKENS, first, GROUP, BITS)
    return sums_over_blocks(sums, TOKENS)
