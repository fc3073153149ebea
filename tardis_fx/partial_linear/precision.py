"""Chooses how precisely neurons are computed, by the price of a byte.

For every token, the estimates of a neuron say what each of its parts would change in the output: the column (with its
base codes), the refinements of its projections, the refinement of the column, and in a gated FFN everything after the
gate. A part is read if the square of that change, relative to that of the output, is worth its bytes at the price. One
price for all sites meets the budget.
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
from tardis_fx.runtime.coded_reference import Levels, doubt, levels, values
from tardis_fx.runtime.reference import response
from tardis_fx.runtime.rotation import rotate, rotate_back
from tardis_fx.statistics.surrogates import Sums, products

#: Tokens of the sample on which quantities are priced.
PRICED = 512
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
class Pricing:
    """A site at given widths, with its bytes and parts as functions of the price of a byte.

    Attributes:
        listed: neurons that have base codes; the others have no column and give nothing.
        surrogate: k slopes and the intercept; zero without a fold.
        coherence: error of what is not read, as a multiple of the sum of its neurons' errors: they may point one way.
    """

    coding: Coding
    widths: Widths
    listed: Bool[Tensor, " h"]
    surrogate: Float32[Tensor, "h coefficients"]
    coherence: float = 1.0

    @classmethod
    def from_coding(cls, coding: Coding, widths: Widths) -> "Pricing":
        """A site with surrogates that fit all tokens."""
        h, k = len(coding.neurons), len(coding.neurons.projections)
        surrogate = torch.zeros(h, k + 1, dtype=torch.float32, device="cpu")
        pricing = cls(coding, widths, coding.neurons.down.any(0), surrogate)
        return pricing.refitted(torch.ones_like(pricing.tokens.response, dtype=torch.bool, device="cpu"))

    @cached_property
    def tokens(self) -> "Estimated":
        """The tokens of the sample that are priced."""
        return Estimated.from_tokens(self.coding, self.widths, thinned(self.coding.sample, PRICED))

    @property
    def bytes(self) -> NeuronBytes:
        """Bytes of a neuron's parts."""
        neurons = self.coding.neurons
        (_, d), d_out, bias = (
            neurons.projections[0].shape,
            len(neurons.down),
            any(b is not None for b in neurons.biases),
        )
        return neuron_bytes(
            d, d_out, self.widths[:4], k=len(neurons.projections), bias=bias, fold=self.widths.fold_bits > 0
        )

    @property
    def fixed_bytes(self) -> int:
        """Bytes of the fold and the bias, and of the signs."""
        (_, d), d_out = self.coding.neurons.projections[0].shape, len(self.coding.neurons.down)
        fold = d_out * tables.row_bytes(d, self.widths.fold_bits) if self.widths.fold_bits else 0
        return fold + d_out * self.coding.site.weights.up.element_size() + d + d_out

    @property
    def part_bytes(self) -> dict[str, int]:
        """Bytes of the parts of a neuron that are read only where they are worth it."""
        size, k = self.bytes, len(self.coding.neurons.projections)
        row = k * size.refinement
        return {"up": size.projection, "value": size.column, "row": row, "column": size.column_refinement}

    @cached_property
    def changes(self) -> dict[str, Float32[Tensor, "tokens h"]]:
        """Expected squared change of the output by each part, relative to its square, for each byte."""
        tokens, size, k = self.tokens, self.bytes, len(self.coding.neurons.projections)
        surrogate = self.surrogate if self.widths.fold_bits else None
        value = self._value
        change = doubt(tokens.base, tokens.noise, surrogate, tokens.activation).square() * tokens.norm
        weight, limit = self.coding.importance, torch.full_like(value, torch.inf)
        whole = weight * self.coherence
        parts = {}
        if k == 2:
            gate = response(tokens.base[:1], tokens.activation).square() * tokens.second.square() * tokens.norm
            parts["up"] = limit = gate * (whole / (size.projection + size.column))
        parts["value"] = limit = torch.minimum(limit, (value.square() * tokens.norm + change) * (whole / size.column))
        parts["row"] = torch.minimum(limit, change * (weight / (k * size.refinement)))
        column = value.square() * tokens.column_noise * (weight / size.column_refinement)
        parts["column"] = torch.minimum(limit, column)
        return parts

    def at(self, price: float) -> "Reading":
        """What is read at a price: the parts that are worth it."""
        size = self.bytes
        read = {part: change > price for part, change in self.changes.items()}
        spent = torch.full_like(self.tokens.norm, size.constants + size.projection)
        for part, mask in read.items():
            spent = spent + self.part_bytes[part] * mask.float().mean(0)
        listed = self.listed
        return Reading(read["value"] & listed, self.fixed_bytes + float(spent[listed].sum()))

    @cached_property
    def _value(self) -> Float32[Tensor, "tokens h"]:
        """Values of the estimates."""
        surrogate = self.surrogate if self.widths.fold_bits else None
        return values(self.tokens.base, surrogate, self.tokens.activation)

    def refitted(self, uncorrected: Bool[Tensor, "tokens h"]) -> "Pricing":
        """With surrogates that fit the tokens for which the neurons give nothing else."""
        if not self.widths.fold_bits:
            return self
        tokens = self.tokens
        weight = uncorrected * tokens.weight
        table = torch.stack(
            [(weight * term).sum(0, dtype=torch.float64) for term in products(tokens.exact, tokens.response)]
        )
        surrogate = Sums(table, len(tokens.exact)).regress().bfloat16().float()
        changed = replace(self, surrogate=surrogate)
        changed.__dict__["tokens"] = tokens
        return changed

    def settled(self, price: float) -> "Pricing":
        """With surrogates refitted to the tokens for which nothing is read at a price, and their coherence."""
        reading = self.at(price)
        changed = replace(self, coherence=self._coherence(~reading.value))
        changed.__dict__["tokens"] = self.tokens
        return changed.refitted(~reading.value)

    def forget(self) -> None:
        """Frees what can be computed again."""
        for name in ("tokens", "changes", "_value"):
            self.__dict__.pop(name, None)

    def _coherence(self, unread: Bool[Tensor, "tokens h"]) -> float:
        """Error of the sum of unread values, apart from its mean, over the sum of their errors."""
        weight, value = self.tokens.weight, torch.where(unread, self._value, 0)
        missed = value @ self.coding.neurons.down.T
        missed = missed - (weight * missed).sum(0) / weight.sum()
        apart = float((weight * value.square() * self.tokens.norm).double().sum())
        together = float((weight * missed.square()).double().sum())
        return min(100.0, max(0.01, together / apart)) if apart > 0 else self.coherence

    def precision(self, price: float) -> BFloat16[Tensor, "listed precision_width"]:
        """The precision of the listed neurons, as the op takes it."""
        tokens, size, k = self.tokens, self.bytes, len(self.coding.neurons.projections)
        norm, weight = tokens.norm.sqrt(), self.coding.importance / price
        whole = weight * self.coherence
        factors = [*tokens.noise]
        if k == 2:
            factors.append(tokens.second * norm * math.sqrt(whole / (size.projection + size.column)))
        factors += [
            norm * math.sqrt(whole / size.column),
            norm * math.sqrt(weight / (k * size.refinement)),
            tokens.column_noise.sqrt() * math.sqrt(weight / size.column_refinement),
        ]
        largest = torch.finfo(torch.bfloat16).max
        return torch.stack(factors, 1).clamp(max=largest)[self.listed].bfloat16()


