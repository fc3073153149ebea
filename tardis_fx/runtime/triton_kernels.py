# mypy: ignore-errors
"""The Triton kernels of the correction op; :mod:`tardis_fx.runtime.triton_op` launches them.

What is computed is specified by ``correct`` in reference.py; the columns of a row go by groups of 64 and quarters of 16
(:mod:`tardis_fx.runtime.triton_codes`). Every array that a kernel writes it writes whole, in an order that does not
depend on timing, and no kernel adds to memory: results repeat bit for bit, autotuning may run a kernel twice, and what
old memory holds cannot matter.

Sizes in capitals are known at compile time: D and D_OUT, columns; TOKENS, ROWS and GROUPS, how many are taken
together; TILE, the product of them, with columns in the place of groups where rows are no codes. Sums are of float32.
"""

import os

import triton
import triton.language as tl

from tardis_fx.runtime.triton_activations import activation
from tardis_fx.runtime.triton_codes import codes_of, products_of_joined, products_of_split, scales_of

#: Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _space(*configs):
    """Configurations to choose from; the interpreter, which cannot time them, takes the last: the fewest steps."""
    return [triton.Config(sizes, num_warps=warps) for sizes, warps in (configs[-1:] if INTERPRETED else configs)]


@triton.autotune(
    _space(({"TILE": 256}, 4), ({"TILE": 512}, 4), ({"TILE": 512}, 8), ({"TILE": 1024}, 8)),
    key=["D", "TOKENS", "BITS"],
    cache_results=True,
)
@triton.jit
def predict(
    x, counts, neurons, codes, scale, zero, lower, upper, positions, chosen, masks, sizes, tokens,
    D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Estimates, tests and lists: each program the outliers among ROWS positions, in their order.

    Args:
        x: [tokens, D].
        counts: [2], int64: listed, guarded.
        neurons: [capacity], int32.
        codes: [capacity, packed bytes], uint8.
        scale: [capacity, groups], float16.
        zero: [capacity, groups], uint8.
        lower: [capacity], float32.
        upper: [capacity], float32.
        positions: [segments, ROWS], int32, written: the first ``sizes`` of each segment, outliers.
        chosen: [segments, ROWS], int32, written likewise: their neurons.
        masks: [segments, ROWS], int32, written likewise: bit t says whether token t has it.
        sizes: [segments], int32, written.
        tokens: number of tokens.
        D: see above, as are TOKENS, ROWS and TILE.
        TOKENS: see above.
        ROWS: see above.
        BITS: of a code.
        TILE: see above.
    """
    GROUPS: tl.constexpr = TILE // (ROWS * TOKENS)
    segment = tl.program_id(0)
    position = segment * ROWS + tl.arange(0, ROWS)
    listed, guarded = tl.load(counts), tl.load(counts + 1)
    tested = position < guarded
    low = tl.load(lower + position, mask=tested, other=0)
    high = tl.load(upper + position, mask=tested, other=0)
    mask = tl.where((position >= guarded) & (position < listed), (1 << tokens) - 1, 0)
    if segment * ROWS < guarded:
        first = tokens * 0
        while first < tokens:
            z_hat = products_of_split(
                x + first * D, codes, scale, zero, position, tested, tokens - first, D, TOKENS, BITS, GROUPS
            )
            for t in tl.static_range(TOKENS):
                outside = (z_hat[t] < low) | (z_hat[t] > high)
                mask += (outside & tested & (first + t < tokens)).to(tl.int32) << first + t
            first += TOKENS
    found = (mask != 0).to(tl.int32)
    # Not a store to places that depend on what was read: Inductor would take the weights for written to, and copy them.
    slot = tl.arange(0, ROWS)
    taken = (tl.cumsum(found, 0) - found)[None, :] == slot[:, None]
    taken = taken & (mask != 0)[None, :]
    neuron = tl.load(neurons + position, mask=position < listed, other=0)
    tl.store(positions + segment * ROWS + slot, tl.sum(tl.where(taken, position[None, :], 0), axis=1))
    tl.store(chosen + segment * ROWS + slot, tl.sum(tl.where(taken, neuron[None, :], 0), axis=1))
    tl.store(masks + segment * ROWS + slot, tl.sum(tl.where(taken, mask[None, :], 0), axis=1))
    tl.store(sizes + segment, tl.sum(found, axis=0))


@triton.autotune(
    _space(({"TILE": 1024}, 2), ({"TILE": 2048}, 4), ({"TILE": 2048}, 8), ({"TILE": 4096}, 8)),
    key=["D", "TOKENS", "BITS"],
    cache_results=True,
)
@triton.jit
def activate(
    x, w1, b1, slope, intercept, positions, chosen, masks, sizes, rows, residuals, count,
    tokens, w1_stride, capacity, segments,
    D: tl.constexpr, TOKENS: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, BITS: tl.constexpr,
    BIASED: tl.constexpr, ACTIVATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What the surrogate of every outlier misses; each program takes one outlier in so many as there are programs.

    The number of outliers is read here: programs beyond it do nothing.

    Args:
        x: [tokens, D].
        w1: [h, D], or rows of ``packing.join``, ``w1_stride`` elements or bytes apart.
        b1: [h]; anything where not BIASED.
        slope: [capacity], float32.
        intercept: [capacity], float32.
        positions: see :func:`predict`, as are chosen, masks and sizes.
        chosen: see above.
        masks: see above.
        sizes: see above.
        rows: [capacity], int32, written: neurons of the outliers, all segments' joined.
        residuals: [tokens, capacity], float32, written likewise: ``act(z) - slope z - intercept``, or 0.
        count: [1], int32, written: how many outliers there are.
        tokens: number of tokens.
        w1_stride: see above.
        capacity: length of the lists.
        segments: number of segments.
        D: see above, as are TOKENS and TILE.
        TOKENS: see above.
        SEGMENT: positions of a segment.
        SEGMENTS: segments, rounded up.
        BITS: of the codes of w1; 16 where they are none.
        BIASED: whether there is a bias.
        ACTIVATION: its name.
        TILE: see above.
    """
    COLUMNS: tl.constexpr = TILE // TOKENS
    program = tl.program_id(0)
    s = tl.arange(0, SEGMENTS)
    ends = tl.cumsum(tl.load(sizes + s, mask=s < segments, other=0), 0)
    total = tl.max(ends, axis=0)
    if program == 0:
        tl.store(count, total)
    i = program
    while i < total:
        before = ends <= i
        segment = tl.sum(before.to(tl.int32), axis=0)
        slot = segment * SEGMENT + i - tl.max(tl.where(before, ends, 0), axis=0)
        position, neuron, mask = tl.load(positions + slot), tl.load(chosen + slot), tl.load(masks + slot)
        row = w1 + neuron.to(tl.int64) * w1_stride
        first = tokens * 0
        while first < tokens:
            if BITS == 16:
                z = products_of_row(x + first * D, row, tokens - first, D, TOKENS, COLUMNS)
            else:
                only = tl.zeros((1,), tl.int32)
                z = products_of_joined(
                    x + first * D, row + only, only == 0, tokens - first, D, TOKENS, BITS, COLUMNS // 64
                )  # fmt: skip
            for t in tl.static_range(TOKENS):
                pre = tl.sum(z[t], axis=0)
                if BIASED:
                    pre += tl.load(b1 + neuron).to(tl.float32)
                surrogate = tl.load(slope + position) * pre + tl.load(intercept + position)
                missed = tl.where((mask >> first + t & 1) != 0, activation(pre, ACTIVATION) - surrogate, 0.0)
                tl.store(residuals + (first + t) * capacity + i, missed, mask=first + t < tokens)
            first += TOKENS
        tl.store(rows + i, neuron)
        i += tl.num_programs(0)


@triton.jit
def products_of_row(x, row, tokens, D: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """Products of tokens with a row that is stored as it is: [COLUMNS] for each token, still to be summed."""
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums += (tl.zeros((COLUMNS,), tl.float32),)
    for start in range(0, D, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        weight = tl.load(row + column, mask=column < D, other=0).to(tl.float32)
        added = ()
        for t in tl.static_range(TOKENS):
            inputs = tl.load(x + t * D + column, mask=(column < D) & (t < tokens), other=0).to(tl.float32)
            added += (sums[t] + inputs * weight,)
        sums = added
    return sums


@triton.autotune(
    _space(
        ({"GROUPS": 1, "TILE": 2048}, 4),
        ({"GROUPS": 2, "TILE": 2048}, 4),
        ({"GROUPS": 2, "TILE": 4096}, 4),
        ({"GROUPS": 4, "TILE": 4096}, 8),
    ),
    key=["D_OUT", "TOKENS", "BITS"],
    cache_results=True,
)
@triton.jit
def accumulate(
    w2t, rows, residuals, count, partial, tokens, w2t_stride, capacity,
    D_OUT: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The residuals of a share of the outliers times their rows of W2, in GROUPS groups of columns.

    Programs: [column blocks, shares]. Tiles are [rows, GROUPS, columns]: of plain rows all columns of a group, of codes
    those of a quarter.

    Args:
        w2t: [h, D_OUT], or rows of ``packing.join``, ``w2t_stride`` elements or bytes apart.
        rows: see :func:`activate`, as are residuals and count.
        residuals: see above.
        count: see above.
        partial: [shares, tokens, D_OUT], float32, written.
        tokens: number of tokens.
        w2t_stride: see above.
        capacity: length of the lists.
        D_OUT: see above, as are TOKENS and GROUPS.
        TOKENS: see above.
        BITS: of the codes of w2t; 16 where they are none.
        GROUPS: see above.
        TILE: tokens, rows and columns of a step.
    """
    ROWS: tl.constexpr = max(TILE // (TOKENS * GROUPS * 64), 1)
    QUARTERS: tl.constexpr = 1 if BITS == 16 else 4
    share, shares = tl.program_id(1), tl.num_programs(1)
    total = tl.load(count)
    start, end = total * share // shares, total * (share + 1) // shares
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 64 + tl.arange(0, 64 // QUARTERS)[None, :]
    first = tokens * 0
    while first < tokens:
        sums = ()
        for _ in tl.static_range(QUARTERS * TOKENS):
            sums += (tl.zeros((ROWS, GROUPS, 64 // QUARTERS), tl.float32),)
        done = start
        while done < end:
            i = done + tl.arange(0, ROWS)
            row = w2t + tl.load(rows + i, mask=i < end, other=0).to(tl.int64) * w2t_stride
            present = (i < end)[:, None] & (group * 64 < D_OUT)[None, :]
            added = ()
            for quarter in tl.static_range(QUARTERS):
                if BITS == 16:
                    at = row[:, None, None] + column[None]
                    weight = tl.load(at, mask=present[:, :, None] & (column < D_OUT)[None], other=0).to(tl.float32)
                else:
                    scale, zero = scales_of(row, group, present, D_OUT, BITS)
                    codes = codes_of(row[:, None] + group[None, :] * (8 * BITS), present, quarter, BITS)
                    weight = scale[:, :, None] * (codes - zero[:, :, None])
                for t in tl.static_range(TOKENS):
                    at = residuals + (first + t) * capacity + i
                    residual = tl.load(at, mask=(i < end) & (first + t < tokens), other=0)
                    added += (sums[quarter * TOKENS + t] + residual[:, None, None] * weight,)
            sums = added
            done += ROWS
        for quarter in tl.static_range(QUARTERS):
            for t in tl.static_range(TOKENS):
                at = column + 16 * quarter
                into = partial + (share * tokens + first + t) * D_OUT + at
                of_rows = tl.sum(sums[quarter * TOKENS + t], axis=0)
                tl.store(into, of_rows, mask=(at < D_OUT) & (first + t < tokens))
        first += TOKENS


@triton.autotune(
    _space(
        ({"ROWS": 16, "TILE": 256}, 2),
        ({"ROWS": 16, "TILE": 256}, 4),
        ({"ROWS": 16, "TILE": 512}, 4),
        ({"ROWS": 32, "TILE": 1024}, 8),
    ),
    key=["D", "TOKENS", "BITS"],
    cache_results=True,
)
@triton.jit
def multiply(
    x, weight, out, tokens, stride,
    D: tl.constexpr, D_OUT: tl.constexpr, TOKENS: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A product with a matrix of codes, ROWS rows of which each program takes.

    Args:
        x: [tokens, D].
        weight: rows of ``packing.join``, D_OUT of them.
        out: [tokens, D_OUT], float32, written.
        tokens: number of tokens.
        stride: bytes from a row to the next.
        D: see above, as are D_OUT, TOKENS, ROWS and TILE.
        D_OUT: see above.
        TOKENS: see above.
        BITS: of a code.
        ROWS: see above.
        TILE: see above.
    """
    GROUPS: tl.constexpr = TILE // (ROWS * TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pointers = weight + row.to(tl.int64) * stride
    first = tokens * 0
    while first < tokens:
        products = products_of_joined(
            x + first * D, pointers, row < D_OUT, tokens - first, D, TOKENS, BITS, GROUPS
        )  # fmt: skip
        for t in tl.static_range(TOKENS):
            into = out + (first + t) * D_OUT + row
            tl.store(into, products[t], mask=(row < D_OUT) & (first + t < tokens))
        first += TOKENS
