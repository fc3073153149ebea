"""Chooses the widths of fold and rows for each site."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tardis_fx.guarded_fold.settled import Settled
from tardis_fx.plan import SitePlan


@dataclass(frozen=True, eq=False)
class Fitted:
    """A site fitted at one pair of widths.

    Attributes:
        error: mean squared error of the site's output, summed over its features, on held-back tokens.
    """

    settled: Settled
    plan: SitePlan
    error: float


def choose_widths(fitted: Sequence[Sequence[Fitted]]) -> list[Fitted]:
    """Chooses one fit for every site to minimise the total error, with no more bytes than one width everywhere.

    At a price per byte every site takes the fit with the smallest ``error + price * touched``. The choice changes only
    at the finitely many prices where two fits of a site cost the same; all of these and each uniform width are tried.

    Args:
        fitted: by site, its fits at all widths, in the same order at every site.
    """
    uniform = [list(fits) for fits in zip(*fitted, strict=True)]
    allowed = max(_touched(fits) for fits in uniform)
    prices = {0.0}
    for fits in fitted:
        for first, second in combinations(fits, 2):
            difference = first.plan.touched_bytes - second.plan.touched_bytes
            if difference and (price := (second.error - first.error) / difference) > 0:
                prices.add(price)
    mixed = (
        [min(fits, key=lambda f: f.error + price * (1 + 1e-9) * f.plan.touched_bytes) for fits in fitted]
        for price in prices
    )
    within = [fits for fits in (*uniform, *mixed) if _touched(fits) <= allowed]
    return min(within, key=lambda fits: sum(fit.error for fit in fits))


def _touched(fits: Sequence[Fitted]) -> float:
    return sum(fit.plan.touched_bytes for fit in fits)
