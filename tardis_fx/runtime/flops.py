"""FLOPs of the run-time ops for ``torch.utils.flop_counter``; imported only when FLOPs are counted."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.coded_linear import CodedLinear
from tardis_fx.runtime.correction import Correction
from tardis_fx.runtime.rotation import multiplications


@register_flop_formula(torch.ops.tardis.correct, get_raw=True)
def correct_flops(*args: Any, out_val: object = None, **named: Any) -> int:
    """FLOPs of :func:`tardis_fx.runtime.reference.correct` for a prefill: every listed neuron at every token.

    Decoding computes only the outliers. Without tensor values, all neurons count as guarded.
    """
    call = Correction(*args, **named)
    tokens, d, d_out = call.x.shape[:-1].numel(), call.x.shape[-1], call.folded.shape[-1]
    listed, guarded = (len(call.neurons),) * 2 if isinstance(call.counts, FakeTensor) else call.counts.tolist()
    multiplied = len(call.projections) * d * (guarded + listed) + listed * d_out
    return 2 * tokens * (multiplied + (d * d_out if call.fold is not None else 0))


@register_flop_formula(torch.ops.tardis.coded_ffn, get_raw=True)
def coded_ffn_flops(*args: Any, out_val: object = None, **named: Any) -> int:
    """FLOPs of :func:`tardis_fx.runtime.coded_reference.coded_ffn`: all parts of every listed neuron at every token.

    Without tensor values, all neurons count as listed.
    """
    call = CodedFFN(*args, **named)
    tokens, d, d_out = call.x.shape[:-1].numel(), call.x.shape[-1], call.bias.shape[0]
    listed = len(call.columns) if isinstance(call.listed, FakeTensor) else int(call.listed)
    multiplied = 2 * listed * (len(call.projections) * d + d_out) + multiplications(d) + multiplications(d_out)
    return 2 * tokens * (multiplied + (d * d_out if call.fold is not None else 0))


@register_flop_formula(torch.ops.tardis.coded_linear, get_raw=True)
def coded_linear_flops(*args: Any, out_val: object = None, **named: Any) -> int:
    """FLOPs of :func:`tardis_fx.runtime.coded_linear.coded_linear`: the rotation and the product."""
    call = CodedLinear(*args, **named)
    d = call.x.shape[-1]
    return 2 * call.x.shape[:-1].numel() * (d * len(call.rows) + multiplications(d))


@register_flop_formula(
    [torch.ops.tardis.dequantise, torch.ops.tardis.dequantise_rows, torch.ops.tardis.rotate], get_raw=True
)
def no_flops(*_: object, **__: object) -> int:
    """FLOPs of dequantisation and rotation: 0, because neither needs matrix products, which alone PyTorch counts."""
    return 0
