"""Chooses the widths of fold and rows, site by site."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tardis_fx.partial_linear.settled import Settled
    from tardis_fx.plan import SitePlan


@dataclass(frozen=True, eq=False)
class Fitted:
    """A site fitted at one pair of widths.

    Attributes:
        settled: what was fitted.
        plan: the result.
        error: mean squared error of the site's output, summed over its features, on held-back tokens.
    """

    settled: Settled
    plan: SitePlan
    error: float


def choose_widths(fitted: Sequence[Sequence[Fitted]]) -> list[Fitted]:
    """Of every site one fit, so that the total error is least; no more bytes are touched than at any one width.

    At a price of a byte every site takes the fit of least ``error + price * touched``. What is chosen changes only at
    the finitely many prices where two fits of a site cost the same; all are tried, and so is the same width everywhere.

    Args:
        fitted: by site, its fits at all widths, in the same order at every site.
    """
    uniform = [list(fits) for fits in zip(*fitted, strict=True)]
    allowed = max(_touched(fits) for fits in uniform)
    prices = {0.0}
    for fits in fitted:
        for one, other in combinations(fits, 2):
            difference = one.plan.touched_bytes - other.plan.touched_bytes
            if difference and (other.error - one.error) / difference > 0:
                prices.add((other.error - one.error) / difference)
    mixed = (
        [min(fits, key=lambda f: f.error + price * (1 + 1e-9) * f.plan.touched_bytes) for fits in fitted]
        for price in prices
    )
    within = [fits for fits in (*uniform, *mixed) if _touched(fits) <= allowed]
    return min(within, key=lambda fits: sum(fit.error for fit in fits))


def _touched(fits: Sequence[Fitted]) -> float:
    return sum(fit.plan.touched_bytes for fit in fits)
