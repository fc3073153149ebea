"""The correction op as a ``triton_op``, which Inductor traces: it sees the kernels, and sums up with what follows."""

import torch
from torch import Tensor

from tardis_fx.runtime.arguments import check
from tardis_fx.runtime.cuda.correction import accumulate, activate
from tardis_fx.runtime.cuda.dispatch import eligible
from tardis_fx.runtime.cuda.predictor import multiply, predict
from tardis_fx.runtime.cuda.tuning import INTERPRETED
from tardis_fx.runtime.packing import BLOCK, group_width

if INTERPRETED:  # kernels are no JITFunction then, which is all that wrap_triton of PyTorch 2.11 takes

    def wrap_triton(kernel):  # type: ignore[no-untyped-def]  # noqa: D103
        return kernel

else:
    from torch.library import wrap_triton

#: Positions whose outliers one part of the list holds.
SEGMENT = 32
#: Programs that gather rows of W1: more than a device runs at once, each takes several outliers if need be.
GATHERING = 1024
#: Shares that the outliers are cut into, whose sums over rows of W2 are added in the end.
SHARES = 32
#: Tokens that a kernel takes together, the least that are enough or the most.
TOGETHER = (1, 2, 4)


def correct(
    folded: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2t: Tensor,
    counts: Tensor,
    neurons: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    lower: Tensor,
    upper: Tensor,
    slope: Tensor,
    intercept: Tensor,
    bits: int,
    activation: str,
    fold: Tensor | None = None,
    fold_bits: int = 16,
    row_bits: int = 16,
) -> Tensor:
    """Adds the exact terms of the predicted outliers: :func:`tardis_fx.runtime.reference.correct`, by Triton.

    Three launches, four with a quantised fold, whose grids depend on shapes alone: nothing waits for the device, and a
    CUDA graph can hold them. Sums are taken in float32 and rounded once. What the kernels do not take goes to
    ``torch.ops.tardis.correct``. Gradients do not flow through it. Arguments and result are those of the reference.
    """
    layout = check(
        folded, x, w1, b1, w2t, counts, neurons, codes, scale, zero, lower, upper, slope, intercept, bits, activation,
        fold, fold_bits, row_bits,
    )  # fmt: skip
    if not eligible(folded, x, w1, b1, w2t, activation, row_bits):
        other: Tensor = torch.ops.tardis.correct(
            folded, x, w1, b1, w2t, counts, neurons, codes, scale, zero, lower, upper, slope, intercept, bits,
            activation, fold, fold_bits, row_bits,
        )  # fmt: skip
        return other
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    (tokens, d), d_out, capacity = flat.shape, folded.shape[-1], len(neurons)
    together = next((few for few in TOGETHER if tokens <= few), TOGETHER[-1])
    segments, nested = -(-capacity // SEGMENT), row_bits < 16
    group = group_width(d, scale.shape[1])
    group_out = group_width(d_out, layout.column_groups) if nested else BLOCK
    w1, w2t = (weight if weight.stride(1) == 1 else weight.contiguous() for weight in (w1, w2t))

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    positions, chosen, masks = (scratch(segments * SEGMENT) for _ in range(3))
    sizes, estimates = scratch(segments), scratch(tokens if nested else 1, segments * SEGMENT, dtype=torch.float32)
    wrap_triton(predict)[(segments,)](
        flat, counts.contiguous(), neurons.contiguous(), codes.contiguous(), scale.contiguous(), zero.contiguous(),
        lower.contiguous(), upper.contiguous(), positions, chosen, masks, sizes, estimates,
        tokens, D=d, TOKENS=together, ROWS=SEGMENT, GROUP=group, BITS=bits, KEPT=nested,
    )  # fmt: skip
    rows, residuals, count = scratch(capacity), scratch(tokens, capacity, dtype=torch.float32), scratch(1)
    wrap_triton(activate)[(min(capacity, GATHERING),)](
        flat, w1, folded if b1 is None else b1.contiguous(), slope.contiguous(), intercept.contiguous(),
        positions, chosen, masks, sizes, estimates, rows, residuals, count, tokens, w1.stride(0), capacity, segments,
        D=d, TOKENS=together, SEGMENT=SEGMENT, SEGMENTS=1 << (segments - 1).bit_length(), GROUP=group,
        BITS=layout.low if nested else 16,
        BIASED=b1 is not None, ACTIVATION=activation,
    )  # fmt: skip
    partial = scratch(SHARES, tokens, d_out, dtype=torch.float32)
    wrap_triton(accumulate)[lambda config: (-(-d_out // (64 * config["BLOCKS"])), SHARES)](
        w2t, rows, residuals, count, partial, tokens, w2t.stride(0), capacity,
        D_OUT=d_out, TOKENS=together, GROUP=group_out, BITS=row_bits,
    )  # fmt: skip
    added = partial.sum(0)
    if fold is not None and fold_bits == 16:
        added = added + flat.float() @ fold.float().T
    elif fold is not None:
        product = scratch(tokens, d_out, dtype=torch.float32)
        wrap_triton(multiply)[lambda config: (-(-d_out // config["ROWS"]),)](
            flat, fold.contiguous(), product, tokens, fold.shape[1],
            D=d, D_OUT=d_out, TOKENS=together, GROUP=group, BITS=fold_bits,
        )  # fmt: skip
        added = added + product
    return (folded.float() + added.view(*x.shape[:-1], d_out)).to(folded.dtype)


#: Inductor looks into it; to everything else it is ``torch.ops.tardis.correct``.
correct_triton = torch.library.triton_op("tardis::correct_triton", correct, mutates_args=())
