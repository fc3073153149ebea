"""Candidates for a site's plan: what is read at some widths and a price, measured on held-back tokens."""

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from tardis_fx.partial_linear.calls import coded_biases, coded_call
from tardis_fx.partial_linear.coding import TOGETHER, Coding, token_weights
from tardis_fx.partial_linear.precision import Pricing, Widths
from tardis_fx.partial_linear.refit import refit
from tardis_fx.quantisation import Rows
from tardis_fx.runtime import coded_reference, tables
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.touched import Touched
from tardis_fx.statistics.regression import RIDGE, minimum_ridge, relative_error


@dataclass(frozen=True, eq=False)
class Candidate:
    """A site at some widths and at the price that meets the budget, with what it does to held-back tokens.

    Attributes:
        tensors: of the plan, but for the bias.
        bias: of the output.
        touched: bytes per token.
        read: share of the neurons whose columns are read.
        error: mean squared error, relative to the output of each token, times the influence of the site.
        missed: root of the mean squared error, relative to that of the output.
    """

    coding: Coding
    widths: Widths
    tensors: dict[str, Tensor]
    bias: Float32[Tensor, " d_out"]
    touched: float
    read: float
    error: float
    missed: float

    @classmethod
    def from_pricing(cls, pricing: Pricing, price: float) -> "Candidate":
        """Measures a settled site on held-back tokens."""
        coding, widths = pricing.coding, pricing.widths
        neurons, listed = coding.neurons, pricing.listed.nonzero()[:, 0]

        def kept(rows: Rows) -> Tensor:
            return rows.rows if len(listed) == len(neurons) else rows.rows[listed]  # no copy of what many share

        tensors = {
            "neurons": listed.int(), "norms": pricing.norms, "noise": pricing.tokens.noise,
            "thresholds": pricing.thresholds(price),
            "signs": coding.signs, "out_signs": coding.out_signs,
            "columns": kept(coding.columns(widths.column_bits)),
            "columns_refinement": kept(coding.column_refinement(widths.column_bits, widths.column_low_bits)),
        }  # fmt: skip
        for i, name in enumerate(coding.site.weights.projections):
            tensors[name] = kept(coding.projection(i, widths.bits))
            tensors[f"{name}_refinement"] = kept(coding.refinement(i, widths.bits, widths.low_bits))
        if widths.fold_bits:
            tensors["surrogate"] = pricing.surrogate[listed].bfloat16()
        bias = torch.zeros(len(neurons.down), dtype=torch.float32, device="cpu")
        bias = bias if neurons.down_bias is None else neurons.down_bias
        made = cls(coding, widths, tensors, bias, *[math.nan] * 4)
        call, touched = made.call(coding.held), Touched()
        output, parts = coded_reference.evaluate(call)
        touched.add(call, parts)
        made = replace(made, touched=touched.per_token, read=touched.outlier_rate)
        return made._fitted(output, pricing.influence)

    def _fitted(self, output: Float32[Tensor, "held d_out"], influence: float) -> "Candidate":
        """With the fold and the bias that leave the least error of the sample, and with that of held-back tokens.

        Args:
            output: what the neurons give for the held-back tokens.
            influence: of the site, by which the error counts.
        """
        coding, tensors, bias = self.coding, self.tensors, self.bias
        rest = coding.held_outputs - output
        if self.widths.fold_bits or not coding.site.site.normalised:
            x, exact = coding.sample, coding.outputs(coding.sample)
            left, known = exact - self(x), token_weights(exact)
            if self.widths.fold_bits:
                fold = coding.fold(_regressed(x, left, known), self.widths.fold_bits)
                matrix = coding.folded(fold).T
                left, rest, tensors = left - x @ matrix, rest - coding.held @ matrix, tensors | {"fold": fold.rows}
            bias = (known * left).sum(0) / known.sum()
        return replace(self, tensors=tensors, bias=bias)._measured(rest - bias, influence)

    def refitted(self) -> "Candidate":
        """With columns, fold and bias fitted to more tokens, if less of held-back ones is missed then.

        Raises:
            CalibrationError: sums over the tokens overflow.
        """
        coding = self.coding
        columns = coding.neurons.down.T[self.tensors["neurons"].long()]
        tensors, bias = refit(
            coding, self.widths, columns, self.bias, lambda x: coded_reference.added_values(self.call(x))
        )
        made = replace(self, tensors=self.tensors | tensors, bias=bias)
        made = made._measured(coding.held_outputs - made(coding.held) - bias)
        return made if made.missed < self.missed else self

    def _measured(self, missed: Float32[Tensor, "held d_out"], influence: float = 1.0) -> "Candidate":
        """With the errors, from what is missed of the outputs of held-back tokens."""
        wanted, squares = self.coding.held_outputs, missed.double().square().sum(1, keepdim=True)
        return replace(
            self,
            error=influence * float((token_weights(wanted) * squares).mean()),
            missed=relative_error(float(squares.sum()), float(wanted.double().square().sum())),
        )

    @property
    def settings(self) -> dict[str, str | int]:
        """The settings of the plan."""
        site = self.coding.site.site
        return {**self.widths._asdict(), "activation": str(site.activation), "relative": int(site.normalised)}

    def call(self, x: Float32[Tensor, "tokens d"]) -> CodedFFN:
        """The call of the op for tokens, with a bias of zeros, and a fold of zeros if none is fitted.

        Biases have the dtype of the weights, so that the bytes are those of the plan.
        """
        weights, d = self.coding.site.weights, x.shape[1]
        d_out = len(weights.down)
        tensors = self.tensors | {"bias": torch.zeros(d_out, dtype=weights.up.dtype, device=x.device)}
        if self.widths.fold_bits and "fold" not in tensors:
            size = tables.row_bytes(d, self.widths.fold_bits)
            tensors["fold"] = torch.zeros(d_out, size, dtype=torch.uint8, device=x.device)
        neurons = tensors["neurons"].long()
        tensors["listed"] = torch.tensor([len(neurons)], dtype=torch.int64, device=x.device)
        biases = [None if bias is None else bias.cpu()[neurons] for _, bias in weights.projections.values()]
        tensors |= coded_biases(biases, len(neurons), weights.up)
        return coded_call(x, tensors, self.settings)

    def __call__(self, x: Float32[Tensor, "tokens d"]) -> Float32[Tensor, "tokens d_out"]:
        """What the neurons give."""
        return torch.cat([coded_reference.coded_ffn(self.call(part)) for part in x.split(TOGETHER)])


def _regressed(
    x: Float32[Tensor, "tokens d"], rest: Float32[Tensor, "tokens d_out"], weight: Float32[Tensor, "tokens 1"]
) -> Float64[Tensor, "d_out d"]:
    """The affine map of tokens that leaves the least of a remainder; its weight."""
    total = weight.sum()
    x = x - (weight * x).sum(0) / total
    rest = rest - (weight * rest).sum(0) / total
    covariance, crossed = ((weight * x).T @ x).double(), ((weight * x).T @ rest).double()
    covariance.diagonal().add_(minimum_ridge(RIDGE * covariance.diagonal(), torch.zeros_like(covariance[0])))
    fitted: Tensor = torch.linalg.solve(covariance, crossed).T
    return fitted
