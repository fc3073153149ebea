"""Calls of the op from the tensors and the settings of a plan."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tardis_fx.runtime.coded import CodedFFN


def coded_call(x: Float[Tensor, "... d"], constants: Mapping[str, Tensor], settings: Mapping[str, Any]) -> CodedFFN:
    """The call of the op for tokens, from the constants of a rewritten site."""
    names = [name for name in ("gate", "up") if name in constants]
    arguments: dict[str, Any] = {
        name: constants[name] for name in ("bias", "signs", "out_signs", "listed", "norms", "noise", "thresholds")
    }
    arguments |= {**settings, "fold_bits": settings["fold_bits"] or 8, "relative": bool(settings["relative"])}
    return CodedFFN(
        x,
        projections=[constants[name] for name in names],
        refinements=[constants[f"{name}_refinement"] for name in names],
        columns=constants["columns"],
        column_refinements=constants["columns_refinement"],
        biases=constants.get("biases"),
        surrogate=constants.get("surrogate"),
        fold=constants.get("fold"),
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
