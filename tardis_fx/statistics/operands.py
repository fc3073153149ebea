"""What the matrices of an FFN multiply: the site's inputs, and, for W2, what its neurons give.

Both are those of the original weights: W2 is fitted to what the dense matrices before it give, as the authors of Wanda,
SparseGPT and GPTQ do when they collect a block's statistics before they change anything in it. The tokens that measure
the error are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.regression import fitted_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tardis_fx.observation.merging import Merge
    from tardis_fx.observation.observe import ObservedSite


class Operands:
    """Shows the fitted tokens to :meth:`add` as what the matrices multiply.

    Attributes:
        neurons: the site as it is, in float32.
    """

    def __init__(self, site: ObservedSite) -> None:
        self.neurons = Neurons.from_site(site)

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        x = x[: fitted_tokens(len(x))]
        self.add(x, self.neurons.evaluate(x)[1])

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """Adds inputs, [tokens, d], and what the neurons give, [tokens, h], both float32."""
        raise NotImplementedError


class ByMatrix(Operands):
    """Operands that tell for each matrix of what it multiplies."""

    def of(self, name: str) -> Tensor:
        """What was measured of that which a matrix multiplies."""
        raise NotImplementedError


class Sizes(ByMatrix):
    """How large the operands are, column by column; float64.

    Attributes:
        tokens: how many were seen.
        magnitude: [h], sum of the absolute values of what the neurons give.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"tokens": "sum", "_inputs": "sum", "_hidden": "sum", "magnitude": "sum"}

    def __init__(self, site: ObservedSite) -> None:
        super().__init__(site)
        (h, d), self.tokens = site.weights.up.shape, 0
        self._inputs, self._hidden, self.magnitude = (
            torch.zeros(n, dtype=torch.float64, device="cpu") for n in (d, h, h)
        )

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """Adds sums of squares and of absolute values."""
        self.tokens += len(x)
        self._inputs += x.square().sum(0, dtype=torch.float64)
        self._hidden += hidden.square().sum(0, dtype=torch.float64)
        self.magnitude += hidden.abs().sum(0, dtype=torch.float64)

    def of(self, name: str) -> Tensor:
        """Norms of the columns of what a matrix multiplies, [columns]."""
        return (self._hidden if name == "down" else self._inputs).sqrt()


class Grams(ByMatrix):
    """Gram matrices of the operands.

    Memory: d² + h² float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"_inputs": "parts", "_hidden": "parts"}

    def __init__(self, site: ObservedSite) -> None:
        super().__init__(site)
        h, d = site.weights.up.shape
        self._inputs, self._hidden = Moments(d), Moments(h)

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """Adds to both."""
        self._inputs.update(x)
        self._hidden.update(hidden)

    def of(self, name: str) -> Tensor:
        """The Gram matrix of what a matrix multiplies, [columns, columns]."""
        return (self._hidden if name == "down" else self._inputs).gram
