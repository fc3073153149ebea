"""The codes of a site's matrices, from a sample of its tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float32, Float64, Int8
from torch import Tensor

from tardis_fx.observation.site import Merge, ObservedSite, fitted_tokens, thinned
from tardis_fx.quantisation import Feedback, Rows, code_columns, code_rows
from tardis_fx.runtime.rotation import random_signs, rotate, rotate_back
from tardis_fx.statistics.moments import Moments
from tardis_fx.statistics.neurons import Neurons

#: Tokens that what is read is chosen on, and held-back tokens, at most.
SAMPLE, HELD = 2048, 512
#: Tokens that codes and regressions are fitted to, at most: so many for each column of the projections, fewer if they
#: have more numbers, but no fewer than 4 each.
PER_COLUMN, NUMBERS, LEAST_PER_COLUMN = 32, 2**23, 4
#: A sample is thinned when it has so many times its tokens.
MARGIN = 1.25
#: Tokens whose outputs are computed together.
TOGETHER = 1024
#: Squared outputs below this share of their median weigh no more.
LEAST = 0.1


class CodingObserver:
    """Observer of samples of tokens.

    Memory: 5/4 of the kept and held-back tokens in float32.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"sample": "parts", "held": "parts"}

    def __init__(self, site: ObservedSite) -> None:
        d = site.weights.up.shape[1]
        most = max(SAMPLE, LEAST_PER_COLUMN * d, min(PER_COLUMN * d, NUMBERS // d))
        self.sample, self.held = Sample(most), Sample(HELD)

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        cut = fitted_tokens(len(x))
        self.sample.update(x[:cut])
        self.held.update(x[cut:])


class Sample:
    """A sample of tokens from all batches."""

    merged: ClassVar[Mapping[str, Merge]] = {"parts": "joined"}

    def __init__(self, most: int) -> None:
        self._most, self._share = most, 1.0
        self.parts: list[Float32[Tensor, "tokens d"]] = []

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        self.parts.append(thinned(x, math.ceil(self._share * len(x))).clone())
        kept = sum(map(len, self.parts))
        if kept > MARGIN * self._most:
            self.parts, self._share = [thinned(torch.cat(self.parts), self._most)], self._share * self._most / kept

    @property
    def tokens(self) -> Float32[Tensor, "tokens d"]:
        """The sample."""
        return thinned(torch.cat(self.parts), self._most)


def token_weights(output: Float32[Tensor, "tokens d_out"]) -> Float32[Tensor, "tokens 1"]:
    """Weights that make errors relative to each token's output: a few massive tokens do not outweigh the rest."""
    square = output.square().sum(1, keepdim=True)
    least = LEAST * square.median() if len(square) else 1.0
    return 1 / square.clamp(min=least).clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, eq=False)
class Coding:
    """A site's matrices and their codes at any width.

    Attributes:
        signs: of the rotation of the input.
        out_signs: of the rotation of the output.
        tokens: that columns, fold and bias are fitted to.
        sample: of these, to choose what is read.
        held: tokens that nothing is fitted to, or ``sample`` if there are none.
    """

    site: ObservedSite
    feedback: Feedback
    response_feedback: Feedback
    signs: Int8[Tensor, " d"]
    out_signs: Int8[Tensor, " d_out"]
    tokens: Float32[Tensor, "tokens d"]
    sample: Float32[Tensor, "sample d"]
    held: Float32[Tensor, "held d"]
    _coded: dict[tuple[str, int, int], Rows] = field(default_factory=dict, repr=False)

    @classmethod
    def from_observer(cls, site: ObservedSite, seen: CodingObserver) -> "Coding":
        """Factors the Gram matrices of the operands."""
        tokens, held, neurons = seen.sample.tokens, seen.held.tokens, Neurons.from_site(site)
        h, d = site.weights.up.shape
        inputs, responses = Moments(d), Moments(h)
        for x in tokens.split(TOGETHER):
            response = neurons.evaluate(x)[1]
            weight = token_weights(neurons.output(response))
            inputs.update(x, weight)
            responses.update(response, weight)
        signs, out_signs = (random_signs(n, seed) for seed, n in enumerate((d, len(neurons.down))))
        sample = thinned(tokens, min(SAMPLE, max(HELD, LEAST_PER_COLUMN * d)))
        return cls(
            site,
            Feedback.from_gram(rotate(rotate(inputs.gram, signs).T, signs)),
            Feedback.from_gram(responses.gram),
            signs,
            out_signs,
            tokens,
            sample,
            held if len(held) else sample,
        )

    @property
    def neurons(self) -> Neurons:
        """The site in float32 on the CPU: in half precision a copy, which is not kept."""
        return Neurons.from_site(self.site)

    def outputs(self, tokens: Float32[Tensor, "tokens d"]) -> Float32[Tensor, "tokens d_out"]:
        """The exact outputs of tokens; those of the sample are kept."""
        if tokens is self.sample:
            return self._sample_outputs
        return self._exact(tokens)

    def _exact(self, tokens: Float32[Tensor, "tokens d"]) -> Float32[Tensor, "tokens d_out"]:
        neurons = self.neurons
        return torch.cat([neurons(part) for part in tokens.split(TOGETHER)])

    @cached_property
    def _sample_outputs(self) -> Float32[Tensor, "sample d_out"]:
        return self._exact(self.sample)

    @cached_property
    def held_outputs(self) -> Float32[Tensor, "held d_out"]:
        """The exact outputs of the held-back tokens."""
        return self.outputs(self.held)

    def projection(self, number: int, bits: int) -> Rows:
        """Base codes of a projection."""
        return self._remembered(f"projection {number}", bits, 0)

    def refinement(self, number: int, bits: int, low_bits: int) -> Rows:
        """Codes of what the base codes of a projection miss."""
        return self._remembered(f"projection {number}", bits, low_bits)

    def columns(self, bits: int) -> Rows:
        """Base codes of the rotated columns of down."""
        return self._remembered("columns", bits, 0)

    def column_refinement(self, bits: int, low_bits: int) -> Rows:
        """Codes of what the base codes of the columns miss."""
        return self._remembered("columns", bits, low_bits)

    def fold(self, weight: Float64[Tensor, "d_out d"], bits: int) -> Rows:
        """Codes of a folded weight, rotated."""
        rotated = rotate(rotate(weight.float(), self.signs).T, self.out_signs).T
        return code_rows(rotated.contiguous(), self.feedback, bits)

    def folded(self, fold: Rows) -> Float32[Tensor, "d_out d"]:
        """The matrix of a fold's codes as it multiplies inputs that are not rotated."""
        return rotate_back(rotate_back(fold.weight, self.signs).T, self.out_signs).T

    def _remembered(self, name: str, bits: int, low_bits: int) -> Rows:
        key = (name, bits, low_bits)
        if key not in self._coded:
            if name == "columns":
                down = self.site.weights.down.float().cpu()
                matrix, coded, feedback = rotate(down.T, self.out_signs), code_columns, self.response_feedback
            else:
                projection = self.neurons.projections[int(name.removeprefix("projection "))]
                matrix, coded, feedback = rotate(projection, self.signs), code_rows, self.feedback
            if low_bits:
                matrix = matrix - self._remembered(name, bits, 0).weight
            self._coded[key] = coded(matrix, feedback, low_bits or bits)
        return self._coded[key]
