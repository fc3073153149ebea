"""What healing needs of a planned site: a forward pass with gradients, the bytes it reads, and the healed entry."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Float64, Num
from torch import Tensor, nn

from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.base import Rewrite
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.reference import compute_dtype

#: Number of widenings that are counted, and the largest, as a share of a bound's own unit.
STEPS, WIDEST = 1024, 1.0


class TrainableSite(nn.Module, ABC):
    """A planned site whose small tensors are parameters; everything else is fixed.

    The parameters are changes that start at zero. In training mode, ``forward`` is differentiable and has the value of
    the specification: rounding (of codes, and to the model's dtype) and the decisions about what to read are
    straight-through. In evaluation mode, ``forward`` runs the stored plan and counts what it reads.

    Attributes:
        bounds: the changes of what decides how much is read.
        reading: optional bytes read since training mode was entered, with gradients to the bounds. Optional bytes are
            those that not every token reads.
        promised: optional bytes that the plan reads per token.
    """

    bounds: nn.Parameter
    promised: float

    def __init__(self, entry: SitePlan, weights: SiteWeights, rewrite: Rewrite) -> None:
        super().__init__()
        self.entry, self.weights, self._rewrite = entry, weights, rewrite
        self._dtype = compute_dtype(weights.up.dtype)

    def train(self, mode: bool = True) -> "TrainableSite":
        """Sets the mode of ``forward`` and resets the counters; leaving training mode fixes the stored plan."""
        super().train(mode)
        device = self.weights.up.device
        self.reading = torch.zeros((), dtype=torch.float32, device=device)
        if not mode:
            self._constants = self._rewrite.constants(self.planned(), self.weights)
            self._tokens, self._corrected = 0, 0
            self._counted = torch.zeros(STEPS, dtype=torch.float64, device=device)
        return self

    def forward(self, x: Float[Tensor, "*tokens d"]) -> Float[Tensor, "*tokens d_out"]:
        """Applies the site."""
        tokens = x.reshape(-1, x.shape[-1]).to(self._dtype)
        if self.training:
            return self._differentiable(tokens, x.dtype).view(*x.shape[:-1], len(self.weights.down))
        with torch.no_grad():
            self._count(tokens)
        self._tokens += len(tokens)
        return self._rewrite.forward(x, self._constants, self.entry)

    def read(self) -> Float64[Tensor, " widenings"]:
        """Optional bytes per token since training mode was left, for ever wider bounds."""
        return self._counted.flip(0).cumsum(0).flip(0) / max(1, self._tokens)

    @property
    def outlier_rate(self) -> float:
        """Share of (token, neuron) pairs corrected since training mode was left."""
        return self._corrected / max(1, self._tokens * len(self.weights.up))

    @abstractmethod
    def widen(self, step: int) -> None:
        """Moves the bounds outwards to the widening with this index in :meth:`read`."""

    @abstractmethod
    def planned(self) -> SitePlan:
        """The entry with the current tensors; its figures are not updated."""

    @abstractmethod
    def _differentiable(self, tokens: Float[Tensor, "tokens d"], dtype: torch.dtype) -> Float[Tensor, "tokens d_out"]:
        """The output of training mode in a dtype; adds to ``reading``."""

    @abstractmethod
    def _count(self, tokens: Float[Tensor, "tokens d"]) -> None:
        """Counts what the stored plan reads for tokens."""

    def _add_read(
        self, read: Bool[Tensor, "tokens neurons"], excess: Num[Tensor, "tokens neurons"], size: float
    ) -> None:
        """Counts the pairs that read ``size`` bytes, with their distance past a bound."""
        outside = excess[read].float().nan_to_num(WIDEST, posinf=WIDEST).clamp(0, WIDEST)
        self._counted += size * torch.histc(outside, STEPS, 0, WIDEST)
