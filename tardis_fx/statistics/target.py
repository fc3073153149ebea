"""Finds the smallest budget that meets a target error."""

import math
from collections.abc import Callable

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.run import Fit
from tardis_fx.plan import Planned

#: Accepted relative distance of the error below its target.
SLACK = 0.03
#: Maximum number of fits.
TRIES = 8


def fit_to_target(fit: Callable[[float], Fit[list[Planned]]], floor: float, target: float) -> Fit[list[Planned]]:
    """The plans of a fit at its :func:`minimum_budget`; the error is the root mean square of the sites' errors."""
    tried: dict[float, list[Planned]] = {}

    def error(budget: float) -> Fit[float]:
        tried[budget] = yield from fit(budget)
        return math.sqrt(sum(plan.error**2 for plan in tried[budget]) / len(tried[budget]))

    return tried[(yield from minimum_budget(error, floor, target))]


def minimum_budget(error: Callable[[float], Fit[float]], floor: float, target: float) -> Fit[float]:
    """The smallest of the tried budgets whose error is at most the target.

    Between two budgets that enclose the target, the logarithm of the error falls about linearly with the budget. This
    uses false position, kept a tenth of the interval away from the ends, with the Illinois rule (an end that stays
    twice counts half).

    Args:
        error: fits the sites at a budget and measures their error.
        floor: the smallest possible budget.
        target: error wanted.

    Raises:
        CalibrationError: even all bytes do not suffice.
    """
    low, high = floor * (1 + 1e-6), 1.0
    if low >= high:
        raise CalibrationError(f"the folded weights alone read {floor:.0%} of the bytes")
    at_low = yield from error(low)
    if at_low <= target:
        return low
    moved_high = False
    above, below = math.log(at_low / target), 0.0  # logarithms of the errors at the ends over the target
    for _ in range(TRIES - 1):
        middle = min(1.0, 2 * low)  # most of the gain lies there
        if below:
            middle = low + (high - low) * min(0.9, max(0.1, above / (above - below)))
        at_middle = yield from error(middle)
        if at_middle <= target:
            if at_middle >= target * (1 - SLACK):
                return middle
            above = above / 2 if below and moved_high else above
            high, below, moved_high = middle, math.log(max(at_middle, 1e-12) / target), True
        else:
            below = below / 2 if below and not moved_high else below
            low, at_low, above, moved_high = middle, at_middle, math.log(at_middle / target), False
            if middle >= 1:
                break
    if not below:
        raise CalibrationError(
            f"target_error {target}: out of reach, the error is {at_low:.3g} at {low:.0%} of the bytes"
        )
    return high
