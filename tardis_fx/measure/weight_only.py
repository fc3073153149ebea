"""Weight-only integer quantisation by torchao, the alternative to a plan."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tardis_fx.errors import BenchError, CalibrationError
from tardis_fx.observation.site import ObservedSite
from tardis_fx.runtime.packing import row_bytes

#: Columns that share a scale and a zero point in torchao's int4, and in the quantisation of FFNs alone.
GROUP, FFN_GROUP = 128, 64
#: torchao's int4 takes only matrices whose number of rows is a multiple of this.
ROWS = 16


def quantiser(bits: int = 8, device: str = "cpu") -> Callable[[nn.Module], None]:
    """A fast in-place quantiser of linear layers to 8 or 4 bits; on a CPU, 4 bits are a prototype in torchao.

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
    """An in-place quantiser of linear layers to 2, 3, 4 or 8 bits with zero points: for quality, not for speed.

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
    except Exception as error:  # torchao built for another torch may raise anything
        raise BenchError(f"torchao cannot be imported: {type(error).__name__}: {error}") from error


def quantise_model(
    model: nn.Module, quantise: Callable[[nn.Module], None], bits: int = 8, excluded: Sequence[Tensor] = ()
) -> tuple[nn.Module, int, list[str]]:
    """Copies a model and quantises its projections, except excluded weights, which the copy shares with the model.

    8 bits have a scale for every row, 4 bits a scale and a zero point for every group of columns.

    Returns:
        The copy, the bytes that a decoded token saves, and the names of the layers that 4 bits do not support.

    Raises:
        BenchError: torchao lacks something for it.
    """
    shared = {id(p): p for p in excluded}
    saved, names, unsupported = 0, [], []
    for name, module in model.named_modules():
        layer = linear(module)
        if layer is None or id(module.weight) in shared:
            continue
        if bits == 4 and layer.out_features % ROWS:
            unsupported.append(name)
            continue
        names.append(name)
        w = layer.weight
        scales = len(w) if bits == 8 else 2 * w.numel() // GROUP
        saved += w.nbytes - w.numel() * bits // 8 - scales * w.element_size()
    return _quantised(model, quantise, names, shared), saved, unsupported


def quantise_ffns(
    model: nn.Module, quantise: Callable[[nn.Module], None], sites: Sequence[ObservedSite], bits: int
) -> tuple[nn.Module, float]:
    """Copies a model with sites quantised by :func:`ffn_quantiser`, and returns their packed size over the FFNs' bytes.

    torchao computes with one byte per weight. Here packed codes count, with scale and zero point of each group, which
    makes as many bytes as this project's codes.

    Raises:
        BenchError: torchao lacks something for it.
        CalibrationError: a matrix does not have a whole number of groups, or no projection layer holds it.
    """
    matrices = {p.data_ptr() for site in sites for p in site.parameters if p.dim() == 2}
    total = size = sum(site.weights.bytes for site in sites)
    names = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.data_ptr() not in matrices:
            continue
        layer = linear(module)
        if layer is None or layer.in_features % FFN_GROUP:
            raise CalibrationError(f"torchao cannot quantise {name} in groups of {FFN_GROUP}")
        names.append(name)
        size += layer.out_features * row_bytes(layer.in_features, bits, FFN_GROUP) - weight.nbytes
    if len(names) < len(matrices):
        raise CalibrationError("torchao quantises layers, and a matrix of an FFN is in no layer")
    return _quantised(model, quantise, names, {}), size / total


@torch.no_grad()
def _quantised(
    model: nn.Module, quantise: Callable[[nn.Module], None], names: Sequence[str], shared: dict[int, Tensor]
) -> nn.Module:
    """Copies a model, and replaces the named layers by quantised plain linear layers."""
    model = copy.deepcopy(model, dict(shared))
    for name in names:
        layer = linear(model.get_submodule(name))
        assert layer is not None
        try:
            quantise(layer)
        except Exception as error:  # torchao's own dependencies may raise anything
            raise BenchError(f"{type(error).__name__}: {error}") from error
        model.set_submodule(name, layer)
    return model


def linear(module: Any) -> nn.Linear | None:
    """The projection as a plain linear layer, the only kind that torchao takes; None for other modules.

    Conv1D of transformers and subclasses of ``nn.Linear`` are also projections.
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
