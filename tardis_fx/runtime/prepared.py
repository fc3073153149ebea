"""Prepares the constants of a site: a plan's tensors and the model's weights in the form that the op takes."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tardis_fx.runtime.reference import compute_dtype

#: Tensors of a plan with one entry per listed neuron; those of the predictor and the guard, per guarded neuron.
_LISTED = ("neurons", "codes", "scale", "zero", "guard", "surrogate")


def prepare(
    planned: Mapping[str, Tensor],
    projections: Mapping[str, tuple[Float[Tensor, "h d"], Float[Tensor, " h"] | None]],
    columns: Float[Tensor, "h d_out"],
    row_bits: int,
) -> dict[str, Shaped[Tensor, "..."]]:
    """The arguments of the op by name, copied only if necessary; each projection has its own name.

    Lists are padded to the hidden size, so that no shape depends on the plan's choices. Coded rows are placed at the
    index of their neuron, like the rows of the model.

    Args:
        planned: tensors of the plan's entry.
        projections: matrices and biases of the model.
        columns: of the model: ``down`` transposed.
        row_bits: bits per weight of the rows; 16 for the rows of the model.
    """
    hidden, device = len(columns), columns.device
    neurons = planned["neurons"].to(device)
    in_order = torch.equal(neurons, torch.arange(hidden, dtype=neurons.dtype, device=device))
    constants = {name: weight for name, (weight, _) in projections.items()} | {"columns": columns}
    for name, weight in constants.items():
        rows = weight.contiguous() if row_bits == 16 else planned[name].to(device)
        if row_bits < 16 and not in_order:
            rows = rows.new_zeros(hidden, rows.shape[1]).index_copy_(0, neurons.long(), rows)
        constants[name] = rows
    biases = [bias for _, bias in projections.values()]
    if any(bias is not None for bias in biases):
        dtype = compute_dtype(next(weight.dtype for weight, _ in projections.values()))
        constants["biases"] = torch.zeros(hidden, len(biases), dtype=dtype, device=device)
        for i, bias in enumerate(biases):
            if bias is not None:
                constants["biases"][: len(neurons), i] = bias[neurons.long()].to(dtype)
    counts = [len(neurons), len(planned["codes"])]
    constants["counts"] = torch.tensor(counts, dtype=torch.int64, device=device)
    for name in _LISTED:
        tensor = planned[name].to(device)
        missing = hidden - len(tensor)
        constants[name] = torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])]) if missing else tensor
    return constants
