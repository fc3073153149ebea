"""The regressed fold: an affine map fitted to the residual of fold and correction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tardis_fx.observation.site import Merge, fitted_tokens
from tardis_fx.statistics.moments import Moments, precise

#: Ridge, as a share of the mean variance of an input.
RIDGE = 1e-3


def relative_error(missed: float, total: float) -> float:
    """Root of a sum of squared errors relative to a sum of squared outputs.

    For zero outputs it is 0 without an error and infinite otherwise; NaN stays NaN.
    """
    if total == 0:
        return 0.0 if missed == 0 else missed * math.inf
    return math.sqrt(missed / total) if missed / total >= 0 else math.nan


def minimum_ridge(shares: Float64[Tensor, " d"], noise: Float64[Tensor, " d"]) -> Float64[Tensor, ""]:
    """The mean of shares of variances, at least their mean rounding error."""
    return torch.maximum(shares.mean(), noise.mean()).clamp(min=1e-30)


class Residual:
    """Sums of a residual and the inputs, separately for fitted and held-back tokens.

    Memory: d² + 2 d d_out float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"_fitted": "parts", "_held": "parts"}

    def __init__(self, d: int, d_out: int) -> None:
        self._fitted, self._held = Products(d, d_out), Products(d, d_out)

    def update(
        self,
        x: Float[Tensor, "tokens d"],
        residual: Float[Tensor, "tokens d_out"],
        output: Float[Tensor, "tokens d_out"],
        weight: Float[Tensor, "tokens 1"] | None = None,
    ) -> None:
        """Adds tokens, their residuals (the exact output minus the current approximation) and their exact outputs.

        The fit gives each token its weight; None is 1. Errors are measured without weights.
        """
        cut = fitted_tokens(len(x))
        self._fitted.update(x[:cut], residual[:cut], output[:cut], None if weight is None else weight[:cut])
        self._held.update(x[cut:], residual[cut:], output[cut:])

    def solve(
        self, ridge: Float64[Tensor, " free"] | None = None, fixed: Float64[Tensor, "fixed d_out"] | None = None
    ) -> "AffineMap":
        """Ridge regression of the residual on the inputs of the fitted tokens.

        Args:
            ridge: added to the variances of the inputs; None means :data:`RIDGE` times their mean.
            fixed: last rows of the map.
        """
        fitted = self._fitted
        free = len(fitted.cross) - (0 if fixed is None else len(fixed))
        mean, target, covariance = fitted.inputs.mean, fitted.total / fitted.inputs.tokens, fitted.inputs.covariance
        cross = (fitted.cross / fitted.inputs.tokens - torch.outer(mean, target))[:free]
        if fixed is not None:
            cross -= covariance[:free, free:] @ fixed
        covariance = covariance[:free, :free]
        if ridge is None:
            ridge = minimum_ridge(RIDGE * covariance.diagonal(), fitted.inputs.noise[:free])
        covariance.diagonal().add_(ridge)
        weight = torch.linalg.solve(covariance, cross, left=True)
        if fixed is not None:
            weight = torch.cat([weight, fixed])
        return AffineMap(weight, target - mean @ weight)

    @property
    def energy(self) -> float:
        """Mean square of the exact output, summed over its features, on the held-back tokens."""
        half = self._measuring
        return half.output_square / max(1, half.inputs.tokens)

    def error(self, weight: Float64[Tensor, "d d_out"], bias: Float64[Tensor, " d_out"]) -> float:
        """Root-mean-square error that a map leaves on the held-back tokens, relative to the output."""
        half = self._measuring
        return relative_error(half.missed(weight, bias), half.output_square)

    def missed(self, weight: Float64[Tensor, "d d_out"], bias: Float64[Tensor, " d_out"]) -> float:
        """Mean squared error that a map leaves on the held-back tokens."""
        half = self._measuring
        return half.missed(weight, bias) / max(1, half.inputs.tokens)

    def explained(self, weight: Float64[Tensor, "d d_out"], bias: Float64[Tensor, " d_out"]) -> float:
        """R²: share of the residual's variance on the held-back tokens that a map explains."""
        half = self._measuring
        variance = half.square - float(half.total.square().sum()) / max(1, half.inputs.tokens)
        return 1.0 if variance <= 0 else 1 - half.missed(weight, bias) / variance

    @property
    def mean(self) -> Float64[Tensor, " d_out"]:
        """Mean residual of the fitted tokens."""
        return self._fitted.total / self._fitted.inputs.tokens

    @property
    def inputs(self) -> Moments:
        """Moments of the inputs of the fitted tokens."""
        return self._fitted.inputs

    @property
    def _measuring(self) -> "Products":
        return self._held if self._held.inputs.tokens else self._fitted


class Products:
    """Sums over tokens of products of inputs with themselves and with a residual.

    Memory: d² / 2 + d d_out float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {
        "inputs": "parts", "cross": "sum", "total": "sum", "square": "sum", "output_square": "sum",
    }  # fmt: skip

    def __init__(self, d: int, d_out: int) -> None:
        self.inputs = Moments(d)
        self.cross = torch.zeros(d, d_out, dtype=torch.float64, device="cpu")
        self.total = torch.zeros(d_out, dtype=torch.float64, device="cpu")
        self.square = 0.0
        self.output_square = 0.0

    def update(
        self,
        x: Float[Tensor, "tokens d"],
        residual: Float[Tensor, "tokens d_out"],
        output: Float[Tensor, "tokens d_out"],
        weight: Float[Tensor, "tokens 1"] | None = None,
    ) -> None:
        """Adds tokens: see :meth:`Residual.update`."""
        self.inputs.update(x, weight)
        weighted = residual if weight is None else weight * residual
        x = precise(x)
        self.cross += x.T @ weighted.to(x.dtype)
        self.total += weighted.sum(0, dtype=torch.float64)
        self.square += residual.double().square().sum().item()
        self.output_square += output.double().square().sum().item()

    def missed(self, weight: Float64[Tensor, "d d_out"], bias: Float64[Tensor, " d_out"]) -> float:
        """Sum of the squares of residual - (x weight + bias), from the sums."""
        count, inputs = self.inputs.tokens, self.inputs.total
        predicted = ((self.inputs.gram @ weight) * weight).sum() + 2 * (inputs @ weight) @ bias + count * bias @ bias
        crossed = (self.cross * weight).sum() + self.total @ bias
        missed: float = self.square - 2 * crossed.item() + predicted.item()
        return 0.0 if missed < 0 else missed  # max() would turn NaN into 0


@dataclass(frozen=True)
class AffineMap:
    """A fitted affine map, ``x weight + bias``."""

    weight: Float64[Tensor, "d d_out"]
    bias: Float64[Tensor, " d_out"]
