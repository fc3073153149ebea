# mypy: ignore-errors
"""Rows of codes in Triton: how they are opened, and their products with tokens. The layout is packing.py's.

Tiles are [ROWS, GROUPS, 16]: sixteen columns, a quarter of a group, of some groups of some rows. So one thread reads
the 16 bytes of a plane at once and keeps to them. A weight is ``scale * (code - zero)``.
"""

import triton
import triton.language as tl


@triton.jit
def pairs_of(groups, present, PLANE: tl.constexpr):
    """Bytes of a plane of two bits a code, [ROWS, GROUPS, 16]: byte k has columns k, k + 16, k + 32, k + 48.

    With :func:`singles_of` the only place that knows where codes lie.

    Args:
        groups: [ROWS, GROUPS], pointers to the first byte of a group each.
        present: [ROWS, GROUPS], whether it is to be read; zeros otherwise.
        PLANE: its number, the highest bits first.
    """
    at = groups[:, :, None] + 16 * PLANE + tl.arange(0, 16)[None, None, :]
    return tl.load(at, mask=present[:, :, None], other=0).to(tl.int32)


@triton.jit
def singles_of(groups, present, QUARTER: tl.constexpr, BITS: tl.constexpr):
    """The lowest bits of codes of an odd number of bits, [ROWS, GROUPS, 16]; arguments as of :func:`pairs_of`."""
    k = tl.arange(0, 16)[None, None, :]
    at = groups[:, :, None] + BITS // 2 * 16 + 2 * QUARTER + k // 8
    return tl.load(at, mask=present[:, :, None], other=0).to(tl.int32) >> k % 8 & 1


