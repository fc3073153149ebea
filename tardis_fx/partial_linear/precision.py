"""Chooses how precisely neurons are computed, by the price of a byte.

For every token, the estimates of a neuron say what each of its parts would change in the output: the column (with its
base codes), the refinements of its projections, the refinement of the column, and in a gated FFN everything after the
gate. A part is read if the square of that change is worth its bytes at the price: relative to the token's scale if the
output is normalised, and otherwise to the median square of the outputs. Errors count as much as they move the model's
output (:mod:`tardis_fx.partial_linear.influence`). One price for all sites meets the budget.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Bool, Float32
from torch import Tensor

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.site import thinned
from tardis_fx.partial_linear.coding import Coding, token_weights
from tardis_fx.runtime import tables
from tardis_fx.runtime.coded import NeuronBytes, neuron_bytes
from tardis_fx.runtime.coded_reference import doubt, values
from tardis_fx.runtime.reference import response
from tardis_fx.runtime.rotation import rotate
from tardis_fx.statistics.surrogates import Sums, products

#: Pairs of token and neuron on which quantities are priced at a site.
PRICED = 2**19
#: Rounds of pricing and refitting the surrogates.
ROUNDS = 4


class Widths(NamedTuple):
    """Bits per weight: of the projections, their refinements, the columns, theirs, and the fold (0: there is none)."""

    bits: int
    low_bits: int
    column_bits: int
    column_low_bits: int
    fold_bits: int


@dataclass(frozen=True, eq=False)
class Sizes:
    """Bytes that a site takes at some widths.

    Attributes:
        fixed: of the fold, the bias, the signs, the noise and the thresholds.
        neuron: of a neuron's parts.
        k: projections of a neuron.
        listed: number of neurons that have base codes.
    """

    fixed: int
    neuron: NeuronBytes
    k: int
    listed: int

    @classmethod
    def from_coding(cls, coding: Coding, widths: Widths) -> "Sizes":
        """The sizes of a site."""
        weights, fold = coding.site.weights, widths.fold_bits > 0
        (d, d_out), size = (weights.up.shape[1], len(weights.down)), weights.up.element_size()
        k, bias = len(weights.projections), any(bias is not None for _, bias in weights.projections.values())
        fixed = d_out * size + d + d_out + 4 * k + 4 * (k + 2)
        fixed += d_out * tables.row_bytes(d, widths.fold_bits) if fold else 0
        neuron = neuron_bytes(d, d_out, widths[:4], k=k, bias_bytes=size * bias, fold=fold)
        return cls(fixed, neuron, k, int(weights.down.any(0).sum()))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of the parts of a neuron that are read only where they are worth it."""
        size = self.neuron
        parts = {"value": size.column, "row": self.k * size.refinement, "column": size.column_refinement}
        return parts if self.k == 1 else {"up": size.projection, **parts}

    @property
    def least(self) -> int:
        """Bytes that every token reads."""
        return self.fixed + self.listed * (self.neuron.constants + self.neuron.projection)

    @property
    def most(self) -> int:
        """Bytes of everything."""
        return self.least + self.listed * sum(self.parts.values())


