"""Tokens at a gated site, and what fold and correction of its drafts miss of them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812

if TYPE_CHECKING:
    from torch import Tensor

    from tardis_fx.partial_linear.gated_draft import GatedDraft
    from tardis_fx.quantisation import Quantised


class GatedTokens:
    """Some tokens at a gated site, and what all its drafts make of them; [tokens, ...] each."""

    def __init__(self, draft: GatedDraft, x: Tensor) -> None:
        """Takes the tokens, [tokens, d], float32, and any of the drafts."""
        self.x, self._draft = x, draft
        self._refined: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-activations of gate and up and their products."""
        return self._draft.neurons(self.x)

    @cached_property
    def estimates(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same as the predictors have them."""
        return self._draft.estimates(self.x)

    @cached_property
    def score(self) -> Tensor:
        """What the guard compares with the thresholds."""
        return self._draft.score(*self.estimates)

    @cached_property
    def output(self) -> Tensor:
        """The original's."""
        return F.linear(self.exact[2], self._draft.down, self._draft.down_bias)

    def refined(self, low: tuple[Quantised, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """The neurons as low planes of these widths give them."""
        if low[0].bits not in self._refined:
            g, u, _ = self.estimates
            self._refined[low[0].bits] = self._draft.product(g + low[0](self.x), u + low[1](self.x))
        return self._refined[low[0].bits]

    def missing(self, draft: GatedDraft) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`tardis_fx.partial_linear.residuals.PlainTokens.missing`."""

        def beyond(g: Tensor, u: Tensor, p: Tensor) -> Tensor:
            alpha, beta, gamma = draft.plane.unbind(1)
            return p - alpha * g - beta * u - gamma

        outlier = draft.exact | draft.guarded & (self.score > draft.threshold)
        missing = beyond(*self.exact)
        found = missing if draft.low is None else beyond(*self.refined(draft.low))
        return missing, torch.where(outlier, found, 0), outlier