@triton.jit
def codes_of(groups, present, QUARTER: tl.constexpr, BITS: tl.constexpr):
    """Codes of a quarter as floats, [ROWS, GROUPS, 16]; arguments as of :func:`pairs_of`."""
    codes = tl.zeros((groups.shape[0], groups.shape[1], 16), tl.int32)
    for plane in tl.static_range(BITS // 2):
        codes = codes * 4 + (pairs_of(groups, present, plane) >> 2 * QUARTER & 3)
    if BITS % 2 == 1:
        codes = codes * 2 + singles_of(groups, present, QUARTER, BITS)
    return codes.to(tl.float32)


@triton.jit
def scales_of(rows, group, present, D: tl.constexpr, BITS: tl.constexpr):
    """Scales and zero points behind the codes of rows of ``packing.join``, float32, [ROWS, GROUPS] twice.

    A scale may lie at an odd address, and is read byte by byte.

    Args:
        rows: [ROWS], pointers.
        group: [GROUPS], numbers of the groups.
        present: [ROWS, GROUPS].
        D: columns of a row.
        BITS: of a code.
    """
    GROUPS: tl.constexpr = (D + 63) // 64
    at = rows[:, None] + GROUPS * (8 * BITS) + group[None, :]
    low = tl.load(at + group[None, :], mask=present, other=0).to(tl.uint16)
    high = tl.load(at + group[None, :] + 1, mask=present, other=0).to(tl.uint16)
    scale = (low | high << 8).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, tl.load(at + 2 * GROUPS, mask=present, other=0).to(tl.float32)


@triton.jit
def above_one(byte):
    """A byte as the highest bits of the mantissa of a float between 1 and 2, still int32."""
    return byte << 15 | 0x3F800000


@triton.jit
def one_plus(byte, QUARTER: tl.constexpr):
    """``1 + pair / 4**(4 - QUARTER)``, by one logical operation from a byte of :func:`above_one`.

    A conversion to float for each code would take longer than reading it.
    """
    return (byte & (0x7F800000 | 3 << 15 + 2 * QUARTER)).to(tl.float32, bitcast=True)


@triton.jit
def quarter_of(x, group, live, D: tl.constexpr, QUARTER: tl.constexpr):
    """Sixteen columns of every group of a token, float32, [GROUPS, 16]; zeros beyond the last column."""
    column = group[:, None] * 64 + 16 * QUARTER + tl.arange(0, 16)[None, :]
    return tl.load(x + column, mask=(column < D) & live, other=0).to(tl.float32)


@triton.jit
def add_products(
    sums, x, group, codes, scale, zero, present, tokens, D: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr
):
    """Adds products of tokens with some groups of rows of codes.

    Args:
        sums: [ROWS, GROUPS] for each token.
        x: pointer to [tokens, D].
        group: [GROUPS], numbers of the groups.
        codes: [ROWS, GROUPS], pointers.
        scale: [ROWS, GROUPS], float32.
        zero: [ROWS, GROUPS], float32.
        present: [ROWS, GROUPS].
        tokens: number of tokens.
        D: number of columns.
        TOKENS: so many, the first, at the most.
        BITS: of a code.

    Returns:
        The new sums.
    """
    planes, singles, added = (), (), ()
    for plane in tl.static_range(BITS // 2):
        planes += (above_one(pairs_of(codes, present, plane)),)
    if BITS % 2 == 1:
        for quarter in tl.static_range(4):
            singles += (singles_of(codes, present, quarter, BITS).to(tl.float32),)
    for t in tl.static_range(TOKENS):
        x0 = quarter_of(x + t * D, group, t < tokens, D, 0)
        x1 = quarter_of(x + t * D, group, t < tokens, D, 1)
        x2 = quarter_of(x + t * D, group, t < tokens, D, 2)
        x3 = quarter_of(x + t * D, group, t < tokens, D, 3)
        y0, y1, y2, y3 = x0 * 256, x1 * 64, x2 * 16, x3 * 4  # what one_plus divides by
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
def nothing(ROWS: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr):
    """Zeros, [ROWS, GROUPS] for each token."""
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums += (tl.zeros((ROWS, GROUPS), tl.float32),)
    return sums


@triton.jit
def over_groups(sums, TOKENS: tl.constexpr):
    """The sums over the groups, [ROWS] for each token."""
    totals = ()
    for t in tl.static_range(TOKENS):
        totals += (tl.sum(sums[t], axis=1),)
    return totals


@triton.jit
def products_of_split(
    x, codes, scale, zero, row, live, tokens, D: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Products of tokens with rows whose codes, scales and zero points are matrices of their own.

    Args:
        x: pointer to [tokens, D].
        codes: pointer to [rows, packed bytes].
        scale: pointer to [rows, groups], float16.
        zero: pointer to [rows, groups], uint8.
        row: [ROWS], numbers.
        live: [ROWS], whether it is to be read.
        tokens: number of tokens.
        D: number of columns.
        TOKENS: so many, the first, at the most.
        BITS: of a code.
        GROUPS: taken together.

    Returns:
        [ROWS] for each token.
    """
    sums = nothing(row.shape[0], GROUPS, TOKENS)
    for start in range(0, (D + 63) // 64, GROUPS):
        group = start + tl.arange(0, GROUPS)
        at = row.to(tl.int64)[:, None] * ((D + 63) // 64) + group[None, :]
        present = live[:, None] & (group * 64 < D)[None, :]
        scales = tl.load(scale + at, mask=present, other=0).to(tl.float32)
        zeros = tl.load(zero + at, mask=present, other=0).to(tl.float32)
        packed = codes + at * (8 * BITS)
        sums = add_products(sums, x, group, packed, scales, zeros, present, tokens, D, TOKENS, BITS)
    return over_groups(sums, TOKENS)


@triton.jit
def products_of_joined(
    x, rows, live, tokens, D: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    """The same with rows of ``packing.join``; rows: [ROWS], pointers."""
    sums = nothing(rows.shape[0], GROUPS, TOKENS)
    for start in range(0, (D + 63) // 64, GROUPS):
        group = start + tl.arange(0, GROUPS)
        present = live[:, None] & (group * 64 < D)[None, :]
        scale, zero = scales_of(rows, group, present, D, BITS)
        codes = rows[:, None] + group[None, :] * (8 * BITS)
        sums = add_products(sums, x, group, codes, scale, zero, present, tokens, D, TOKENS, BITS)
    return over_groups(sums, TOKENS)
