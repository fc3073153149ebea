"""Planned sites whose constants are plain weights that can all be trained."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.finetuned import Finetuned
from tardis_fx.plan import SitePlan


class DenseSite(nn.Module):
    """A rewritten site whose constants are float32 parameters, cast to the model's dtype for use."""

    def __init__(self, entry: SitePlan, weights: SiteWeights, rewrite: Rewrite) -> None:
        """Copies the constants of an entry into parameters.

        Raises:
            ConfigError: some constants are not weights or biases of linear layers that every token reads.
        """
        super().__init__()
        self.entry, self._weights, self._rewrite = entry, weights, rewrite
        constants = rewrite.constants(entry, weights)
        shares = rewrite.matrices(entry)
        loose = {name for name, tensor in constants.items() if tensor.dim() > 1} - shares.keys()
        if loose or set(shares.values()) != {1.0} or not all(c.is_floating_point() for c in constants.values()):
            raise ConfigError(
                f"{entry.name} is rewritten by {entry.method!r}, whose constants are not all weights of dense layers: "
                f"plans of 'ffsplit', 'low_rank' and 'hot_fold' can be fine-tuned; "
                f"heal is for 'partial_linear' and 'guarded_fold'"
            )
        for name, tensor in constants.items():
            self.register_parameter(name, nn.Parameter(tensor.float().clone()))

    def constants(self) -> dict[str, Tensor]:
        """The current weights in the model's dtype."""
        return {name: parameter.to(self._weights.up.dtype) for name, parameter in self.named_parameters()}

    def forward(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d_out"]:
        """Applies the rewritten site, with gradients to its weights."""
        return self._rewrite.forward(x, self.constants(), self.entry)

    @torch.no_grad()
    def trained(self, error: float) -> SitePlan:
        """The entry with the current weights and their error; an entry that was already fine-tuned keeps its method."""
        tensors = {name: tensor.clone() for name, tensor in self.constants().items()}
        again = self._rewrite.trained
        return replace(
            self.entry,
            method=self._rewrite.method if again else Finetuned(self._rewrite).method,
            settings=self.entry.settings if again else {"inner": self.entry.settings},
            tensors=tensors,
            error=error,
            stored_bytes=self._weights.bytes + sum(tensor.nbytes for tensor in tensors.values()),
        )