class Reading(NamedTuple):
    """What a site reads at a price.

    Attributes:
        value: where the column of a listed neuron is read.
        touched: bytes per token.
    """

    value: Bool[Tensor, "tokens h"]
    touched: float


@dataclass(frozen=True, eq=False)
class Estimated:
    """Tokens at a site with estimates of the pre-activations at some widths, and the errors of the codes.

    Attributes:
        x: the tokens.
        rotated: the same, rotated.
        exact: the k pre-activations.
        response: of the neurons.
        base: estimates.
        noise: root-mean-square errors of the estimates.
        second: root mean square of the second pre-activation; of no use for k = 1.
        norm: squared norms of the columns of down.
        column_noise: squared norms of the errors of their base codes.
        weight: of the squared error of each token, about 1.
        activation: of the site.
    """

    x: Float32[Tensor, "tokens d"]
    rotated: Float32[Tensor, "tokens d"]
    exact: Sequence[Float32[Tensor, "tokens h"]]
    response: Float32[Tensor, "tokens h"]
    base: Sequence[Float32[Tensor, "tokens h"]]
    noise: Sequence[Float32[Tensor, " h"]]
    second: Float32[Tensor, " h"]
    norm: Float32[Tensor, " h"]
    column_noise: Float32[Tensor, " h"]
    weight: Float32[Tensor, "tokens 1"]
    activation: str

    @classmethod
    def from_tokens(cls, coding: Coding, widths: Widths, x: Float32[Tensor, "tokens d"]) -> "Estimated":
        """Computes the estimates of tokens."""
        neurons, rotated = coding.neurons, rotate(x, coding.signs)
        exact, response = neurons.evaluate(x)
        products = [coding.projection(i, widths.bits)(rotated) for i in range(len(exact))]
        base = neurons.add_biases(products)
        noise = [(z - estimate).square().mean(0).sqrt() for z, estimate in zip(exact, base, strict=True)]
        columns = rotate(neurons.down.T, coding.out_signs)
        missed = (columns - coding.columns(widths.column_bits).weight).square().sum(1)
        second, norm = exact[-1].square().mean(0).sqrt(), columns.square().sum(1)
        weight = token_weights(neurons.output(response)) / coding.importance
        return cls(x, rotated, exact, response, base, noise, second, norm, missed, weight, neurons.activation.name)


