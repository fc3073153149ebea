"""The weight-only integers of torchao that a user could run instead of a plan."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tardis_fx.errors import BenchError, CalibrationError
from tardis_fx.runtime.packing import row_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from tardis_fx.observation.observe import ObservedSite

#: Columns that share a scale and a zero point in torchao's int4, and in the integers of the FFNs alone.
GROUP, FFN_GROUP = 128, 64
#: torchao's int4 takes matrices whose number of rows this divides.
ROWS = 16


def quantiser(bits: int = 8, device: str = "cpu") -> Callable[[nn.Module], None]:
    """What quantises a linear layer in place to 8 or 4 bits, to be fast; on a CPU, 4 bits are a prototype of torchao's.

    Raises:
        BenchError: torchao cannot be imported.
    """
    with _importing():
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        if bits == 8:
            config: Any = Int8WeightOnlyConfig()
        elif device == "cpu":
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            config = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
        else:
            config = Int4WeightOnlyConfig(group_size=GROUP)
    return lambda layer: quantize_(layer, config)


def ffn_quantiser(bits: int) -> Callable[[nn.Module], None]:
    """What quantises a linear layer in place to 2, 3, 4 or 8 bits with zero points: for quality, not for speed.

    Raises:
        BenchError: torchao cannot be imported.
    """
    with _importing():
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, quantize_
        from torchao.quantization.granularity import PerGroup

        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(FFN_GROUP),
            mapping_type=MappingType.ASYMMETRIC,
        )
    return lambda layer: quantize_(layer, config)


@contextmanager
def _importing() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # torchao built for another torch fails in ways of its own
        raise BenchError(f"torchao cannot be imported: {type(error).__name__}: {error}") from error


def quantise_model(
    model: nn.Module, quantise: Callable[[nn.Module], None], bits: int = 8, but: Sequence[Tensor] = ()
) -> tuple[nn.Module, int, list[str]]:
    """A copy of a model with its projections in a few bits.

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
    saved, taken, left = 0, [], []
    for name, module in model.named_modules():
        layer = linear(module)
        if layer is None or id(module.weight) in shared:
            continue
        if bits == 4 and layer.out_features % ROWS:
            left.append(name)
            continue
        taken.append(name)
        w = layer.weight
        scales = len(w) if bits == 8 else 2 * w.numel() // GROUP
        saved += w.nbytes - w.numel() * bits // 8 - scales * w.element_size()
    return _quantised(model, quantise, taken, shared), saved, left


def quantise_ffns(
    model: nn.Module, quantise: Callable[[nn.Module], None], sites: Sequence[ObservedSite], bits: int
) -> tuple[nn.Module, float]:
    """A copy with the sites' matrices in integers, and the share of the FFNs' bytes that they take when packed.

    torchao keeps a byte a weight where it computes. Here packed codes count, with scale and zero point of each group:
    as many bytes as those of this project's codes.

    Args:
        model: to be copied.
        quantise: of :func:`ffn_quantiser`.
        sites: of the model.
        bits: of a code.

    Raises:
        BenchError: torchao lacks something for it.
        CalibrationError: a matrix has no whole number of groups, or is held by no projection layer.
    """
    matrices = {p.data_ptr() for site in sites for p in site.parameters if p.dim() == 2}
    total = size = sum(site.weights.bytes for site in sites)
    names = [name for name, module in model.named_modules() if _address(module) in matrices]
    for name in names:
        layer = linear(model.get_submodule(name))
        if layer is None or layer.in_features % FFN_GROUP:
            raise CalibrationError(f"torchao cannot quantise {name} in groups of {FFN_GROUP}")
        size += layer.out_features * row_bytes(layer.in_features, bits, FFN_GROUP) - layer.weight.nbytes
    if len(names) < len(matrices):
        raise CalibrationError("torchao quantises layers, and an FFN's matrix is in none")
    return _quantised(model, quantise, names, {}), size / total


@torch.no_grad()
def _quantised(
    model: nn.Module, quantise: Callable[[nn.Module], None], names: Sequence[str], shared: dict[int, Tensor]
) -> nn.Module:
    """A copy of a model whose layers of these names are plain linear layers, quantised."""
    model = copy.deepcopy(model, dict(shared))
    for name in names:
        layer = linear(model.get_submodule(name))
        assert layer is not None
        try:
            quantise(layer)
        except Exception as error:  # of what torchao needs beside itself, and says in ways of its own
            raise BenchError(f"{type(error).__name__}: {error}") from error
        model.set_submodule(name, layer)
    return model


def linear(module: Any) -> nn.Linear | None:
    """The same projection as a plain linear layer, which is all that torchao takes, or None for any other module.

    Conv1D of transformers and subclasses of ``nn.Linear`` are projections, too.
    """
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


def _address(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    return weight.data_ptr() if isinstance(weight, torch.Tensor) else None
