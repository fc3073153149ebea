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
from tardis_fx.statistics.regression import RIDGE

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
    constant = int(widths.fold_bits > 0 or not coding.site.site.normalised)
    inputs = coding.tokens.shape[1] if widths.fold_bits else 0
    others, listed = constant + inputs, len(columns)  # terms that are not values come first
    gram = torch.zeros(others + listed, others + listed, dtype=torch.float64, device="cpu")
    cross = torch.zeros(len(gram), len(bias), dtype=torch.float64, device="cpu")
    total = 0.0
    tokens = thinned(coding.tokens, PER_TERM * len(gram))
    for x in tokens.split(TOGETHER):
        exact, added = coding.outputs(x), values(x)
        weight = token_weights(exact)
        terms = torch.cat([torch.ones_like(x[:, :constant]), x[:, :inputs], added], 1)
        gram += (weight * terms).T @ terms
        cross += (weight * terms).T @ (exact - bias - added @ columns)
        total += float(weight.sum())
    ridge = torch.zeros(len(gram), dtype=torch.float64, device="cpu")
    diagonal = gram.diagonal()
    if inputs:
        ridge[constant:others] = RIDGE * (diagonal - gram[0].square() / total)[constant:others].mean()
    ridge[others:] = listed / max(1, len(tokens)) * diagonal[others:].mean()
    diagonal += ridge  # of the Gram matrix, in place
    lower = factor(gram, damping=0.0)
    wanted = columns + torch.cholesky_solve(cross, lower)[others:].float()
    # What the other terms leave of the values: the Schur complement of their block.
    left = lower[others:, others:] @ lower[others:, others:].T
    left.diagonal().sub_(ridge[others:]).clamp_(min=0)
    feedback, rotated = Feedback.from_gram(left), rotate(wanted, coding.out_signs)
    base = code_columns(rotated, feedback, widths.column_bits)
    refinement = code_columns(rotated - base.weight, feedback, widths.column_low_bits)
    tensors = {"columns": base.rows, "columns_refinement": refinement.rows}
    change = rotate_back(base.weight + refinement.weight, coding.out_signs) - columns
    rest = cross[:others] - gram[:others, others:] @ change.double()
    if inputs:
        weight = torch.cholesky_solve(rest, lower[:others, :others])[constant:].T
        fold = coding.fold(weight, widths.fold_bits)
        rest = rest - gram[:others, constant:others] @ coding.folded(fold).double().T
        tensors["fold"] = fold.rows
    return tensors, bias + (rest[0] / total).float() if constant else bias
