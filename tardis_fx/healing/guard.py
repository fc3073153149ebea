"""Guards of trainable sites: their trainable bounds, and the distance of estimates past each bound."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tardis_fx.runtime.reference import biased, response, surrogate_error


class TrainableGuard:
    """The guard of a site's guarded neurons, with bounds that can be changed.

    With one pre-activation, the bounds are the lower and the upper bound of the estimate; with several, the only bound
    is the threshold of the score, whose plane stays.

    Attributes:
        bounds: from the plan.
        outwards: of each bound, 1 if increasing it widens the hot range, or -1 if decreasing it does.
        width: of the hot ranges.
    """

    def __init__(
        self,
        guard: Float[Tensor, "guarded numbers"],
        biases: Float[Tensor, "capacity k"] | None,
        activation: str,
        k: int,
    ) -> None:
        """Takes the guard tensor of a plan, and the biases and the activation of neurons with k pre-activations."""
        self.outwards = torch.tensor([-1, 1] if k == 1 else [1], dtype=guard.dtype, device=guard.device)
        self._plane, self.bounds = guard[:, : -len(self.outwards)], guard[:, -len(self.outwards) :]
        self.width = (self.outwards * self.bounds).sum(1)
        self._biases, self._activation = biases, activation

    def excess(
        self, z_hat: Sequence[Float[Tensor, "tokens guarded"]], bounds: Float[Tensor, "guarded bounds"]
    ) -> list[Float[Tensor, "tokens guarded"]]:
        """Distance past each bound of k estimates without biases; positive values are outside."""
        level = z_hat[0]
        if len(z_hat) > 1:
            z = biased(z_hat, self._biases, len(self._plane))
            level = surrogate_error(z, self._plane, response(z, self._activation)).abs()
        return [sign * (level - bound) for sign, bound in zip(self.outwards, bounds.unbind(1), strict=True)]

    def tensor(self, bounds: Float[Tensor, "guarded bounds"]) -> Float[Tensor, "guarded numbers"]:
        """The guard tensor of a plan with other bounds."""
        return torch.cat([self._plane, bounds], 1)
