"""The columns of down that corrections add, fitted together with the folded map.

The error of folded neurons correlates with the corrections of others. So the residual of fold and corrections is
regressed on the inputs and on the factors of the copied columns. A column moves away from that of down as far as this
reduces the error; no more bytes are read. Only low-bit columns are fitted, because they are copies; the original
weights do not change.
"""

import torch

from tardis_fx.guarded_fold.settled import Settled
from tardis_fx.quantisation import Quantised, quantise, quantise_in_turn
from tardis_fx.statistics.regression import RIDGE, Residual, minimum_ridge

#: Ridge on the change of the columns, as a share of the mean variance of their factors.
SHRINKAGE = 0.1


def fit_columns(settled: Settled, residual: Residual) -> Quantised:
    """All columns of down; copied ones are fitted to the residual of the site, and rounded with mutual compensation."""
    neurons, quantisation = settled.draft.neurons, settled.draft.quantisation
    d, copied, columns = neurons.projections[0].shape[1], settled.copied, neurons.down.T.clone()
    if not len(copied):
        return settled.draft.columns(settled.row_bits)
    covariance, sizes = residual.inputs.covariance, [d, len(copied)]
    parts = zip(
        (RIDGE, SHRINKAGE), covariance.diagonal().split(sizes), residual.inputs.noise.split(sizes), sizes, strict=True
    )
    ridge = torch.cat([minimum_ridge(share * part, noise).expand(size) for share, part, noise, size in parts])
    columns[copied] += residual.solve(ridge).weight[d:].float()
    if quantisation.rounding == "nearest":
        return quantise(columns, None, settled.row_bits, quantisation.group_size)
    crossed = covariance[:d, d:]
    explained = crossed.T @ torch.linalg.solve(covariance[:d, :d] + ridge[:d].diag(), crossed)
    gram = torch.zeros(len(columns), len(columns), dtype=torch.float64, device="cpu")
    gram[copied[:, None], copied] = covariance[d:, d:] - explained
    return quantise_in_turn(columns, gram, settled.row_bits, quantisation.group_size)
