"""The neurons of a site: k pre-activations each, and their responses."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS, Activation
from tardis_fx.observation.site import ObservedSite
from tardis_fx.runtime.reference import response


@dataclass(frozen=True, eq=False)
class Neurons:
    """An FFN in float32 on the CPU, neuron by neuron.

    Attributes:
        projections: up in a plain FFN; gate and up in a gated one.
        biases: of the projections, each None if missing.
        down: the projection of the responses.
        down_bias: None if missing.
        activation: of the first pre-activation.
    """

    projections: tuple[Float[Tensor, "h d"], ...]
    biases: tuple[Float[Tensor, " h"] | None, ...]
    down: Float[Tensor, "d_out h"]
    down_bias: Float[Tensor, " d_out"] | None
    activation: Activation

    @classmethod
    def from_site(cls, site: ObservedSite) -> "Neurons":
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

    def preactivations(self, x: Float[Tensor, "tokens d"]) -> list[Float[Tensor, "tokens h"]]:
        """The k pre-activations of every neuron."""
        return self.add_biases([x @ matrix.T for matrix in self.projections])

    def add_biases(self, products: Sequence[Float[Tensor, "tokens h"]]) -> list[Float[Tensor, "tokens h"]]:
        """The k pre-activations from the products of the projections with tokens, or from estimates."""
        pairs = zip(products, self.biases, strict=True)
        return [product if bias is None else product + bias for product, bias in pairs]

    def response(self, z: Sequence[Float[Tensor, "tokens h"]]) -> Float[Tensor, "tokens h"]:
        """Responses of the neurons: the activation of the first pre-activation times the others."""
        return response(z, self.activation.name)

    def evaluate(
        self, x: Float[Tensor, "tokens d"]
    ) -> tuple[list[Float[Tensor, "tokens h"]], Float[Tensor, "tokens h"]]:
        """The k pre-activations of every neuron, and its response."""
        z = self.preactivations(x)
        return z, self.response(z)

    def output(self, response: Float[Tensor, "tokens h"]) -> Float[Tensor, "tokens d_out"]:
        """The output of the site from the responses of its neurons."""
        output = response @ self.down.T
        return output if self.down_bias is None else output + self.down_bias

    def __call__(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens d_out"]:
        """The output of the site."""
        return self.output(self.evaluate(x)[1])
