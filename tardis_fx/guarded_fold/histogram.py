"""Sums of a site's neurons by bins of the guard's level."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float32
from torch import Tensor

from tardis_fx.guarded_fold.draft import Draft
from tardis_fx.observation.site import Merge
from tardis_fx.statistics.surrogates import Sums, products


class Histogram:
    """Joint sums of pre-activations and responses by bins of the guard's level.

    The products within a batch are added in float32, over batches in float64. Memory: 6 bins h float64 for a plain
    site, 10 bins h for a gated one.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"_table": "sum", "least": "least", "greatest": "greatest"}

    def __init__(self, draft: Draft) -> None:
        self._draft, h, k = draft, len(draft.neurons), len(draft.predictors)
        self._table = Sums.zeros(k, draft.guard.bins * h).table
        self.least = torch.full((h,), torch.inf, dtype=torch.float32, device="cpu")
        self.greatest = torch.full((h,), -torch.inf, dtype=torch.float32, device="cpu")

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        level, (z, response) = self._draft.guard.level(self._draft.estimates(x)), self._draft.neurons.evaluate(x)
        self.least = torch.minimum(self.least, level.amin(0))
        self.greatest = torch.maximum(self.greatest, level.amax(0))
        neuron = torch.arange(level.shape[1], dtype=torch.int64, device="cpu")
        index = self._draft.guard.bin(level).mul_(level.shape[1]).add_(neuron).view(-1)
        for total, product in zip(self._table, products(z, response), strict=True):
            total += torch.zeros_like(total, dtype=torch.float32).scatter_add_(0, index, product.reshape(-1))

    @property
    def sums(self) -> Sums:
        """The sums so far."""
        return Sums(self._table.view(len(self._table), self._draft.guard.bins, -1), len(self._draft.predictors))

    @property
    def edges(self) -> Float32[Tensor, "edges h"]:
        """Edges of the bins."""
        return self._draft.guard.edges(self.least, self.greatest)
