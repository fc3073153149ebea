"""What the matrices of an FFN multiply: the site's inputs, and, for W2, what its neurons give.

Both are those of the original weights: W2 is fitted to what the dense matrices before it give, as the authors of Wanda,
SparseGPT and GPTQ do when they collect a block's statistics before they change anything in it. The tokens that measure
the error are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.graph.feed_forward import activations, biases, linear, matrices, preactivations
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.regression import fitted_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tardis_fx.observation.merging import Merge
    from tardis_fx.observation.observe import ObservedSite


class ReferenceFFN:
    """A site as it is, in float32 on the CPU."""

    def __init__(self, site: ObservedSite) -> None:
        """Copies the weights."""
        own = matrices(site.weights) | biases(site.weights)
        self._tensors = {name: tensor.float().cpu() for name, tensor in own.items()}
        self._activation = str(site.site.activation)

    @property
    def up(self) -> Tensor:
        """[h, d]."""
        return self._tensors["up"]

    @property
    def down(self) -> Tensor:
        """[d_out, h]."""
        return self._tensors["down"]

    def hidden(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Pre-activations (of a gated site, gate's and W1's) and what the neurons give, [tokens, h], of [tokens, d]."""
        z = preactivations(x, self._project, gated="gate" in self._tensors)
        return list(z.values()), activations(z, self._activation)

    def output(self, hidden: Tensor) -> Tensor:
        """The site's output, [tokens, d_out], from what the neurons give, [tokens, h]."""
        return self._project(hidden, "down")

    def __call__(self, x: Tensor) -> Tensor:
        """The site's output, [tokens, d_out], of its inputs, [tokens, d]."""
        return self.output(self.hidden(x)[1])

    def _project(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self._tensors, name)


class Operands:
    """Shows the fitted tokens to :meth:`add` as what the matrices multiply.

    Attributes:
        ffn: the site as it is.
    """

    def __init__(self, site: ObservedSite) -> None:
        """Starts with no tokens."""
        self.ffn = ReferenceFFN(site)

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        x = x[: fitted_tokens(len(x))]
        self.add(x, self.ffn.hidden(x)[1])

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
        """Starts at zero."""
        super().__init__(site)
        (h, d), self.tokens = self.ffn.up.shape, 0
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
        """Starts at zero."""
        super().__init__(site)
        h, d = self.ffn.up.shape
        self._inputs, self._hidden = Moments(d), Moments(h)

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """Adds to both."""
        self._inputs.update(x)
        self._hidden.update(hidden)

    def of(self, name: str) -> Tensor:
        """The Gram matrix of what a matrix multiplies, [columns, columns]."""
        return (self._hidden if name == "down" else self._inputs).gram
