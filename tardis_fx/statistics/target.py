"""Finds the smallest budget that meets a target error."""

import math
from collections.abc import Callable

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.run import Fit
from tardis_fx.plan import Planned

#: Accepted relative distance of the error below its target.
SLACK = 0.03
#: Accepted relative distance of the budget from one that misses the target.
RESOLUTION = 0.02
#: Maximum number of fits.
TRIES = 8


def fit_to_target(fit: Callable[[float], Fit[list[Planned]]], floor: float, target: float) -> Fit[list[Planned]]:
    """The plans of a fit at its :func:`minimum_budget`; the error is the root mean square of the sites' errors.

    Raises:
        CalibrationError: even all bytes do not suffice.
    """
    if floor >= 1:
        raise CalibrationError(f"the folded weights alone read {floor:.0%} of the bytes")
    tried: dict[float, list[Planned]] = {}

    def error(budget: float) -> Fit[float]:
        tried[budget] = yield from fit(budget)
        return math.sqrt(sum(plan.error**2 for plan in tried[budget]) / len(tried[budget]))

    return tried[(yield from minimum_budget("target_error", error, target, floor * (1 + 1e-6), lowest=True))]


def minimum_budget(
    name: str, error: Callable[[float], Fit[float]], target: float, start: float, *, lowest: bool
) -> Fit[float]:
    """The smallest of the tried budgets whose error is at most the target.

    Budgets double until one meets the target, or halve until one misses it. Between the two, the logarithm of the error
    falls about linearly with that of the budget: false position finds the next one, kept a tenth of the interval away
    from the ends, with the Illinois rule (an end that stays twice counts half).

    Args:
        name: of the target, for error messages.
        error: fits the sites at a budget and measures their error; infinite where the budget is too small for a fit.
        target: error wanted.
        start: the first budget.
        lowest: whether no smaller budget than the first is possible.

    Raises:
        CalibrationError: even all bytes do not suffice.
    """
    low, high = (start if lowest else 0.0), math.inf
    above, below = math.inf, 0.0  # logarithms of the errors at the ends over the target
    errors: dict[float, float] = {}
    budget, moved_high = start, False
    while len(errors) < TRIES:
        errors[budget] = yield from error(budget)
        excess = math.log(max(errors[budget] / target, 1e-12))
        if errors[budget] <= target:
            if budget == low or excess >= math.log1p(-SLACK):
                return budget
            above = above / 2 if moved_high else above
            high, below, moved_high = budget, excess, True
        elif budget >= 1:
            break
        else:
            below = below / 2 if high <= 1 and not moved_high else below
            low, above, moved_high = budget, excess, False
        if high <= low * (1 + RESOLUTION):
            break
        if high <= 1:
            budget = _between(low, above, high, below)
        else:
            budget = 1.0 if len(errors) == TRIES - 1 else min(1.0, 2 * low)
    if high > 1:
        best = min(errors, key=lambda budget: errors[budget])
        raise CalibrationError(
            f"{name} {target}: out of reach, the best is {errors[best]:.3g}, at {best:.0%} of the bytes"
        )
    return high


def _between(low: float, above: float, high: float, below: float) -> float:
    """The next budget between one that misses the target and one that meets it."""
    if math.isinf(above):  # nothing is known of the errors below
        return math.sqrt(max(low, high / 4) * high)
    step = min(0.9, max(0.1, above / (above - below)))
    return low * math.pow(high / low, step)
