"""The correction op on a CUDA device: Triton, loaded on the first call, or the eager reference."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import reference, reference_gated
from tardis_fx.runtime.arguments import check_lists

logger = logging.getLogger("tardis_fx")

#: More tokens than this are a prefill; a token is a bit of a mask and an axis of a tile.
DECODE_TOKENS = 16

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def correct(*args: Any) -> Tensor:
    """:func:`tardis_fx.runtime.reference.correct` on a CUDA device; arguments and result are the same.

    Up to ``DECODE_TOKENS`` tokens of float32, bfloat16 or float16 take the kernels of
    :mod:`tardis_fx.runtime.cuda.op`; the reference does the rest, waiting for the device.
    """
    folded, x, w1, b1, w2t = args[:5]
    row_bits = args[18] if len(args) > 18 else 16
    if eligible(folded, x, w1, b1, w2t, args[15], row_bits) and available():
        corrected: Tensor = torch.ops.tardis.correct_triton(*args)
        return corrected
    check_lists(args[5], args[6], w2t.shape[0], row_bits)
    return reference.correct(*args)


def correct_gated(*args: Any) -> Tensor:
    """:func:`tardis_fx.runtime.reference_gated.correct`: gated sites have no kernel on a CUDA device yet."""
    _warn_of_gated_sites()
    return reference_gated.correct(*args)


@cache
def _warn_of_gated_sites() -> None:
    logger.warning("no kernel for gated FFNs on a CUDA device, the (slow) eager implementation runs instead")


def eligible(
    folded: Tensor, x: Tensor, w1: Tensor, b1: Tensor | None, w2t: Tensor, activation: str, row_bits: int
) -> bool:
    """Whether the kernels take a call; arguments as of :func:`tardis_fx.runtime.reference.correct`."""
    plain = (folded, x, b1, *((w1, w2t) if row_bits == 16 else ()))
    tokens = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    return (
        0 < tokens <= DECODE_TOKENS
        and x.shape[-1] > 0
        and x.dtype in _DTYPES
        and activation in ACTIVATIONS
        and all(tensor is None or tensor.dtype == x.dtype for tensor in plain)
    )


@cache
def available() -> bool:
    """Whether Triton can be imported; registers its op. One warning says if not."""
    try:
        import tardis_fx.runtime.cuda.op  # noqa: F401
    except ImportError as error:
        logger.warning("no Triton kernels, the (slow) eager implementation runs instead: %s", error)
        return False
    return True


def show_kernels(gm: fx.GraphModule) -> None:
    """Makes a graph for a CUDA device call the ``triton_op`` in the op's place, which Inductor traces."""
    if available():
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.tardis.correct):
            node.target = torch.ops.tardis.correct_triton.default
        gm.recompile()
