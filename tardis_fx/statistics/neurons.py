"""The neurons of a site: k pre-activations each, and their responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS, Activation
from tardis_fx.observation.site import ObservedSite


@dataclass(frozen=True, eq=False)
class Neurons:
    """An FFN in float32 on the CPU, neuron by neuron.

    Attributes:
        projections: k matrices [h, d]: up in a plain FFN; gate and up in a gated one.
        biases: k biases [h], each None if missing.
        down: [d_out, h].
        down_bias: [d_out] or None.
        activation: of the first pre-activation.
    """

    projections: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    down: Tensor
    down_bias: Tensor | None
    activation: Activation

    @classmethod
    def from_site(cls, site: ObservedSite) -> Neurons:
        """Copies the weights of a site."""
        weights = site.weights
        matrices, biases = zip(*weights.projections.values(), strict=True)
        return cls(
            tuple(matrix.float().cpu() for matrix in matrices),
            tuple(None if bias is None else bias.float().cpu() for bias in biases),
            weights.down.float().cpu(),
            None if weights.down_bias is None else weights.down_bias.float().cpu(),
            ACTIVATIONS[str(site.site.activation)],
        )

    def __len__(self) -> int:
        return len(self.projections[0])

    @property
    def biased(self) -> bool:
        """Whether any projection has a bias."""
        return any(bias is not None for bias in self.biases)

    def preactivations(self, x: Tensor) -> list[Tensor]:
        """Pre-activations, k times [tokens, h], of inputs [tokens, d]."""
        return self.add_biases([x @ matrix.T for matrix in self.projections])

    def add_biases(self, products: Sequence[Tensor]) -> list[Tensor]:
        """Pre-activations, k times [tokens, h], from the products of the projections with tokens, or from estimates."""
        pairs = zip(products, self.biases, strict=True)
        return [product if bias is None else product + bias for product, bias in pairs]

    def response(self, z: Sequence[Tensor]) -> Tensor:
        """Responses of the neurons, [tokens, h]: the activation of the first pre-activation times the others."""
        return prod(z[1:], start=self.activation.eager(z[0]))

    def evaluate(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Pre-activations, k times [tokens, h], and responses, [tokens, h], of inputs [tokens, d]."""
        z = self.preactivations(x)
        return z, self.response(z)

    def output(self, response: Tensor) -> Tensor:
        """The output of the site, [tokens, d_out], from the responses of its neurons, [tokens, h]."""
        output = response @ self.down.T
        return output if self.down_bias is None else output + self.down_bias

    def __call__(self, x: Tensor) -> Tensor:
        """The output of the site, [tokens, d_out], from its inputs, [tokens, d]."""
        return self.output(self.evaluate(x)[1])