@dataclass(frozen=True, eq=False)
class Estimated:
    """Tokens at a site with estimates of the pre-activations at some widths, and the errors of the codes.

    Attributes:
        exact: the k pre-activations and the response, for surrogates; nothing without a fold.
        base: estimates.
        scales: of the rows of base codes.
        noise: root-mean-square errors of the estimates over the scales, for each projection.
        second: root mean square of the second pre-activation; of no use for k = 1.
        norm: squared norms of the columns of down.
        column_noise: squared errors of their base codes over the squared norms.
        weight: of the squared error of each token.
        scale: of each token, as the op computes it; 1 if thresholds are absolute.
        importance: the median of the squared scale over the squared norm of the output.
        activation: of the site.
    """

    exact: Sequence[Float32[Tensor, "tokens h"]]
    base: Sequence[Float32[Tensor, "tokens h"]]
    scales: Sequence[Float32[Tensor, " h"]]
    noise: Float32[Tensor, " k"]
    second: Float32[Tensor, " h"]
    norm: Float32[Tensor, " h"]
    column_noise: float
    weight: Float32[Tensor, "tokens 1"]
    scale: Float32[Tensor, "tokens 1"]
    importance: float
    activation: str

    @classmethod
    def from_coding(cls, coding: Coding, widths: Widths) -> "Estimated":
        """Computes the estimates of the sample."""
        neurons = coding.neurons
        x, name = thinned(coding.sample, max(1, PRICED // len(neurons))), neurons.activation.name
        exact, exact_response = neurons.evaluate(x)
        rotated = rotate(x, coding.signs)
        base = neurons.add_biases([coding.projection(i, widths.bits)(rotated) for i in range(len(exact))])
        columns = rotate(neurons.down.T, coding.out_signs)
        norm, second = columns.square().sum(1), exact[-1].square().mean(0).sqrt()
        output = neurons.output(exact_response)
        square = torch.ones_like(output[:, :1])
        if coding.site.site.normalised:
            size = norm if len(exact) == 1 else norm * second.square()
            square = (response(base[:1], name).square() * size).sum(1, keepdim=True)
            square = square.clamp(min=torch.finfo(torch.float32).tiny)
        errors = [(z - estimate).square().mean(0).sum() for z, estimate in zip(exact, base, strict=True)]
        scales = [tables.scales(coding.projection(i, widths.bits).rows).float() for i in range(len(exact))]
        squares = [scale.square().sum().clamp(min=torch.finfo(torch.float32).tiny) for scale in scales]
        missed = (columns - coding.columns(widths.column_bits).weight).square().sum()
        return cls(
            [*exact, exact_response] if widths.fold_bits else [],
            base,
            scales,
            (torch.stack(errors) / torch.stack(squares)).sqrt(),
            second,
            norm,
            float(missed / norm.sum().clamp(min=torch.finfo(torch.float32).tiny)),
            token_weights(output),
            square.sqrt(),
            float((square / output.square().sum(1, keepdim=True).clamp(min=1e-30)).median()),
            name,
        )


@dataclass(frozen=True, eq=False)
class Pricing:
    """A site at given widths, with its bytes and parts as functions of the price of a byte.

    Attributes:
        listed: neurons that have base codes; the others have no column and give nothing.
        surrogate: k slopes and the intercept; zero without a fold.
        influence: divergence of the model's output for a relative squared error of 1.
        coherence: error of what is not read, as a multiple of the sum of its neurons' errors: they may point one way.
    """

    coding: Coding
    widths: Widths
    sizes: Sizes
    tokens: Estimated
    listed: Bool[Tensor, " h"]
    surrogate: Float32[Tensor, "h coefficients"]
    influence: float
    coherence: float = 1.0

    @classmethod
    def from_coding(cls, coding: Coding, widths: Widths, influence: float) -> "Pricing":
        """A site with surrogates that fit all tokens."""
        weights, tokens = coding.site.weights, Estimated.from_coding(coding, widths)
        surrogate = torch.zeros(len(weights.up), len(weights.projections) + 1, dtype=torch.float32, device="cpu")
        sizes, listed = Sizes.from_coding(coding, widths), weights.down.any(0).cpu()
        pricing = cls(coding, widths, sizes, tokens, listed, surrogate, influence)
        return pricing.refitted(torch.ones_like(tokens.base[0], dtype=torch.bool, device="cpu"))

    @cached_property
    def changes(self) -> dict[str, Float32[Tensor, "tokens h"]]:
        """Expected divergence of the model's output by each part that is not read, for each byte."""
        tokens, size, k = self.tokens, self.sizes.neuron, self.sizes.k
        surrogate = self.surrogate if self.widths.fold_bits else None
        value = values(tokens.base, surrogate, tokens.activation)
        noise = [scale * noise for scale, noise in zip(tokens.scales, tokens.noise, strict=True)]
        change = doubt(tokens.base, value, noise, surrogate, tokens.activation).square() * tokens.norm
        value = value.square()
        weight = self.influence * tokens.importance / tokens.scale.square()
        whole = weight * self.coherence
        parts, limit = {}, (value * tokens.norm + change) * (whole / size.column)
        if k == 2:
            gate = response(tokens.base[:1], tokens.activation).square() * tokens.second.square() * tokens.norm
            parts["up"] = gate * (whole / (size.projection + size.column))
            limit = torch.minimum(limit, parts["up"])
        parts["value"] = limit
        parts["row"] = torch.minimum(limit, change * (weight / (k * size.refinement)))
        parts["column"] = torch.minimum(
            limit, value * tokens.norm * (tokens.column_noise * weight / size.column_refinement)
        )
        return parts

    def unread(self, price: float) -> Bool[Tensor, "tokens h"]:
        """Where the column of a neuron is not read at a price."""
        return ~((self.changes["value"] > price) & self.listed)

    def touched(self, price: float) -> float:
        """Bytes per token at a price."""
        sizes = self.sizes.parts
        read = sum(sizes[part] * int(torch.count_nonzero(change > price)) for part, change in self.changes.items())
        return self.sizes.least + read / len(self.tokens.base[0])

    def refitted(self, uncorrected: Bool[Tensor, "tokens h"]) -> "Pricing":
        """With surrogates that fit the tokens for which the neurons give nothing else."""
        if not self.widths.fold_bits:
            return self
        *z, responses = self.tokens.exact
        weight = uncorrected * self.tokens.weight
        table = torch.stack([(weight * term).sum(0, dtype=torch.float64) for term in products(z, responses)])
        return replace(self, surrogate=Sums(table, len(z)).regress().bfloat16().float())

    def settled(self, price: float) -> "Pricing":
        """With surrogates refitted to the tokens for which nothing is read at a price, and their coherence."""
        unread = self.unread(price)
        return replace(self, coherence=self._coherence(unread)).refitted(unread)

    def _coherence(self, unread: Bool[Tensor, "tokens h"]) -> float:
        """Error of the sum of unread values, apart from its mean, over the sum of their errors."""
        tokens = self.tokens
        surrogate = self.surrogate if self.widths.fold_bits else None
        value = torch.where(unread, values(tokens.base, surrogate, tokens.activation), 0)
        missed = value @ self.coding.neurons.down.T
        missed = missed - (tokens.weight * missed).sum(0) / tokens.weight.sum()
        apart = float((tokens.weight * value.square() * tokens.norm).double().sum())
        together = float((tokens.weight * missed.square()).double().sum())
        return min(100.0, max(0.01, together / apart)) if apart > 0 else self.coherence

    @property
    def norms(self) -> BFloat16[Tensor, "listed k"]:
        """The norms of the listed neurons, as the op takes them."""
        norm = self.tokens.norm.sqrt()
        columns = [*[self.tokens.second * norm] * (self.sizes.k - 1), norm]
        largest = torch.finfo(torch.bfloat16).max
        return torch.stack(columns, 1).clamp(max=largest)[self.listed].bfloat16()

    def thresholds(self, price: float) -> Float32[Tensor, " thresholds"]:
        """The thresholds of parts at a price, as the op takes them."""
        size, k = self.sizes.neuron, self.sizes.k
        parts = [*[(size.projection + size.column) / self.coherence] * (k - 1), size.column / self.coherence]
        parts += [k * size.refinement, size.column_refinement / max(self.tokens.column_noise, 1e-30)]
        squares = torch.tensor(parts, dtype=torch.float64, device="cpu") * price
        squares /= self.influence * self.tokens.importance
        return squares.sqrt().clamp(max=torch.finfo(torch.float32).max).float()


def check_floor(sizes: Sequence[Sizes], allowed: float) -> None:
    """Checks that sites can read as little as ``allowed`` bytes per token.

    Raises:
        CalibrationError: they cannot.
    """
    floor = sum(size.least for size in sizes)
    if floor > allowed:
        raise CalibrationError(
            f"the budget allows {allowed:,.0f} bytes per token; the fold and the base codes alone read {floor:,.0f}"
        )


def settle(pricings: list[Pricing], allowed: float) -> float:
    """Settles all sites of a list at the price at which they read ``allowed`` bytes per token; returns the price."""
    price = 1.0
    for _ in range(ROUNDS):
        price = _price(pricings, allowed, price)
        for i, pricing in enumerate(pricings):
            pricings[i] = pricing.settled(price)  # one by one: each frees what it has computed
    return price


def _price(pricings: Sequence[Pricing], allowed: float, near: float) -> float:
    """The lowest price, to a hundredth, at which the sites read at most ``allowed`` bytes per token.

    Found by bisection of its logarithm, in ever longer steps away from a price that may be near.
    """
    low, high, tried, step = -60.0, 30.0, math.log(near), 0.16
    while high - low > 0.01:
        if sum(pricing.touched(math.exp(tried)) for pricing in pricings) <= allowed:
            high, tried = tried, max((low + tried) / 2, tried - step)
        else:
            low, tried = tried, min((tried + high) / 2, tried + step)
        step *= 4
    return math.exp(high)
