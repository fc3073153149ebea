"""The weight-only int8 model of torchao that a user could run instead."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable


def quantiser() -> Callable[[nn.Module], None] | str:
    """What quantises a model in place, or why there is nothing that could."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except Exception as error:  # torchao built for another torch fails in ways of its own
        return f"torchao cannot be imported: {type(error).__name__}: {error}"
    return lambda model: quantize_(model, Int8WeightOnlyConfig())


@torch.no_grad()
def quantised(model: nn.Module, quantise: Callable[[nn.Module], None]) -> tuple[nn.Module, int]:
    """A copy of a model with all projections in int8, and by how many bytes less a decoded token reads.

    Conv1D of transformers and subclasses of ``nn.Linear`` become ``nn.Linear`` first, which is all that torchao takes.

    Args:
        model: to be copied.
        quantise: of :func:`quantiser`.
    """
    model = copy.deepcopy(model)
    saved = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            layer = linear(child)
            if layer is not None:
                setattr(parent, name, layer)
                w = layer.weight
                saved += w.numel() * (w.element_size() - 1) - len(w) * w.element_size()  # a scale for every row
    quantise(model)
    return model, saved


def linear(module: Any) -> nn.Linear | None:
    """The same projection as a plain linear layer, or None for any other module."""
    if type(module) is nn.Linear:
        return module
    if isinstance(module, nn.Linear):
        weight = module.weight
    elif type(module).__name__ == "Conv1D":
        weight = nn.Parameter(module.weight.T.contiguous(), requires_grad=False)
    else:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
    layer.weight, layer.bias = weight, module.bias
    return layer.eval()
