"""The hot ranges that guards allow."""

import itertools

import torch
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.guarded_fold.guards import Guard, Interval, Score
from tardis_fx.statistics.neurons import Neurons

NONE = torch.zeros(4)
NEURONS = Neurons((torch.zeros(4, 1),) * 2, (None, None), torch.zeros(1, 4), None, ACTIVATIONS["silu"])
INTERVAL, SCORE = Interval(NONE, NONE), Score(NEURONS, torch.zeros(4, 3), NONE)
tables = st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=9)


def runs(guard: Guard, bins: int) -> list[tuple[int, int]]:
    """Start and stop of all hot ranges that a guard allows."""
    every = list(itertools.combinations_with_replacement(range(bins + 1), 2))
    return every if guard is INTERVAL else [(start, stop) for start, stop in every if start == 0]


@settings(max_examples=examples(200))
@given(st.sampled_from([INTERVAL, SCORE]), tables)
def test_the_cheapest_run_is_the_one_that_brute_force_finds(guard: Guard, values: list[list[int]]) -> None:
    hot = guard.cheapest(torch.tensor(values, dtype=torch.float64))
    for n in range(4):
        column, chosen = [row[n] for row in values], hot[:, n].tolist()
        every = runs(guard, len(column))
        assert chosen in [[start <= i < stop for i in range(len(column))] for start, stop in every]
        total = sum(value for value, is_hot in zip(column, chosen, strict=True) if is_hot)
        assert total == min(sum(column[start:stop]) for start, stop in every)


@given(st.sampled_from([INTERVAL, SCORE]), st.data())
def test_limits_leave_out_the_levels_of_all_other_bins(guard: Guard, data: st.DataObject) -> None:
    bins = 9
    edges = torch.arange(bins + 1.0)[:, None].expand(-1, 4).clone()
    hot = torch.zeros(bins, 4, dtype=torch.bool)
    for n in range(4):
        start, stop = data.draw(st.sampled_from(runs(guard, bins)))
        hot[start:stop, n] = True
    if guard is SCORE:
        edges[0] = -torch.inf
    level = torch.arange(bins)[:, None].expand(-1, 4) + 0.5  # in the middle of each bin
    assert torch.equal(guard.leaves(level, guard.limits(hot, edges)), ~hot)
