"""What the correction op computes, for ``torch.utils.flop_counter``; imported where FLOPs are counted, not before."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis


@register_flop_formula(torch.ops.tardis.correct, get_raw=True)
def correct_flops(
    folded: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2t: Tensor, counts: Tensor, neurons: Tensor,
    *rest: object, out_val: object = None, **named: object,
) -> int:  # fmt: skip
    """Of :func:`tardis_fx.runtime.reference.correct`: every listed neuron is computed for every token, as in a prefill.

    Decoding computes the outliers only. Without values to read, all neurons count as guarded.
    """
    tokens, d, d_out = x.shape[:-1].numel(), x.shape[-1], folded.shape[-1]
    listed, guarded = (len(neurons),) * 2 if isinstance(counts, FakeTensor) else counts.tolist()
    fold = (rest + (None,) * 10)[9] if "fold" not in named else named["fold"]
    return 2 * tokens * (guarded * d + listed * (d + d_out) + (d * d_out if fold is not None else 0))


@register_flop_formula(torch.ops.tardis.correct_gated, get_raw=True)
def correct_gated_flops(
    folded: Tensor, x: Tensor, gate: Tensor, up: Tensor, w2t: Tensor, counts: Tensor, neurons: Tensor,
    *rest: object, out_val: object = None, **named: object,
) -> int:  # fmt: skip
    """Of :func:`tardis_fx.runtime.reference_gated.correct`, counted as :func:`correct_flops` counts."""
    tokens, d, d_out = x.shape[:-1].numel(), x.shape[-1], folded.shape[-1]
    listed, guarded = (len(neurons),) * 2 if isinstance(counts, FakeTensor) else counts.tolist()
    fold = (rest + (None,) * 9)[8] if "fold" not in named else named["fold"]
    return 2 * tokens * (2 * guarded * d + listed * (2 * d + d_out) + (d * d_out if fold is not None else 0))


@register_flop_formula(torch.ops.tardis.dequantise, get_raw=True)
def dequantise_flops(*_: object, **__: object) -> int:
    """None: PyTorch counts products of matrices alone, and there is none in it."""
    return 0
