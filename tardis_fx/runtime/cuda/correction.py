# mypy: ignore-errors
"""The Triton kernels that read outliers' rows of projections and columns, stored plain or as codes.

The conventions of :mod:`tardis_fx.runtime.cuda.predictor` apply, except that TILE counts columns instead of blocks.
"""

import triton
import triton.language as tl

from tardis_fx.runtime.cuda.codes import codes_of, products_of_joined, scales_of
from tardis_fx.runtime.cuda.predictor import biased, surrogate_error
from tardis_fx.runtime.cuda.tuning import space


@triton.autotune(
    space(({"TILE": 1024}, 2), ({"TILE": 2048}, 4), ({"TILE": 2048}, 8), ({"TILE": 4096}, 8)),
    key=["K", "D", "TOKENS", "BITS"],
    cache_results=True,
)
@triton.jit
def activate(
    x, first_projection, second_projection, biases, surrogate, positions, chosen, masks, sizes, estimates,
    rows, residuals, count, tokens, first_stride, second_stride, capacity, segments,
    K: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    GROUP: tl.constexpr, BITS: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Computes the residual of every outlier; program i takes outliers i, i + programs, and so on.

    The kernel reads the number of outliers; surplus programs do nothing.

    Args:
        x: [tokens, D].
        first_projection: [h, D], or low planes as rows of ``packing.join``, ``first_stride`` elements or bytes apart.
        second_projection: likewise, if K is 2.
        biases: [capacity, K], float32; ignored unless BIASED.
        surrogate: [capacity, K + 1], float32.
        positions: see :func:`tardis_fx.runtime.cuda.predictor.predict`, as are chosen, masks and sizes.
        estimates: likewise; read if BITS is below 16.
        rows: [capacity], int32, written: neurons of the outliers of all segments.
        residuals: [tokens, capacity], float32, written: response minus surrogate, or 0.
        count: [1], int32, written: number of outliers.
        capacity: length of the lists.
        segments: number of segments.
        SEGMENT: positions of a segment.
        SEGMENTS: segments, rounded up.
        GROUP: columns of a projection that share a scale.
        BITS: of the codes of projections; 16 without codes.
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
        first = tokens * 0
        while first < tokens:
            products = ()
            for p in tl.static_range(K):
                if p == 0:
                    row = first_projection + neuron.to(tl.int64) * first_stride
                else:
                    row = second_projection + neuron.to(tl.int64) * second_stride
                if BITS == 16:
                    products += products_of_row(x + first * D, row, tokens - first, D, TOKENS, COLUMNS)
                else:
                    single = tl.zeros((1,), tl.int32)
                    products += products_of_joined(
                        x + first * D, row + single, single == 0, tokens - first, D, TOKENS, GROUP, BITS, COLUMNS // 64
                    )  # fmt: skip
            for t in tl.static_range(TOKENS):
                z = ()
                for p in tl.static_range(K):
                    pre = tl.sum(products[p * TOKENS + t], axis=0)
                    if BITS < 16:
                        at = estimates + ((first + t) * K + p) * segments * SEGMENT + position
                        pre += tl.load(at, mask=first + t < tokens, other=0)
                    z += (pre,)
                live = (mask >> first + t & 1) != 0
                z = biased(z, position, biases, live, K, BIASED)
                residual = surrogate_error(z, surrogate + (K + 1) * position, live, K, ACTIVATION)
                at = residuals + (first + t) * capacity + i
                tl.store(at, tl.where(live, residual, 0.0), mask=first + t < tokens)
            first += TOKENS
        tl.store(rows + i, neuron)
        i += tl.num_programs(0)


@triton.jit
def products_of_row(x, row, tokens, D: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """Products of tokens with a plain row: [COLUMNS] for each token, not yet summed."""
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
    space(
        ({"BLOCKS": 1, "TILE": 2048}, 4),
        ({"BLOCKS": 2, "TILE": 2048}, 4),
        ({"BLOCKS": 2, "TILE": 4096}, 4),
        ({"BLOCKS": 4, "TILE": 4096}, 8),
    ),
    key=["D_OUT", "TOKENS", "BITS"],
    cache_results=True,
)
@triton.jit
def accumulate(
    weights, rows, residuals, count, partial, tokens, stride, capacity,
    D_OUT: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The residuals of a share of the outliers times their columns of ``down``, in BLOCKS blocks of 64 outputs.

    Programs: [blocks of outputs, shares]. Tiles are [rows, BLOCKS, outputs]: all outputs of a block for plain rows,
    those of a quarter for codes.

    Args:
        weights: [h, D_OUT], the columns, or rows of ``packing.join``, ``stride`` elements or bytes apart.
        partial: [shares, tokens, D_OUT], float32, written.
        capacity: length of the lists.
        GROUP: entries of a row that share a scale.
        BITS: of the codes; 16 without codes.
        TILE: tokens, rows and columns of a step.
    """
    ROWS: tl.constexpr = max(TILE // (TOKENS * BLOCKS * 64), 1)
    QUARTERS: tl.constexpr = 1 if BITS == 16 else 4
    share, shares = tl.program_id(1), tl.num_programs(1)
    total = tl.load(count)
    start, end = total * share // shares, total * (share + 1) // shares
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    column = block[:, None] * 64 + tl.arange(0, 64 // QUARTERS)[None, :]
    first = tokens * 0
    while first < tokens:
        sums = ()
        for _ in tl.static_range(QUARTERS * TOKENS):
            sums += (tl.zeros((ROWS, BLOCKS, 64 // QUARTERS), tl.float32),)
        done = start
        while done < end:
            i = done + tl.arange(0, ROWS)
            row = weights + tl.load(rows + i, mask=i < end, other=0).to(tl.int64) * stride
            present = (i < end)[:, None] & (block * 64 < D_OUT)[None, :]
            added = ()
            for quarter in tl.static_range(QUARTERS):
                if BITS == 16:
                    at = row[:, None, None] + column[None]
                    weight = tl.load(at, mask=present[:, :, None] & (column < D_OUT)[None], other=0).to(tl.float32)
                else:
                    scale, zero = scales_of(row, block * 64 + 16 * quarter, present, D_OUT, GROUP, BITS)
                    codes = codes_of(row[:, None] + block[None, :] * (8 * BITS), present, quarter, BITS)
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
                total_of_rows = tl.sum(sums[quarter * TOKENS + t], axis=0)
                tl.store(into, total_of_rows, mask=(at < D_OUT) & (first + t < tokens))
        first += TOKENS
