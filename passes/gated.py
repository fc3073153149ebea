"""What partial linearity runs at a gated site, ``down(act(gate(x)) * up(x))``; the fit is that of plain sites.

1. A neuron's surrogate is a plane ``alpha g + beta u + gamma`` in gate ``g`` and up projection ``u``, the nearest to
   ``act(g) u`` by least squares: the site folds to ``x C + B`` with ``C = (W2 diag(alpha) Wg + W2 diag(beta) Wu)ᵀ``.
2. Predictors of both projections give estimates of ``g`` and ``u``; where product and plane of these are farther apart
   than the neuron's threshold, the neuron is corrected: the exact product replaces the plane.
3. The score is measured from the plane that fits all tokens, known before the thresholds are; the fold has the plane
   that fits those tokens which stay uncorrected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.plan import SitePlan

#: Constants that hold one entry a listed neuron, and are padded to the hidden size.
PER_NEURON = ("neurons", "codes", "scale", "zero", "guard", "surrogate")


def biases(plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
    """The biases of gate and up projection of the listed neurons, padded: ``biases`` [h, 2], float32; or none."""
    if weights.up_bias is None and weights.gate_bias is None:
        return {}
    (hidden, _), device = weights.up.shape, weights.up.device
    neurons = plan.tensors["neurons"].long().to(device)
    padded = torch.zeros(hidden, 2, dtype=torch.float32, device=device)
    for column, bias in enumerate((weights.gate_bias, weights.up_bias)):
        if bias is not None:
            padded[: len(neurons), column] = bias[neurons].float()
    return {"biases": padded}


def forward(x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
    """The folded map, and the corrections in one op; a quantised fold is part of the op."""
    settings, weight, bias = plan.settings, constants["folded_weight"], constants["folded_bias"]
    quantised = settings["fold_bits"] != 16
    folded, fold = (bias, weight) if quantised else (F.linear(x, weight, bias), None)
    corrected: Tensor = torch.ops.tardis.correct_gated(
        folded, x, constants["gate"], constants["up"], constants["w2t"], constants["counts"], constants["neurons"],
        constants["codes"], constants["scale"], constants["zero"], constants.get("biases"), constants["guard"],
        constants["surrogate"], settings["bits"], settings["activation"], fold, settings["fold_bits"],
        settings["row_bits"],
    )  # fmt: skip
    return corrected
