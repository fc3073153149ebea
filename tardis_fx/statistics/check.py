"""Measures the error of a site's replacement against the original on inputs not used to fit."""

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

from jaxtyping import Float, Float32
from torch import Tensor

from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.site import Merge, ObservedSite, fitted_tokens
from tardis_fx.statistics.regression import relative_error


class Check:
    """Observer that measures the error of a replacement in the model's own dtype."""

    merged: ClassVar[Mapping[str, Merge]] = {"_missed": "sum", "_total": "sum", "_tokens": "sum"}

    def __init__(self, site: ObservedSite, replacement: Callable[[Tensor], Tensor], *, held_back: bool = False) -> None:
        """Prepares the measurement of a replacement of a site, with ``held_back`` only on tokens that no fit uses."""
        self._site, self._replacement, self._held_back = site, replacement, held_back
        self._missed, self._total, self._tokens = 0.0, 0.0, 0

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        weights = self._site.weights
        cut = fitted_tokens(len(x)) if self._held_back else 0
        tokens = x[cut:].to(weights.up.device, weights.up.dtype)
        self._tokens += len(tokens)
        exact = original(weights, str(self._site.site.activation), tokens).float()
        output = self._replacement(tokens).float()
        self._missed += float((output - exact).double().square().sum())
        self._total += float(exact.double().square().sum())

    @property
    def error(self) -> float:
        """Root-mean-square error relative to that of the output; NaN without tokens."""
        return relative_error(self._missed, self._total) if self._tokens else math.nan


def original(weights: SiteWeights, activation: str, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d_out"]:
    """Applies the original FFN of a site."""
    return dense(x, matrices(weights) | biases(weights), activation)
