"""Regression of what an FFN gives, or of what some of its neurons give, on its inputs."""

from __future__ import annotations

from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.statistics.operands import Operands, ReferenceFFN
from tardis_fx.statistics.regression import Residual

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tardis_fx.observation.merging import Merge
    from tardis_fx.observation.observe import ObservedSite


class Outputs:
    """The regression of a site's whole output.

    Memory: 2 (d² + d d_out) float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"residual": "parts"}

    def __init__(self, site: ObservedSite, exact: Tensor | None = None) -> None:
        """Starts at zero.

        Args:
            site: the site.
            exact: [h], bool, neurons whose share of the output is left out of the regression; None for none.
        """
        self._ffn, self._exact = ReferenceFFN(site), exact
        self.residual = Residual(self._ffn.up.shape[1], len(self._ffn.down))

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        _, hidden = self._ffn.hidden(x)
        output = self._ffn.output(hidden)
        rest = output if self._exact is None else self._ffn.output(hidden.masked_fill(self._exact, 0))
        self.residual.update(x, rest, output)


class Neurons(Operands):
    """Sums over the fitted tokens by which each neuron's best affine surrogate is known, and what it misses.

    Attributes:
        sums: [h, k, k], float64: of the products of 1, the neuron's pre-activations (one, or gate's and W1's), and what
            it gives, in this order.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"sums": "sum"}

    def __init__(self, site: ObservedSite) -> None:
        """Starts at zero."""
        super().__init__(site)
        size = 4 if site.site.kind == "gated" else 3
        self.sums = torch.zeros(len(self.ffn.up), size, size, dtype=torch.float64, device="cpu")

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """Adds to the sums."""
        z, _ = self.ffn.hidden(x)
        terms = [t.double() for t in (torch.ones_like(hidden), *z, hidden)]
        for i, j in combinations_with_replacement(range(len(terms)), 2):
            total = (terms[i] * terms[j]).sum(0)
            self.sums[:, i, j] += total
            if i != j:
                self.sums[:, j, i] += total

    @property
    def missed(self) -> Tensor:
        """Of each neuron, the squared error of its surrogate in the site's output, [h], summed over the tokens."""
        return regress(self.sums)[2] * self.ffn.down.double().square().sum(0)


def regress(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares of what neurons give on their pre-activations.

    Args:
        sums: [h, k, k], as :attr:`Neurons.sums`.

    Returns:
        Slopes [h, k - 2], intercepts [h], and the squared errors left, [h], summed over the tokens.
    """
    count = sums[:, 0, 0].clamp(min=1)
    means = sums[:, 0, 1:] / count[:, None]
    seconds = sums[:, 1:, 1:] / count[:, None, None]
    covariance = seconds - means[:, :, None] * means[:, None, :]
    own, crossed = covariance[:, :-1, :-1], covariance[:, :-1, -1]
    noise = 1e-12 * (1 + seconds[:, :-1, :-1].diagonal(dim1=1, dim2=2).amax(1))  # variances below it may be rounding
    slopes = (torch.linalg.pinv(own, atol=noise, hermitian=True) @ crossed[..., None])[..., 0]
    intercepts = means[:, -1] - (slopes * means[:, :-1]).sum(1)
    return slopes, intercepts, count * (covariance[:, -1, -1] - (slopes * crossed).sum(1)).clamp(min=0)
