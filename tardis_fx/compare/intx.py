"""The weight-only integers of torchao, in groups of 64 with a zero point, for the FFNs alone: quality, not speed."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from tardis_fx.errors import BenchError, CalibrationError
from tardis_fx.measure.weight_only import linear
from tardis_fx.runtime.packing import row_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from tardis_fx.observation.observe import ObservedSite

#: Columns that share a scale and a zero point.
GROUP = 64


def quantiser(bits: int) -> Callable[[nn.Module], None]:
    """What quantises a linear layer in place.

    Raises:
        BenchError: torchao cannot be imported.
    """
    try:
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
        from torchao.quantization.granularity import PerGroup
    except Exception as error:  # torchao built for another torch fails in ways of its own
        raise BenchError(f"torchao cannot be imported: {type(error).__name__}: {error}") from error
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(GROUP), mapping_type=MappingType.ASYMMETRIC
    )
    return lambda layer: quantize_(layer, config)


@torch.no_grad()
def quantised(model: nn.Module, sites: Sequence[ObservedSite], bits: int) -> tuple[nn.Module, float]:
    """A copy with the sites' matrices in integers, and the share of the FFNs' bytes that they take when packed.

    torchao keeps a byte a weight where it computes. Here packed codes count, with scale and zero point of each group:
    as many bytes as those of this project's codes.

    Args:
        model: to be copied; its Conv1D layers become linear ones, which are all that torchao takes.
        sites: of the model.
        bits: of a code.

    Raises:
        BenchError: torchao cannot be imported.
        CalibrationError: a matrix has no whole number of groups, or is held by no projection layer.
    """
    quantise = quantiser(bits)
    matrices = {p.data_ptr() for site in sites for p in site.parameters if p.dim() == 2}
    total = sum(site.weights.bytes for site in sites)
    took = total
    names = [name for name, module in model.named_modules() if _address(module) in matrices]
    model = copy.deepcopy(model)
    for name in names:
        layer = linear(model.get_submodule(name))
        if layer is None or layer.in_features % GROUP:
            raise CalibrationError(f"torchao cannot quantise {name} in groups of {GROUP}")
        took += layer.out_features * row_bytes(layer.in_features, bits, GROUP) - layer.weight.nbytes
        quantise(layer)
        model.set_submodule(name, layer)
    if len(names) < len(matrices):
        raise CalibrationError("torchao quantises layers, and an FFN's matrix is in none")
    return model, took / total


def _address(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    return weight.data_ptr() if isinstance(weight, torch.Tensor) else None
