# mypy: ignore-errors
"""The Triton kernels that read whole matrices of codes: the predictor and the quantised fold.

``correct`` in reference.py specifies what the kernels compute; :mod:`tardis_fx.runtime.cuda.op` launches them. A kernel
writes each of its output arrays completely, in an order that does not depend on timing, and never accumulates in
memory: results repeat bit for bit, autotuning may run a kernel twice, and stale memory does not matter. Sums are in
float32.

Arguments in capitals are known at compile time: K, projections per neuron; D and D_OUT, columns; TOKENS, ROWS and
BLOCKS, numbers processed together; TILE, their product; GROUP, columns that share a scale; BITS, of a code; BIASED,
whether there are biases; ACTIVATION, its name. ``tokens`` is the number of tokens.
"""

import triton
import triton.language as tl

from tardis_fx.runtime.cuda.activations import activation
from tardis_fx.runtime.cuda.codes import products_of_joined, products_of_split
from tardis_fx.runtime.cuda.tuning import space


@triton.autotune(
    space(({"TILE": 256}, 4), ({"TILE": 512}, 4), ({"TILE": 512}, 8), ({"TILE": 1024}, 8)),
    key=["K", "D", "TOKENS", "BITS"],
    cache_results=True,
)
@triton.jit
def predict(
    x, counts, neurons, codes, scale, zero, biases, guard, positions, chosen, masks, sizes, estimates, tokens,
    K: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    BITS: tl.constexpr, KEPT: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Estimates pre-activations and lists outliers in order; each program handles ROWS positions.

    Args:
        x: [tokens, D].
        counts: [2], int64: listed, guarded.
        neurons: [capacity], int32.
        codes: [capacity, K, packed bytes], uint8.
        scale: [capacity, K, groups], float16.
        zero: [capacity, K, groups], uint8.
        biases: [capacity, K], float32; ignored unless BIASED.
        guard: [capacity, 2 or K + 2], float32: bounds, or a plane and a threshold.
        positions: [segments, ROWS], int32, written: the outliers, as the first ``sizes`` entries of each segment.
        chosen: [segments, ROWS], int32, written likewise: their neurons.
        masks: [segments, ROWS], int32, written likewise: bit t is set if it is an outlier of token t.
        sizes: [segments], int32, written.
        estimates: [tokens, K, segments, ROWS], float32, written if KEPT, for segments with guarded positions.
        KEPT: whether rows of projections are nested in the predictor, and need its estimates.
    """
    BLOCKS: tl.constexpr = TILE // (ROWS * TOKENS)
    segment = tl.program_id(0)
    position = segment * ROWS + tl.arange(0, ROWS)
    listed, guarded = tl.load(counts), tl.load(counts + 1)
    tested = position < guarded
    mask = tl.where((position >= guarded) & (position < listed), (1 << tokens) - 1, 0)
    if segment * ROWS < guarded:
        first = tokens * 0
        while first < tokens:
            z_hat = ()
            for i in tl.static_range(K):
                z_hat += products_of_split(
                    x + first * D, codes, scale, zero, position * K + i, tested, tokens - first, D, TOKENS, GROUP, BITS,
                    BLOCKS,
                )  # fmt: skip
            for t in tl.static_range(TOKENS):
                z = ()
                for i in tl.static_range(K):
                    z += (z_hat[i * TOKENS + t],)
                outlier = outside(z, position, biases, guard, tested, K, BIASED, ACTIVATION)
                mask += (outlier & tested & (first + t < tokens)).to(tl.int32) << first + t
                if KEPT:
                    for i in tl.static_range(K):
                        at = estimates + ((first + t) * K + i) * tl.num_programs(0) * ROWS + position
                        tl.store(at, z[i], mask=first + t < tokens)
            first += TOKENS
    is_outlier = (mask != 0).to(tl.int32)
    # No store to data-dependent addresses: Inductor would assume that the weights are written to, and copy them.
    slot = tl.arange(0, ROWS)
    fills = (tl.cumsum(is_outlier, 0) - is_outlier)[None, :] == slot[:, None]
    fills = fills & (mask != 0)[None, :]
    neuron = tl.load(neurons + position, mask=position < listed, other=0)
    tl.store(positions + segment * ROWS + slot, tl.sum(tl.where(fills, position[None, :], 0), axis=1))
    tl.store(chosen + segment * ROWS + slot, tl.sum(tl.where(fills, neuron[None, :], 0), axis=1))
    tl.store(masks + segment * ROWS + slot, tl.sum(tl.where(fills, mask[None, :], 0), axis=1))
    tl.store(sizes + segment, tl.sum(is_outlier, axis=0))


@triton.jit
def outside(
    z, position, biases, guard, live, K: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Whether the guard decides to correct neurons.

    Args:
        z: K estimates without biases, [ROWS] each.
        position: [ROWS].
        live: [ROWS], whether to read the position.
    """
    if K == 1:
        low = tl.load(guard + 2 * position, mask=live, other=0)
        high = tl.load(guard + 2 * position + 1, mask=live, other=0)
        return (z[0] < low) | (z[0] > high)
    else:
        plane = guard + (K + 2) * position
        score = surrogate_error(biased(z, position, biases, live, K, BIASED), plane, live, K, ACTIVATION)
        return tl.abs(score) > tl.load(plane + K + 1, mask=live, other=0)


@triton.jit
def biased(z, position, biases, live, K: tl.constexpr, BIASED: tl.constexpr):
    """Pre-activations with their biases; arguments as in :func:`outside`."""
    with_biases = ()
    for i in tl.static_range(K):
        if BIASED:
            with_biases += (z[i] + tl.load(biases + K * position + i, mask=live, other=0),)
        else:
            with_biases += (z[i],)
    return with_biases


@triton.jit
def surrogate_error(z, affine, live, K: tl.constexpr, ACTIVATION: tl.constexpr):
    """Response minus affine surrogate of neurons.

    Args:
        z: K pre-activations.
        affine: pointers to K slopes and the intercept.
        live: whether to read them.
    """
    response = activation(z[0], ACTIVATION)
    surrogate = tl.load(affine, mask=live, other=0) * z[0]
    for i in tl.static_range(1, K):
        response *= z[i]
        surrogate += tl.load(affine + i, mask=live, other=0) * z[i]
    return response - (surrogate + tl.load(affine + K, mask=live, other=0))


@triton.autotune(
    space(
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
    D: tl.constexpr, D_OUT: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Multiplies with a matrix of codes; each program takes ROWS rows.

    Args:
        x: [tokens, D].
        weight: D_OUT rows of ``packing.join``.
        out: [tokens, D_OUT], float32, written.
        stride: bytes from one row to the next.
    """
    BLOCKS: tl.constexpr = TILE // (ROWS * TOKENS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pointers = weight + row.to(tl.int64) * stride
    first = tokens * 0
    while first < tokens:
        products = products_of_joined(
            x + first * D, pointers, row < D_OUT, tokens - first, D, TOKENS, GROUP, BITS, BLOCKS
        )  # fmt: skip
        for t in tl.static_range(TOKENS):
            into = out + (first + t) * D_OUT + row
            tl.store(into, products[t], mask=(row < D_OUT) & (first + t < tokens))
        first += TOKENS
