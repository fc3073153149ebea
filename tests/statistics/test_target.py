"""The search for the least budget."""

import math
from collections.abc import Callable

import pytest
from builders.ffns import batches, config, ffn
from hypothesis import given
from hypothesis import strategies as st

from tardis_fx import CalibrationError, Config, calibrate
from tardis_fx.observation.run import drive, steps
from tardis_fx.statistics.target import RESOLUTION, SLACK, TRIES, minimum_budget
from tardis_fx.testing.observation import SiteObservation


def searched(error: Callable[[float], float], start: float, target: float, *, lowest: bool = True) -> float:
    """What the search finds where nothing has to be measured for an error."""
    search = minimum_budget("target", lambda budget: steps(error(budget)), target, start, lowest=lowest)
    return drive(SiteObservation([], []), search)


@given(st.floats(0.05, 0.5), st.floats(1.0, 30.0), st.floats(0.01, 0.6), st.floats(0.5, 2.0))
def test_the_minimum_budget_meets_a_target_that_falls_with_the_bytes(
    floor: float, steepness: float, target: float, bend: float
) -> None:
    tried = {}

    def error(budget: float) -> float:
        tried[budget] = 0.7 * math.exp(-steepness * max(0.0, budget - floor) ** bend)
        return tried[budget]

    if error(1.0) > target * (1 - SLACK):
        return
    tried.clear()
    found = searched(error, floor, target)
    assert tried[found] <= target
    assert found == min(budget for budget, reached in tried.items() if reached <= target)
    assert len(tried) <= TRIES
    near = any(budget * (1 + RESOLUTION) >= found > budget for budget in tried)
    assert len(tried) in {1, TRIES} or tried[found] >= target * (1 - SLACK) or near, "it stopped too early"
    least = floor + (max(0.0, math.log(0.7 / target)) / steepness) ** (1 / bend)
    assert found <= 2 * least * (1 + 1e-5), "half of the first budget that met it had missed it"


@given(st.floats(1e-3, 0.9), st.floats(1.0, 30.0), st.floats(1e-3, 0.3))
def test_without_a_lowest_budget_it_is_bracketed_from_both_sides(floor: float, steepness: float, target: float) -> None:
    tried = {}

    def error(budget: float) -> float:
        tried[budget] = 2 * math.exp(-steepness * budget) if budget >= floor else math.inf
        return tried[budget]

    if error(1.0) > target:
        with pytest.raises(CalibrationError, match="at 100% of the bytes"):
            searched(error, 0.1, target, lowest=False)
        return
    tried.clear()
    found = searched(error, 0.1, target, lowest=False)
    assert tried[found] <= target
    assert len(tried) <= TRIES
    least = max(floor, math.log(2 / target) / steepness)
    assert found <= 1.1 * least or (len(tried) == TRIES and found <= max(2 * least, 0.1 / 64))


@pytest.mark.parametrize("start", [1e-4, 0.1])
def test_a_target_out_of_reach_is_an_error_that_says_how_far(start: float) -> None:
    with pytest.raises(CalibrationError, match="out of reach, the best is 0.5, at 100% of the bytes"):
        searched(lambda budget: 0.6 - 0.1 * budget, start, 0.2)


def test_calibration_meets_the_target_with_few_bytes() -> None:
    model = ffn(64, 256)
    targets = [calibrate(model, batches(d=64), config=config(target_error=e)) for e in (0.1, 0.3)]
    for plan, target in zip(targets, (0.1, 0.3), strict=True):
        assert plan.sites[0].error <= target
    assert targets[1].touched_fraction < 0.9 * targets[0].touched_fraction


@pytest.mark.parametrize("target", [0, 1, -0.1, "little", True, float("nan")])
def test_a_wrong_target_is_named(target: object) -> None:
    with pytest.raises(ValueError, match="target_error"):
        Config(target_error=target)  # type: ignore[arg-type]
