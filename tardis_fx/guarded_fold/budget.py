"""Splits the budget over the sites with one common price per byte, at which the model meets its budget.

The total error under a sum constraint is smallest at equal marginal error per byte (a Lagrangian relaxation, exact up
to the size of a single bin).
"""

import math
from collections.abc import Sequence

from tardis_fx.errors import CalibrationError
from tardis_fx.guarded_fold.ranges import PricedSite, Ranges

#: Rounds of choosing ranges and refitting the surrogates to them.
ROUNDS = 4


def allocate(sites: Sequence[PricedSite], allowed: float) -> list[tuple[PricedSite, Ranges]]:
    """Chooses ranges that together read at most ``allowed`` bytes per token, and refits the sites to them.

    Raises:
        CalibrationError: the folded weights alone read more.
    """
    floor = sum(site.costs.fold for site in sites)
    if floor > allowed:
        raise CalibrationError(
            f"the budget allows {allowed:,.0f} bytes per token, the folded weights alone read {floor:,}"
        )
    price = 0.0
    for _ in range(ROUNDS):
        price = _price(sites, allowed, price)
        chosen = [site.at(price) for site in sites]
        sites = [site.refit(ranges.hot) for site, ranges in zip(sites, chosen, strict=True)]
    return list(zip(sites, chosen, strict=True))


def _price(sites: Sequence[PricedSite], allowed: float, near: float) -> float:
    """The lowest price that meets the budget, to a thousandth, by bisection on its logarithm from ``near`` (or 0)."""

    def meets(price: float) -> bool:
        return sum(site.at(price).touched for site in sites) <= allowed

    low = high = math.log(near or 1.0)
    step = 1.0 if near else 8.0
    while meets(math.exp(low)):
        low, high, step = low - step, low, 2 * step
        if low < -300:  # even correcting everything is within the budget
            return math.exp(low)
    while not meets(math.exp(high)):
        low, high, step = high, high + step, 2 * step
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if meets(math.exp(middle)) else (middle, high)
    return math.exp(high)
