"""Measures the residual of fold and corrections on tokens, for all widths of a settled site at once."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from tardis_fx.guarded_fold.draft import Draft
from tardis_fx.guarded_fold.settled import Settled
from tardis_fx.observation.site import Merge
from tardis_fx.statistics.regression import Residual

#: Maximum bytes of sums held at a time, except that one site always fits; other sites need further runs.
MEMORY = 4 << 30


class WidthResiduals:
    """Observer of one site settled at several widths; computes values that do not depend on the width once.

    Attributes:
        observers: one for each width.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"observers": "parts"}

    def __init__(self, settled: Sequence[Settled]) -> None:
        self._draft = settled[0].draft
        self.observers = [ResidualObserver(site) for site in settled]

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Shows tokens to the observers of all widths."""
        tokens = Tokens(self._draft, x)
        for observer in self.observers:
            observer.add(tokens)


class Tokens:
    """Tokens at a site, with the values that several widths share."""

    def __init__(self, draft: Draft, x: Float32[Tensor, "tokens d"]) -> None:
        self.x, self._draft = x, draft
        self._refined: dict[int, tuple[list[Tensor], Tensor]] = {}

    @cached_property
    def estimates(self) -> list[Float32[Tensor, "tokens h"]]:
        """The predictor's k estimates without biases."""
        return self._draft.estimates(self.x)

    @cached_property
    def level(self) -> Float32[Tensor, "tokens h"]:
        """The level that the guard compares with its limits."""
        return self._draft.guard.level(self.estimates)

    @cached_property
    def exact(self) -> tuple[list[Float32[Tensor, "tokens h"]], Float32[Tensor, "tokens h"]]:
        """The k exact pre-activations, and the responses."""
        return self._draft.neurons.evaluate(self.x)

    @cached_property
    def output(self) -> Float32[Tensor, "tokens d_out"]:
        """Output of the original site."""
        return self._draft.neurons.output(self.exact[1])

    def refined(self, row_bits: int) -> tuple[list[Float32[Tensor, "tokens h"]], Float32[Tensor, "tokens h"]]:
        """The k pre-activations, and the responses, computed from coded rows."""
        refinements, neurons = self._draft.refinements(row_bits), self._draft.neurons
        bits = refinements[0].bits
        if bits not in self._refined:
            pairs = zip(self.estimates, refinements, strict=True)
            z = neurons.add_biases([estimate + refinement(self.x) for estimate, refinement in pairs])
            self._refined[bits] = z, neurons.response(z)
        return self._refined[bits]

    def residuals(
        self, settled: Settled
    ) -> tuple[Float32[Tensor, "tokens h"], Float32[Tensor, "tokens h"], Bool[Tensor, "tokens h"]]:
        """Residuals of uncorrected values, the corrections made, and the mask of outliers."""
        leaves = self._draft.guard.leaves(self.level, settled.limits)
        outlier = settled.exact | settled.guarded & leaves
        residual = correction = settled.uncorrected.residual(*self.exact)
        if settled.row_bits < 16:
            correction = settled.uncorrected.residual(*self.refined(settled.row_bits))
        return residual, torch.where(outlier, correction, 0), outlier


class ResidualObserver:
    """Observer of the residual of fold and corrections, and of the number of corrections.

    Attributes:
        residual: of the output; its inputs are those of the site, then the factors of the copied columns of down.
        outliers: number of corrections made.
        tokens: number of tokens seen.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"residual": "parts", "outliers": "sum", "tokens": "sum"}

    def __init__(self, settled: Settled) -> None:
        self.settled, self._copied = settled, settled.copied
        down, (_, d) = settled.draft.neurons.down, settled.draft.neurons.projections[0].shape
        self.residual = Residual(d + len(self._copied), len(down))
        self.outliers, self.tokens = 0, 0

    def add(self, tokens: Tokens) -> None:
        """Adds the residuals of tokens."""
        residual, corrected, outlier = tokens.residuals(self.settled)
        terms = torch.cat([tokens.x, corrected[:, self._copied]], 1)
        self.residual.update(terms, (residual - corrected) @ self.settled.draft.neurons.down.T, tokens.output)
        self.outliers += int(outlier.sum())
        self.tokens += len(tokens.x)


def within_memory(settled: Iterable[Settled]) -> Iterator[dict[str, list[Settled]]]:
    """Groups sites so that the sums of each group's residuals fit in :data:`MEMORY`, by fingerprint."""
    group: dict[str, list[Settled]] = {}
    total = 0
    for site in settled:
        size = 8 * (site.draft.neurons.projections[0].shape[1] + len(site.copied)) ** 2
        if group and total + size > MEMORY:
            yield group
            group, total = {}, 0
        group.setdefault(site.draft.site.fingerprint, []).append(site)
        total += size
    yield group
