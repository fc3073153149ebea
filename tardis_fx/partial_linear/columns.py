"""The columns of W2 that corrections add, fitted together with the folded map.

What the surrogates miss of neurons that are folded goes along with what is corrected of others. So what both fold and
corrections miss is regressed on the inputs and on what the columns are multiplied with. A column leaves W2's as far as
the error gains by it, and no byte more is read. Only columns in few bits are fitted, for these are copies; the original
weights stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tardis_fx.quantisation import Quantised, quantise, quantise_in_turn
from tardis_fx.statistics.regression import RIDGE, least_ridge

if TYPE_CHECKING:
    from tardis_fx.partial_linear.draft import Draft
    from tardis_fx.statistics.regression import Residual

#: Ridge on the change of the columns, as a share of the mean variance of what they are multiplied with.
SHRINKAGE = 0.1


def fit_columns(draft: Draft, residual: Residual) -> Quantised:
    """All columns of W2, transposed, [h, d_out]: the copied ones fitted, and rounded so that others make up for it.

    Args:
        draft: settled, with rows of fewer than 16 bits.
        residual: what it misses; see :class:`tardis_fx.partial_linear.residuals.ResidualObserver`.
    """
    d, copied, columns = draft.up.shape[1], draft.copied, draft.down.T.clone()
    if not len(copied):
        return quantise(columns, None, draft.row_bits, draft.group_size)
    covariance, sizes = residual.inputs.covariance, [d, len(copied)]
    parts = zip(
        (RIDGE, SHRINKAGE), covariance.diagonal().split(sizes), residual.inputs.noise.split(sizes), sizes, strict=True
    )
    ridge = torch.cat([least_ridge(share * part, noise).expand(size) for share, part, noise, size in parts])
    columns[copied] += residual.solve(ridge).weight[d:].float()
    if draft.rounding == "nearest":
        return quantise(columns, None, draft.row_bits, draft.group_size)
    crossed = covariance[:d, d:]
    explained = crossed.T @ torch.linalg.solve(covariance[:d, :d] + ridge[:d].diag(), crossed)
    gram = torch.zeros(len(columns), len(columns), dtype=torch.float64, device="cpu")
    gram[copied[:, None], copied] = covariance[d:, d:] - explained
    return quantise_in_turn(columns, gram, draft.row_bits, draft.group_size)