def allocate(pricings: Sequence[Pricing], allowed: float) -> tuple[list[Pricing], float]:
    """Settles all sites at the price at which they read ``allowed`` bytes per token; returns them and the price.

    Raises:
        CalibrationError: reading as little as possible is too much.
    """
    floor = sum(pricing.at(math.inf).touched for pricing in pricings)
    if floor > allowed:
        raise CalibrationError(
            f"the budget allows {allowed:,.0f} bytes per token; the fold and the base codes alone read {floor:,.0f}"
        )
    chosen = list(pricings)
    for _ in range(ROUNDS):
        price = _price(chosen, allowed)
        chosen = [pricing.settled(price) for pricing in chosen]
    return chosen, price


def _price(pricings: Sequence[Pricing], allowed: float) -> float:
    """The lowest price, to a hundredth, at which the sites read at most ``allowed`` bytes per token, by bisection."""
    low, high = -60.0, 30.0
    while high - low > 0.01:
        middle = (low + high) / 2
        if sum(pricing.at(math.exp(middle)).touched for pricing in pricings) <= allowed:
            high = middle
        else:
            low = middle
    return math.exp(high)


@dataclass(frozen=True, eq=False)
class Computed:
    """Outputs of a site for tokens, rotated back, without fold and bias, and the bytes and levels that they took."""

    output: Float32[Tensor, "tokens d_out"]
    touched: float
    refined: float


def compute(pricing: Pricing, price: float, x: Float32[Tensor, "tokens d"]) -> Computed:
    """Computes listed neurons for tokens as the op does, with codes already dequantised."""
    coding, widths, listed = pricing.coding, pricing.widths, pricing.listed
    neurons, k, rotated = coding.neurons, len(coding.neurons.projections), rotate(x, coding.signs)
    biases = [None if bias is None else bias[listed] for bias in neurons.biases]

    def biased(products: list[Tensor]) -> list[Tensor]:
        return [z if bias is None else z + bias for z, bias in zip(products, biases, strict=True)]

    products = [rotated @ coding.projection(i, widths.bits).weight[listed].T for i in range(k)]
    low = [rotated @ coding.refinement(i, widths.bits, widths.low_bits).weight[listed].T for i in range(k)]
    base, refined = biased(products), biased([a + b for a, b in zip(products, low, strict=True)])
    surrogate = pricing.surrogate[listed] if widths.fold_bits else None
    name = neurons.activation.name
    chosen: Levels = levels(base, pricing.precision(price).float(), surrogate, name)
    value = torch.where(chosen.row, values(refined, surrogate, name), values(base, surrogate, name))
    value = torch.where(chosen.value, value, 0)
    output = value @ coding.columns(widths.column_bits).weight[listed]
    refinement = coding.column_refinement(widths.column_bits, widths.column_low_bits).weight[listed]
    output = output + torch.where(chosen.column, value, 0) @ refinement
    size, count = pricing.bytes, max(1, len(x))
    read = size.column * chosen.value.sum() + size.column_refinement * chosen.column.sum()
    read = read + k * size.refinement * chosen.row.sum() + (k - 1) * size.projection * chosen.up.sum()
    touched = pricing.fixed_bytes + int(listed.sum()) * (size.constants + size.projection) + float(read) / count
    return Computed(rotate_back(output, coding.out_signs), touched, float(chosen.row.float().mean()))
