"""Columns, fold and bias, fitted together to what the neurons add.

The errors of neurons that are not read, or read in few bits, correlate with the values of others. So the columns are
not those of down: what is left of the output is regressed on the added values, the inputs and a constant. Columns move
away from those of down as far as this reduces the error; no more bytes are read. The ridge on their change falls with
the number of tokens for each column.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float32
from torch import Tensor

from tardis_fx.observation.site import thinned
from tardis_fx.partial_linear.coding import TOGETHER, Coding, token_weights
from tardis_fx.partial_linear.precision import Widths
from tardis_fx.quantisation import Feedback, code_columns, factor
from tardis_fx.runtime.rotation import rotate, rotate_back
from tardis_fx.statistics.regression import RIDGE, Products

#: Tokens for each term of the regression, at most: more improve little, and take as much longer.
PER_TERM = 4
#: What the neurons of a site add for tokens.
Values = Callable[[Float32[Tensor, "tokens d"]], Float32[Tensor, "tokens listed"]]


def refit(
    coding: Coding,
    widths: Widths,
    columns: Float32[Tensor, "listed d_out"],
    bias: Float32[Tensor, " d_out"],
    values: Values,
) -> tuple[dict[str, Tensor], Float32[Tensor, " d_out"]]:
    """Fits columns, the fold if there is one, and the bias unless there is none and the output is normalised.

    Args:
        coding: of the site, with the tokens.
        widths: of the codes.
        columns: those of down, for the listed neurons.
        bias: of the output, so far.
        values: what the neurons add for tokens.

    Returns:
        The codes of columns and fold, named as in a plan, and the bias.

    Raises:
        CalibrationError: sums over the tokens overflow.
    """
    inputs = coding.tokens.shape[1] if widths.fold_bits else 0
    constant = inputs > 0 or not coding.site.site.normalised
    tokens = thinned(coding.tokens, PER_TERM * (inputs + len(columns)))
    sums = Products(inputs + len(columns), len(bias))
    for x in tokens.split(TOGETHER):
        exact, added = coding.outputs(x), values(x)
        terms = torch.cat([x[:, :inputs], added], 1)
        sums.update(terms, exact - bias - added @ columns, exact, token_weights(exact))
    gram, crossed, total, weight = sums.inputs.gram, sums.cross, sums.inputs.total, sums.inputs.tokens
    ridge = len(columns) / max(1, len(tokens)) * gram.diagonal()[inputs:].mean()
    if constant:
        gram.addr_(total, total / weight, alpha=-1)
        crossed.addr_(total, sums.total / weight, alpha=-1)
    diagonal = gram.diagonal()
    diagonal[:inputs] += RIDGE * diagonal[:inputs].mean()
    diagonal[inputs:] += ridge
    rising = diagonal[inputs:].argsort()
    order = torch.cat([torch.arange(inputs, dtype=torch.int64, device="cpu"), inputs + rising])
    lower = factor(gram[order[:, None], order], damping=0.0)
    wanted = columns.clone()
    wanted[rising] += torch.cholesky_solve(crossed[order], lower)[inputs:].float()
    # The last block of the factor is that of what the inputs leave of the values.
    feedback, rotated = Feedback.from_factor(rising, lower[inputs:, inputs:]), rotate(wanted, coding.out_signs)
    base = code_columns(rotated, feedback, widths.column_bits)
    refinement = code_columns(rotated - base.weight, feedback, widths.column_low_bits)
    tensors = {"columns": base.rows, "columns_refinement": refinement.rows}
    fitted = rotate_back(base.weight + refinement.weight, coding.out_signs) - columns
    if inputs:
        rest = crossed[:inputs] - gram[:inputs, inputs:] @ fitted.double()
        fold = coding.fold(torch.cholesky_solve(rest, lower[:inputs, :inputs]).T, widths.fold_bits)
        fitted = torch.cat([coding.folded(fold).T, fitted])
        tensors["fold"] = fold.rows
    rest = sums.total - fitted.double().T @ total
    return tensors, bias + (rest / weight).float() if constant else bias
