from itertools import product
from types import SimpleNamespace
from unittest.mock import Mock

from hypothesis import given
from hypothesis import strategies as st

from tardis_fx.guarded_fold.widths import Fitted, choose_widths

numbers = st.integers(0, 20).map(float)
sites = st.integers(1, 4).flatmap(
    lambda widths: st.lists(
        st.lists(st.tuples(numbers, numbers), min_size=widths, max_size=widths), min_size=1, max_size=4
    )
)


def fitted(table: list[list[tuple[float, float]]]) -> list[list[Fitted]]:
    """Fits with the errors and the touched bytes of a table."""
    return [[Mock(Fitted, error=error, plan=SimpleNamespace(touched_bytes=t)) for error, t in site] for site in table]


def total(fits: list[Fitted]) -> tuple[float, float]:
    return sum(f.error for f in fits), sum(f.plan.touched_bytes for f in fits)


@given(sites)
def test_chosen_widths_miss_no_more_than_any_one_width_and_touches_no_more_than_the_dearest(
    table: list[list[tuple[float, float]]],
) -> None:
    fits = fitted(table)
    missed, touched = total(choose_widths(fits))
    uniform = [total(list(column)) for column in zip(*fits, strict=True)]
    assert missed <= min(m for m, _ in uniform)
    assert touched <= max(t for _, t in uniform)


@given(sites)
def test_every_site_takes_one_of_its_own_fits(table: list[list[tuple[float, float]]]) -> None:
    fits = fitted(table)
    assert all(any(choice is fit for fit in own) for choice, own in zip(choose_widths(fits), fits, strict=True))


@given(sites)
def test_chosen_widths_are_off_the_best_choice_of_all_by_no_more_than_what_one_site_can_miss(
    table: list[list[tuple[float, float]]],
) -> None:
    fits = fitted(table)
    missed = total(choose_widths(fits))[0]
    allowed = max(total(list(column))[1] for column in zip(*fits, strict=True))
    bound = min(m for m, t in (total(list(choice)) for choice in product(*fits)) if t <= allowed)
    gap = max(max(f.error for f in own) - min(f.error for f in own) for own in fits)
    assert bound <= missed <= bound + gap + 1e-9
