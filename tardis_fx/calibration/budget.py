"""Splits the budget over the sites: one price per byte, the same everywhere, at which the model meets its budget.

Equal marginal error per byte is the condition of least total error under a sum constraint (a Lagrangian relaxation;
exact up to the size of a single bin).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tardis_fx.errors import CalibrationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tardis_fx.calibration.ranges import Ranges, SiteRanges

#: Rounds of choosing ranges and refitting the surrogates to them.
ROUNDS = 4
_BISECTIONS = 50


def allocate(sites: Sequence[SiteRanges], allowed: float) -> list[Ranges]:
    """Ranges of all sites that together read at most ``allowed`` bytes per token, and the surrogates that fit them.

    Raises:
        CalibrationError: the folded weights alone read more.
    """
    floor = sum(site.costs.fold for site in sites)
    if floor > allowed:
        raise CalibrationError(f"the budget allows {allowed:,.0f} bytes per token, the folded weights alone read {floor:,}: raise the budget")
    for _ in range(ROUNDS):
        chosen = _meet(sites, allowed)
        for site, ranges in zip(sites, chosen, strict=True):
            site.refit(ranges.hot)
    chosen = _meet(sites, allowed)
    for site, ranges in zip(sites, chosen, strict=True):
        site.refit(ranges.hot)
    return chosen


def _meet(sites: Sequence[SiteRanges], allowed: float) -> list[Ranges]:
    """The ranges at the lowest price that meets the budget, by bisection on the logarithm of the price."""
    low, high = 1e-30, 1e30
    for _ in range(_BISECTIONS):
        price = (low * high) ** 0.5
        if sum(site.at(price).touched for site in sites) > allowed:
            low = price
        else:
            high = price
    return [site.at(high) for site in sites]
