"""Regression of what an FFN gives, or of what some of its neurons give, on its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.calibration.operands import Dense, Operands
from tardis_fx.calibration.profile import Sums
from tardis_fx.calibration.regression import Residual

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tardis_fx.calibration.merging import Merge
    from tardis_fx.calibration.observe import ObservedSite


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
        self._dense, self._exact = Dense(site), exact
        self.residual = Residual(self._dense.w1.shape[1], len(self._dense.w2))

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        _, activated = self._dense.hidden(x)
        output = self._dense.output(activated)
        rest = output if self._exact is None else self._dense.output(activated.masked_fill(self._exact, 0))
        self.residual.update(x, rest, output)


class Neurons(Operands):
    """Sums over the fitted tokens by which each neuron's best affine surrogate is known, and what it misses."""

    merged: ClassVar[Mapping[str, Merge]] = {"_sums": "sum"}

    def __init__(self, site: ObservedSite) -> None:
        """Starts at zero."""
        super().__init__(site)
        self._sums = torch.zeros(6, 1, len(self._dense.w1), dtype=torch.float64)

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """Adds to the sums."""
        z, a = (t.double() for t in self._dense.hidden(x))
        self._sums += torch.stack([t.sum(0, keepdim=True) for t in (torch.ones_like(z), z, z * z, a, a * z, a * a)])

    @property
    def sums(self) -> Sums:
        """The sums so far, in one bin."""
        return Sums(*self._sums)

    @property
    def missed(self) -> Tensor:
        """Of each neuron, the squared error of its surrogate in the site's output, [h], summed over the tokens."""
        sums = self.sums
        error = sums.error(*sums.regress(torch.ones_like(sums.count, dtype=torch.bool)))[0]
        return error * self._dense.w2.double().square().sum(0)
