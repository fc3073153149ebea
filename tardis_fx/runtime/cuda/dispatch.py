"""The correction op on a CUDA device: Triton, loaded on the first call, or the eager reference."""

import logging
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, fx

from tardis_fx.runtime import reference
from tardis_fx.runtime.arguments import check, check_devices, check_lists
from tardis_fx.runtime.correction import Correction

logger = logging.getLogger("tardis_fx")


def correct(call: Correction) -> Float[Tensor, "*tokens d_out"]:
    """:func:`tardis_fx.runtime.reference.correct` on a CUDA device.

    Up to ``MOST_TOKENS`` tokens of float32, bfloat16 or float16 take the kernels of :mod:`tardis_fx.runtime.cuda.op`;
    the reference does the rest, waiting for the device.
    """
    check(call)
    check_devices(call)
    if call.has_kernel and available():
        return torch.ops.tardis.correct_triton(*call)  # type: ignore[no-any-return]
    check_lists(call)
    return reference.correct(call)


@cache
def available() -> bool:
    """Imports Triton and registers its op; returns False, with one warning, if that fails."""
    try:
        import tardis_fx.runtime.cuda.op  # noqa: F401
    except ImportError as error:
        logger.warning("no Triton kernels, the (slow) eager implementation runs instead: %s", error)
        return False
    return True


def show_kernels(gm: fx.GraphModule) -> None:
    """Makes a graph for a CUDA device call the ``triton_op``, which Inductor traces, instead of the op."""
    if available():
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.tardis.correct):
            node.target = torch.ops.tardis.correct_triton.default
        gm.recompile()
