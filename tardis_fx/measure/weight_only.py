"""The weight-only int8 and int4 models of torchao that a user could run instead."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tardis_fx.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


#: Columns that share a scale and a zero point in torchao's int4.
GROUP = 128
#: It takes matrices whose number of rows this divides.
ROWS = 16


def quantiser(bits: int = 8, device: str = "cpu") -> Callable[[nn.Module], None]:
    """What quantises a model in place to 8 or 4 bits; on a CPU, 4 bits are a prototype of torchao's.

    Raises:
        BenchError: torchao cannot be imported.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        if bits == 8:
            config: Any = Int8WeightOnlyConfig()
        elif device == "cpu":
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            config = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
        else:
            config = Int4WeightOnlyConfig(group_size=GROUP)
    except Exception as error:  # torchao built for another torch fails in ways of its own
        raise BenchError(f"torchao cannot be imported: {type(error).__name__}: {error}") from error
    return lambda layer: quantize_(layer, config)


@torch.no_grad()
def quantised(
    model: nn.Module, quantise: Callable[[nn.Module], None], bits: int = 8, but: Sequence[Tensor] = ()
) -> tuple[nn.Module, int, list[str]]:
    """A copy of a model with its projections in a few bits.

    Conv1D of transformers and subclasses of ``nn.Linear`` become ``nn.Linear`` first, which is all that torchao takes.

    Args:
        model: to be copied.
        quantise: of :func:`quantiser`.
        bits: 8, with a scale for every row, or 4, with a scale and a zero point for every group.
        but: weights that stay as they are, and are shared with the model.

    Returns:
        The copy, by how many bytes less a decoded token reads, and the names of the layers that 4 bits do not take.

    Raises:
        BenchError: torchao lacks something for it.
    """
    shared = {id(p): p for p in but}
    model = copy.deepcopy(model, dict(shared))
    saved, left = 0, []
    for path, parent in list(model.named_modules()):
        for name, child in list(parent.named_children()):
            layer = linear(child)
            if layer is None or id(child.weight) in shared:
                continue
            if bits == 4 and layer.out_features % ROWS:
                left.append(f"{path}.{name}".removeprefix("."))
                continue
            setattr(parent, name, layer)
            w = layer.weight
            scales = len(w) if bits == 8 else 2 * w.numel() // GROUP
            saved += w.numel() * w.element_size() - w.numel() * bits // 8 - scales * w.element_size()
            try:
                quantise(layer)
            except Exception as error:  # of what torchao needs beside itself, and says in ways of its own
                raise BenchError(f"{type(error).__name__}: {error}") from error
    return model, saved, left


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
