"""How much the error of a site moves the model's output: measured with the site in codes."""

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.batches import Batch
from tardis_fx.partial_linear.coding import Coding, token_weights
from tardis_fx.runtime.rotation import rotate, rotate_back
from tardis_fx.statistics.divergence import divergence

#: Bits of the codes of all matrices.
BITS = 3


class CodedSite:
    """The FFN of a site with all matrices in codes, which notes its error.

    Codes and not noise make the error, because errors of many tokens may point one way. In an encoder, a decoder
    averages noise out.
    """

    def __init__(self, coding: Coding) -> None:
        self._coding, self._squares, self._tokens = coding, 0.0, 0

    def __call__(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d_out"]:
        """Computes the FFN."""
        neurons, tokens = self._coding.neurons, x.reshape(-1, x.shape[-1]).float().cpu()
        rotated = rotate(tokens, self._coding.signs)
        z = neurons.add_biases([self._coding.projection(i, BITS)(rotated) for i in range(len(neurons.projections))])
        columns = rotate_back(self._coding.columns(BITS).weight, self._coding.out_signs)
        output, exact = neurons.response(z) @ columns, neurons(tokens)
        if neurons.down_bias is not None:
            output = output + neurons.down_bias
        self._squares += float((token_weights(exact) * (output - exact).square()).sum())
        self._tokens += len(tokens)
        return output.view(*x.shape[:-1], -1).to(x.device, x.dtype)

    @property
    def error(self) -> float:
        """Mean squared error relative to the output of each token."""
        return self._squares / max(1, self._tokens)


def influence(site: CodedSite, batch: Batch, dense: Any, changed: Any) -> float | None:
    """Divergence of the model's output for a relative squared error of 1; None if there is nothing to compare."""
    try:
        return float(divergence(changed, dense, batch)) / site.error if site.error else math.nan
    except CalibrationError:  # no floating-point output
        return None


def weighed(influences: Sequence[float]) -> list[float]:
    """Influences for all sites: one that is not known, or no positive number, is taken for the mean of the others."""
    known = [influence for influence in influences if 0 < influence < math.inf]
    mean = sum(known) / len(known) if known else 1.0
    return [influence if 0 < influence < math.inf else mean for influence in influences]
