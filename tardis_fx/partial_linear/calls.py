"""Calls of the op from the tensors and the settings of a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tardis_fx.graph.site import SiteWeights
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.coded import CodedFFN


def planned_call(x: Float[Tensor, "... d"], plan: SitePlan, weights: SiteWeights) -> CodedFFN:
    """The call of the op for tokens at a planned site.

    Lists are padded to the hidden size, so that no shape depends on the plan's choices.
    """
    device, hidden = weights.up.device, len(weights.up)
    tensors = {name: tensor.to(device) for name, tensor in plan.tensors.items()}
    neurons = tensors.pop("neurons").long()
    for name in tensors.keys() - {"fold", "noise", "thresholds", "signs", "out_signs", "bias"}:
        rows = tensors[name]
        if missing := hidden - len(rows):
            tensors[name] = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    biases = [None if bias is None else bias[neurons] for _, bias in weights.projections.values()]
    tensors |= coded_biases(biases, hidden, weights.up)
    tensors["listed"] = torch.tensor([len(neurons)], dtype=torch.int64, device=device)
    return coded_call(x, tensors, plan.settings)


def coded_call(x: Float[Tensor, "... d"], tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> CodedFFN:
    """The call of the op for tokens, from the tensors of a site with biases and the number of neurons."""
    names = [name for name in ("gate", "up") if name in tensors]
    arguments: dict[str, Any] = {
        name: tensors[name] for name in ("bias", "signs", "out_signs", "listed", "norms", "noise", "thresholds")
    }
    arguments |= {**settings, "fold_bits": settings["fold_bits"] or 8, "relative": bool(settings["relative"])}
    return CodedFFN(
        x,
        projections=[tensors[name] for name in names],
        refinements=[tensors[f"{name}_refinement"] for name in names],
        columns=tensors["columns"],
        column_refinements=tensors["columns_refinement"],
        biases=tensors.get("biases"),
        surrogate=tensors.get("surrogate"),
        fold=tensors.get("fold"),
        **arguments,
    )


def coded_biases(
    biases: Sequence[Float[Tensor, " listed"] | None], capacity: int, like: Float[Tensor, "_ _"]
) -> dict[str, Float[Tensor, "capacity k"]]:
    """The biases of listed neurons as the op takes them, for operands like a tensor; none if all are missing."""
    if all(bias is None for bias in biases):
        return {}
    table = torch.zeros(capacity, len(biases), dtype=like.dtype, device=like.device)
    for i, bias in enumerate(biases):
        if bias is not None:
            table[: len(bias), i] = bias.to(table.dtype)
    return {"biases": table}
