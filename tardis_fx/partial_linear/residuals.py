"""What fold and correction of a draft still miss, measured on tokens; of drafts that differ in width, together."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.partial_linear.gated_draft import GatedDraft
from tardis_fx.partial_linear.gated_residuals import GatedTokens
from tardis_fx.statistics.regression import Residual

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from tardis_fx.observation.merging import Merge
    from tardis_fx.partial_linear.draft import Draft
    from tardis_fx.partial_linear.widths import Fitted
    from tardis_fx.quantisation import Quantised

#: Bytes of sums that are held at a time, though of one draft at the least; others take further runs.
MEMORY = 4 << 30


class Several:
    """Observes the same tokens for several drafts of one site; what the widths do not change is computed once.

    Attributes:
        observers: one a draft.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"observers": "parts"}

    def __init__(self, drafts: Sequence[Draft]) -> None:
        """Takes the drafts."""
        self._drafts = drafts
        self.observers = [ResidualObserver(draft) for draft in drafts]
        self._fits: list[Fitted] = []

    def update(self, x: Tensor) -> None:
        """Shows tokens, [tokens, d], float32, to all."""
        tokens = tokens_at(self._drafts[0], x)
        for observer in self.observers:
            observer.add(tokens)

    def fits(self, fit: Callable[[Draft, ResidualObserver], Fitted]) -> list[Fitted]:
        """One a draft; the first call makes them and drops the sums, which are large."""
        while self.observers:
            self._fits.append(fit(self._drafts[len(self._fits)], self.observers[0]))
            del self.observers[0]
        return self._fits


class PlainTokens:
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
        return self._activated(self.x @ self._draft.up.T)

    @cached_property
    def output(self) -> Tensor:
        """The original's."""
        output = self.exact[1] @ self._draft.down.T
        return output if self._draft.down_bias is None else output + self._draft.down_bias

    def refined(self, low: tuple[Quantised, ...]) -> tuple[Tensor, Tensor]:
        """Pre-activations and activations as low planes of this width give them."""
        (planes,) = low
        if planes.bits not in self._refined:
            self._refined[planes.bits] = self._activated(self.estimate + planes(self.x))
        return self._refined[planes.bits]

    def missing(self, draft: Draft) -> tuple[Tensor, Tensor, Tensor]:
        """What a draft's surrogates miss, what its corrections make of it, and which are made: [tokens, h] each."""

        def beyond(z: Tensor, activated: Tensor) -> Tensor:
            return activated - draft.slope * z - draft.intercept

        outlier = draft.exact | draft.guarded & ((self.estimate < draft.lower) | (self.estimate > draft.upper))
        missing = beyond(*self.exact)
        found = missing if draft.low is None else beyond(*self.refined(draft.low))
        return missing, torch.where(outlier, found, 0), outlier

    def _activated(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self._draft.up_bias is not None:
            z = z + self._draft.up_bias
        return z, self._draft.activation.eager(z)


def tokens_at(draft: Draft, x: Tensor) -> PlainTokens | GatedTokens:
    """Tokens at a draft's site, [tokens, d], float32."""
    return GatedTokens(draft, x) if isinstance(draft, GatedDraft) else PlainTokens(draft, x)


class ResidualObserver:
    """What the folded map and the corrections miss, and how often a correction is made.

    Attributes:
        residual: what is missed; its inputs are the site's and, behind them, what the copied columns of W2 multiply.
        outliers: corrections made.
        tokens: tokens seen.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"residual": "parts", "outliers": "sum", "tokens": "sum"}

    def __init__(self, draft: Draft) -> None:
        """Starts at zero."""
        self._draft, self._copied = draft, draft.copied
        self.residual = Residual(draft.up.shape[1] + len(self._copied), draft.down.shape[0])
        self.outliers, self.tokens = 0, 0

    def add(self, tokens: PlainTokens | GatedTokens) -> None:
        """Adds tokens."""
        missing, corrected, outlier = tokens.missing(self._draft)  # type: ignore[arg-type]  # both are of one site
        terms = torch.cat([tokens.x, corrected[:, self._copied]], 1)
        self.residual.update(terms, (missing - corrected) @ self._draft.down.T, tokens.output)
        self.outliers += int(outlier.sum())
        self.tokens += len(tokens.x)


def within_memory(drafts: Iterable[Draft]) -> Iterator[dict[str, list[Draft]]]:
    """As many drafts at a time as the memory allows for the sums of their residuals, by their sites' fingerprints."""
    part: dict[str, list[Draft]] = {}
    held = 0
    for draft in drafts:
        size = 16 * (draft.up.shape[1] + len(draft.copied)) ** 2
        if part and held + size > MEMORY:
            yield part
            part, held = {}, 0
        part.setdefault(draft.site.fingerprint, []).append(draft)
        held += size
    yield part
