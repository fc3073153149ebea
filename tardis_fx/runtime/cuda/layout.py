"""Memory layout of a site's constants for the Triton kernels, and the calls that the kernels support."""

import torch

from tardis_fx.runtime.correction import MOST_TOKENS, Correction
from tardis_fx.runtime.prepared import prepare as prepare

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def eligible(call: Correction) -> bool:
    """Whether the Triton kernels support a call."""
    tokens = 1
    for size in call.x.shape[:-1]:
        tokens = tokens * size
    rows = (*call.projections, call.columns) if call.row_bits == 16 else ()
    return (
        0 < tokens <= MOST_TOKENS
        and call.x.shape[-1] > 0
        and call.x.dtype in _DTYPES
        and all(tensor.dtype == call.x.dtype for tensor in (call.folded, *rows))
    )
