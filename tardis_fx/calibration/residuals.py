"""What fold and correction of a draft still miss, measured on tokens; of drafts that differ in width, together."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.calibration.gated_draft import GatedDraft
from tardis_fx.calibration.gated_residuals import GatedTokens
from tardis_fx.calibration.regression import Residual

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.calibration.draft import Draft
    from tardis_fx.calibration.merging import Merge
    from tardis_fx.calibration.predictor import Quantised


class Several:
    """Observes the same tokens for several drafts of one site; what the widths do not change is computed once.

    Attributes:
        observers: one a draft.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"observers": "parts"}

    def __init__(self, drafts: Sequence[Draft]) -> None:
        """Takes the drafts."""
        self._draft = drafts[0]
        self.observers = [ResidualObserver(draft) for draft in drafts]

    def update(self, x: Tensor) -> None:
        """Shows tokens, [tokens, d], float32, to all."""
        draft = self._draft
        tokens = GatedTokens(draft, x) if isinstance(draft, GatedDraft) else _Tokens(draft, x)
        for observer in self.observers:
            observer.add(tokens)


class _Tokens:
    """Some tokens at a site, and what all its drafts make of them; [tokens, ...] each."""

    def __init__(self, draft: Draft, x: Tensor) -> None:
        self.x, self._draft = x, draft
        self._refined: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def estimate(self) -> Tensor:
        """The predictor's, without bias."""
        return self._draft.predictor(self.x)

    @cached_property
    def exact(self) -> tuple[Tensor, Tensor]:
        """Pre-activations and activations."""
        return self._activated(self.x @ self._draft.w1.T)

    @cached_property
    def output(self) -> Tensor:
        """The original's."""
        output = self.exact[1] @ self._draft.w2.T
        return output if self._draft.b2 is None else output + self._draft.b2

    def refined(self, low: Quantised) -> tuple[Tensor, Tensor]:
        """Pre-activations and activations as low planes of this width give them."""
        if low.bits not in self._refined:
            self._refined[low.bits] = self._activated(self.estimate + low(self.x))
        return self._refined[low.bits]

    def left(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """What fold and correction of a draft miss, [tokens, d_out], and what is corrected, [tokens, h]."""

        def beyond(z: Tensor, activated: Tensor) -> Tensor:
            return activated - draft.slope * z - draft.intercept

        outlier = draft.exact | draft.guarded & ((self.estimate < draft.lower) | (self.estimate > draft.upper))
        missing = beyond(*self.exact)
        if draft.rows is None:
            return torch.where(outlier, 0, missing) @ draft.w2.T, outlier
        low, w2t = draft.rows
        corrected = torch.where(outlier, beyond(*self.refined(low)), 0)
        return missing @ draft.w2.T - corrected @ w2t.weight, outlier

    def _activated(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self._draft.b1 is not None:
            z = z + self._draft.b1
        return z, self._draft.activation.eager(z)


class ResidualObserver:
    """What the folded map and the corrections miss, and how often a correction is made.

    Attributes:
        residual: what is missed.
        outliers: corrections made.
        tokens: tokens seen.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"residual": "parts", "outliers": "sum", "tokens": "sum"}

    def __init__(self, draft: Draft) -> None:
        """Starts at zero."""
        self._draft = draft
        self.residual = Residual(draft.w1.shape[1], draft.w2.shape[0])
        self.outliers, self.tokens = 0, 0

    def add(self, tokens: _Tokens | GatedTokens) -> None:
        """Adds tokens."""
        left, outlier = tokens.left(self._draft)  # type: ignore[arg-type]  # tokens and draft are of one site
        self.residual.update(tokens.x, left, tokens.output)
        self.outliers += int(outlier.sum())
        self.tokens += len(tokens.x)
