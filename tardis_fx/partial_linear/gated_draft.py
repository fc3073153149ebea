"""A gated site's plan in the making."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.partial_linear.draft import Draft
from tardis_fx.partial_linear.products import Products, ScoreHistogram
from tardis_fx.partial_linear.ranges import Costs, Ranges, SiteRanges
from tardis_fx.runtime.packing import low_bits

if TYPE_CHECKING:
    from tardis_fx.partial_linear.products import ProductSums
    from tardis_fx.quantisation import Quantised


class GatedRanges(SiteRanges):
    """A gated site's surrogates, and its classes and thresholds as a function of the price of a byte.

    As :class:`SiteRanges`, but for two things: a surrogate is a plane, and hot are the bins below a threshold of the
    score, so that the best hot bins of a neuron are a cheapest prefix.
    """

    def __init__(self, products: ProductSums, w2_norm: Tensor, costs: Costs) -> None:
        """Starts with the planes that fit all tokens.

        Args:
            products: sums by bins of the score.
            w2_norm: [h], norms of the columns of W2.
            costs: bytes.
        """
        self.products = products
        self._begin(products.count, w2_norm, costs)

    def refit(self, hot: Tensor) -> None:
        """Fits the planes to the hot bins; an exact neuron's is zero, which keeps it out of the fold."""
        self.plane = self.products.regress(hot)
        self._error = self.products.error(*self.plane) * self._importance

    def _cheapest(self, values: Tensor) -> tuple[Tensor, Tensor]:
        prefix = torch.cat([torch.zeros_like(values[:1]), values.cumsum(0)])
        stop = prefix.argmin(0)
        return torch.zeros_like(stop), stop


@dataclass(eq=False)
class GatedDraft(Draft):
    """A gated site's plan in the making, in float32 on the CPU: ``up`` and ``predictor`` are those of up."""

    def __post_init__(self) -> None:
        """Quantises the predictors of both projections."""
        super().__post_init__()
        weights = self.site.weights
        assert weights.gate is not None  # the matcher found the site gated
        self.gate = weights.gate.float().cpu()
        self.gate_bias = None if weights.gate_bias is None else weights.gate_bias.float().cpu()
        self.gate_predictor: Quantised = self._quantised(self.gate, self.bits)
        self._gate_low = cache(lambda bits: self._quantised(self.gate - self.gate_predictor.weight, bits))

    @property
    def biased(self) -> bool:
        """Whether gate or up projection has a bias."""
        return self.up_bias is not None or self.gate_bias is not None

    @property
    def low(self) -> tuple[Quantised, ...] | None:
        """What corrections read of gate and up projection beside the predictors; None for the original weights."""
        if self.row_bits == 16:
            return None
        bits = low_bits(self.bits, self.row_bits)
        return self._gate_low(bits), self._low(bits)

    def products(self) -> Products:
        """Empty sums, from which :meth:`prepare` takes the planes that the score is measured from."""
        return Products(len(self.up), self.neurons)

    def prepare(self, products: Products) -> None:
        """Fixes the score."""
        self.line, self._missed = products.plane, products.missed

    def histogram(self) -> ScoreHistogram:
        """An empty histogram of the scores."""
        return ScoreHistogram(self._missed, self.neurons, lambda x: self.score(*self.estimates(x)))

    def neurons(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exact pre-activations of gate and up and their products, [tokens, h] each, from [tokens, d]."""
        return self.product(F.linear(x, self.gate, self.gate_bias), F.linear(x, self.up, self.up_bias))

    def estimates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same as the predictors have them."""
        g, u = self.gate_predictor(x), self.predictor(x)
        return self.product(
            g if self.gate_bias is None else g + self.gate_bias, u if self.up_bias is None else u + self.up_bias
        )

    def product(self, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations with their products, [tokens, h] each."""
        return g, u, self.activation.eager(g) * u

    def score(self, g: Tensor, u: Tensor, p: Tensor) -> Tensor:
        """How far products are from the planes that all tokens gave, [tokens, h]."""
        alpha, beta, gamma = self.line.unbind(1)
        return (p - alpha * g - beta * u - gamma).abs()

    def settle(self, surrogate: SiteRanges, ranges: Ranges, edges: Tensor) -> None:
        """Fixes thresholds, classes and surrogates; see :meth:`Draft.settle`."""
        assert isinstance(surrogate, GatedRanges)
        self.plane = torch.stack(surrogate.plane, 1).float()
        self.guarded, self.exact = ranges.guarded, ranges.exact
        self.threshold = edges.gather(0, ranges.hot.sum(0)[None])[0]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The guard: guarded neurons first, then the exact ones; with quantised rows, those of the same neurons.

        There exact neurons are guarded ones that every score exceeds, for their rows are nested in the predictors'.
        """
        guarded, exact = self.guarded.nonzero()[:, 0], self.exact.nonzero()[:, 0]
        neurons = torch.cat([guarded, exact])
        rows = {}
        if self.low is not None:
            guarded = neurons
            rows = {"gate": self.low[0].rows[neurons], "up": self.low[1].rows[neurons]}
            rows["columns"] = self._columns(self.row_bits).rows[neurons]
        predictors = self.gate_predictor, self.predictor
        return rows | {
            "neurons": neurons.int(),
            "codes": torch.stack([q.codes[guarded] for q in predictors], 1),
            "scale": torch.stack([q.scale[guarded] for q in predictors], 1),
            "zero": torch.stack([q.zero[guarded] for q in predictors], 1),
            "guard": torch.cat([self.line, self.threshold[:, None]], 1)[guarded],
            "surrogate": self.plane[neurons],
        }

    def fold(self) -> tuple[Tensor, Tensor]:
        """Folded weight [d_out, d] and bias [d_out], float64: every neuron by its plane."""
        down, (alpha, beta, shift) = self.down.double(), self.plane.double().unbind(1)
        for slope, bias in ((alpha, self.gate_bias), (beta, self.up_bias)):
            shift = shift if bias is None else shift + slope * bias.double()
        weight = (down * alpha) @ self.gate.double() + (down * beta) @ self.up.double()
        folded_bias = down @ shift
        return weight, folded_bias if self.down_bias is None else folded_bias + self.down_bias.double()
