"""The correction op as a ``triton_op``, which Inductor traces: it sees the kernels and fuses the last sum."""

from typing import Any

import torch
from torch import Tensor
from torch.library import wrap_triton

from tardis_fx.runtime.arguments import check
from tardis_fx.runtime.correction import SIGNATURE, Correction
from tardis_fx.runtime.cuda.correction import accumulate, activate
from tardis_fx.runtime.cuda.predictor import multiply, predict
from tardis_fx.runtime.packing import BLOCK, group_width

#: Number of positions whose outliers form one segment of the list.
SEGMENT = 32
#: Programs that gather rows of projections, more than a device runs at once; each may take several outliers.
GATHERING = 1024
#: Number of shares of the outliers; their sums over columns are added at the end.
SHARES = 32
#: Numbers of tokens that a kernel can take together; the smallest that suffices is used, else the largest.
TOGETHER = (1, 2, 4)


def correct(*fields: Any) -> Tensor:
    """Adds the exact terms of the predicted outliers: :func:`tardis_fx.runtime.reference.correct`, by Triton.

    Makes three launches, four with a quantised fold, whose grids depend on shapes alone: nothing waits for the device,
    and a CUDA graph can capture them. Sums are computed in float32 and rounded once. Calls that the kernels do not
    support go to ``torch.ops.tardis.correct``. Gradients do not flow through it. It takes the fields of a call.
    """
    call = Correction(*fields)
    layout = check(call)
    if not call.has_kernel:
        return torch.ops.tardis.correct(*call)  # type: ignore[no-any-return]
    x, fold = call.x.reshape(-1, call.x.shape[-1]).contiguous(), call.fold
    (tokens, d), d_out, capacity, k = x.shape, call.folded.shape[-1], len(call.neurons), len(call.projections)
    together = next((few for few in TOGETHER if tokens <= few), TOGETHER[-1])
    segments, nested = -(-capacity // SEGMENT), call.row_bits < 16
    group = group_width(d, call.scale.shape[2])
    group_out = group_width(d_out, layout.column_groups) if nested else BLOCK
    matrices = [m if m.stride(1) == 1 else m.contiguous() for m in (*call.projections, call.columns)]
    first, second, columns = matrices if k == 2 else (matrices[0], *matrices)
    biases = call.surrogate if call.biases is None else call.biases.contiguous()

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    positions, chosen, masks = (scratch(segments * SEGMENT) for _ in range(3))
    sizes, estimates = scratch(segments), scratch(tokens if nested else 1, k, segments * SEGMENT, dtype=torch.float32)
    wrap_triton(predict)[(segments,)](
        x, call.counts.contiguous(), call.neurons.contiguous(), call.codes.contiguous(), call.scale.contiguous(),
        call.zero.contiguous(), biases, call.guard.contiguous(), positions, chosen, masks, sizes, estimates, tokens,
        K=k, D=d, TOKENS=together, ROWS=SEGMENT, GROUP=group, BITS=call.bits, KEPT=nested,
        BIASED=call.biases is not None, ACTIVATION=call.activation,
    )  # fmt: skip
    rows, residuals, count = scratch(capacity), scratch(tokens, capacity, dtype=torch.float32), scratch(1)
    wrap_triton(activate)[(min(capacity, GATHERING),)](
        x, first, second, biases, call.surrogate.contiguous(), positions, chosen, masks, sizes, estimates,
        rows, residuals, count, tokens, first.stride(0), second.stride(0), capacity, segments,
        K=k, D=d, TOKENS=together, SEGMENT=SEGMENT, SEGMENTS=1 << (segments - 1).bit_length(), GROUP=group,
        BITS=layout.low if nested else 16, BIASED=call.biases is not None, ACTIVATION=call.activation,
    )  # fmt: skip
    partial = scratch(SHARES, tokens, d_out, dtype=torch.float32)
    wrap_triton(accumulate)[lambda config: (-(-d_out // (64 * config["BLOCKS"])), SHARES)](
        columns, rows, residuals, count, partial, tokens, columns.stride(0), capacity,
        D_OUT=d_out, TOKENS=together, GROUP=group_out, BITS=call.row_bits,
    )  # fmt: skip
    added = partial.sum(0)
    if fold is not None and call.fold_bits == 16:
        added = added + x.float() @ fold.float().T
    elif fold is not None:
        product = scratch(tokens, d_out, dtype=torch.float32)
        wrap_triton(multiply)[lambda config: (-(-d_out // config["ROWS"]),)](
            x, fold.contiguous(), product, tokens, fold.shape[1],
            D=d, D_OUT=d_out, TOKENS=together, GROUP=group, BITS=call.fold_bits,
        )  # fmt: skip
        added = added + product
    return (call.folded.float() + added.view(*call.x.shape[:-1], d_out)).to(call.folded.dtype)


correct.__signature__ = SIGNATURE  # type: ignore[attr-defined]
#: Inductor traces into it; otherwise it is equivalent to ``torch.ops.tardis.correct``.
correct_triton = torch.library.triton_op("tardis::correct_triton", correct, mutates_args=())
