"""Statistics of the operands of an FFN's matrices: the site's inputs and, for W2, the neurons' responses.

Both come from the original weights: W2 is fitted to the output of the dense matrices before it. The authors of Wanda,
SparseGPT and GPTQ likewise collect a block's statistics before they change it. Held-back tokens are excluded.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from tardis_fx.observation.site import Merge, ObservedSite, fitted_tokens
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.neurons import Neurons


class Operands:
    """Base class of observers that receive the operands of the matrices for the fitted tokens.

    Attributes:
        neurons: of the original site, in float32.
    """

    def __init__(self, site: ObservedSite) -> None:
        self.neurons = Neurons.from_site(site)

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        x = x[: fitted_tokens(len(x))]
        self.add(x, self.neurons.evaluate(x)[1])

    def add(self, x: Float32[Tensor, "tokens d"], hidden: Float32[Tensor, "tokens h"]) -> None:
        """Adds inputs and responses."""
        raise NotImplementedError


class ByMatrix(Operands):
    """Operands with one statistic for each matrix."""

    def for_matrix(self, name: str) -> Tensor:
        """The statistic of the operand of the named matrix."""
        raise NotImplementedError


class ColumnNorms(ByMatrix):
    """Norms of the operands by column, float64.

    Attributes:
        tokens: number of tokens seen.
        magnitude: sum of the absolute responses of each neuron.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"tokens": "sum", "_inputs": "sum", "_hidden": "sum", "magnitude": "sum"}

    def __init__(self, site: ObservedSite) -> None:
        super().__init__(site)
        (h, d), self.tokens = site.weights.up.shape, 0
        self._inputs, self._hidden, self.magnitude = (
            torch.zeros(n, dtype=torch.float64, device="cpu") for n in (d, h, h)
        )

    def add(self, x: Float32[Tensor, "tokens d"], hidden: Float32[Tensor, "tokens h"]) -> None:
        """Adds sums of squares and of absolute values."""
        self.tokens += len(x)
        self._inputs += x.square().sum(0, dtype=torch.float64)
        self._hidden += hidden.square().sum(0, dtype=torch.float64)
        self.magnitude += hidden.abs().sum(0, dtype=torch.float64)

    def for_matrix(self, name: str) -> Float64[Tensor, " columns"]:
        """Norms of the columns of a matrix's operand."""
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

    def add(self, x: Float32[Tensor, "tokens d"], hidden: Float32[Tensor, "tokens h"]) -> None:
        """Adds tokens to both Gram matrices."""
        self._inputs.update(x)
        self._hidden.update(hidden)

    def for_matrix(self, name: str) -> Float64[Tensor, "columns columns"]:
        """The Gram matrix of a matrix's operand."""
        return (self._hidden if name == "down" else self._inputs).gram
