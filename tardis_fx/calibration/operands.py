"""What the two matrices of an FFN multiply: the site's inputs, and the activations of its neurons.

Both are those of the original weights: W2 is fitted to what the dense W1 gives, as the authors of Wanda, SparseGPT and
GPTQ do when they collect a block's statistics before they change anything in it. The tokens that measure the error are
left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F  # noqa: N812

from tardis_fx.calibration.profile import Moments
from tardis_fx.calibration.regression import fitted_tokens
from tardis_fx.graph.activations import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from tardis_fx.calibration.merging import Merge
    from tardis_fx.calibration.observe import ObservedSite


class Dense:
    """A site as it is, in float32 on the CPU."""

    def __init__(self, site: ObservedSite) -> None:
        """Copies the weights."""
        weights = site.weights
        self.w1, self.w2 = weights.w1.float().cpu(), weights.w2.float().cpu()
        self.b1, self.b2 = (None if bias is None else bias.float().cpu() for bias in (weights.b1, weights.b2))
        self._activation = ACTIVATIONS[str(site.site.activation)]

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations and activations of the neurons, [tokens, h], from [tokens, d]."""
        z = F.linear(x, self.w1, self.b1)
        return z, self._activation.eager(z)

    def output(self, activated: Tensor) -> Tensor:
        """The site's output, [tokens, d_out], from activations, [tokens, h]."""
        return F.linear(activated, self.w2, self.b2)


class Operands:
    """Shows the fitted tokens to :meth:`add` as what each matrix multiplies."""

    def __init__(self, site: ObservedSite) -> None:
        """Starts with no tokens."""
        self._dense = Dense(site)

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        x = x[: fitted_tokens(len(x))]
        self.add(x, self._dense.hidden(x)[1])

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """Adds inputs, [tokens, d], and the neurons' activations, [tokens, h], both float32."""
        raise NotImplementedError


class Sizes(Operands):
    """How large the operands are, column by column; float64.

    Attributes:
        tokens: how many were seen.
        magnitude: [h], sum of the neurons' absolute activations.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"tokens": "sum", "_up": "sum", "_down": "sum", "magnitude": "sum"}

    def __init__(self, site: ObservedSite) -> None:
        """Starts at zero."""
        super().__init__(site)
        (h, d), self.tokens = self._dense.w1.shape, 0
        self._up, self._down, self.magnitude = (torch.zeros(n, dtype=torch.float64) for n in (d, h, h))

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """Adds sums of squares and of absolute values."""
        self.tokens += len(x)
        self._up += x.square().sum(0, dtype=torch.float64)
        self._down += hidden.square().sum(0, dtype=torch.float64)
        self.magnitude += hidden.abs().sum(0, dtype=torch.float64)

    @property
    def up(self) -> Tensor:
        """Norms of the columns of the inputs, [d]."""
        return self._up.sqrt()

    @property
    def down(self) -> Tensor:
        """Norms of the columns of the activations, [h]."""
        return self._down.sqrt()


class Grams(Operands):
    """Moments of both operands.

    Memory: d² + h² float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"up": "parts", "down": "parts"}

    def __init__(self, site: ObservedSite) -> None:
        """Starts at zero."""
        super().__init__(site)
        h, d = self._dense.w1.shape
        self.up, self.down = Moments(d), Moments(h)

    def add(self, x: Tensor, hidden: Tensor) -> None:
        """Adds to both."""
        self.up.update(x)
        self.down.update(hidden)
