"""FLOPs of the run-time ops for ``torch.utils.flop_counter``; imported only when FLOPs are counted."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from tardis_fx.errors import ConfigError
from tardis_fx.runtime import ops  # noqa: F401 - registers torch.ops.tardis
from tardis_fx.runtime.correction import Correction
from tardis_fx.runtime.cpu import coded_layout
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
def coded_ffn_flops(x: Tensor, site: Tensor, d_out: int, out_val: object = None) -> int:
    """FLOPs of :func:`tardis_fx.runtime.coded_reference.coded_ffn`: all parts of every listed neuron at every token.

    Raises:
        ConfigError: the site has no values.
    """
    if isinstance(site, FakeTensor):
        raise ConfigError("the bytes of a prepared site tell its FLOPs: count them without a FakeTensorMode")
    call = coded_layout.restore(x, site)
    tokens, d, listed = x.shape[:-1].numel(), x.shape[-1], int(call.listed)
    multiplied = 2 * listed * (len(call.projections) * d + d_out) + multiplications(d_out)
    return 2 * tokens * (multiplied + (d * d_out if call.fold is not None else 0))


@register_flop_formula(torch.ops.tardis.coded_linear, get_raw=True)
def coded_linear_flops(x: Tensor, layer: Tensor, d_out: int, out_val: object = None) -> int:
    """FLOPs of :func:`tardis_fx.runtime.coded_linear.coded_linear`: the product."""
    return 2 * x.numel() * d_out


@register_flop_formula(
    [torch.ops.tardis.dequantise, torch.ops.tardis.dequantise_rows, torch.ops.tardis.rotate], get_raw=True
)
def no_flops(*_: object, **__: object) -> int:
    """FLOPs of dequantisation and rotation: 0, because neither needs matrix products, which alone PyTorch counts."""
    return 0
