import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.guarded_fold.costs import Costs
from tardis_fx.guarded_fold.guards import Interval
from tardis_fx.guarded_fold.ranges import PricedSite, Ranges
from tardis_fx.statistics.surrogates import Sums, products

seeds = st.integers(0, 2**16)
prices = st.floats(-12, 6).map(lambda exponent: 10**exponent)
BINS, TOKENS = 7, 60


def priced(sums: Sums, norm: Tensor, costs: Costs) -> PricedSite:
    """A site whose guard allows every interval of bins."""
    return PricedSite.from_sums(sums, Interval(norm, norm), norm.double() ** 2, costs)


class Neurons:
    """A site with few bins, its tokens kept."""

    def __init__(self, seed: int, hidden: int = 6, costs: Costs | None = None) -> None:
        g = torch.Generator().manual_seed(seed)
        z = torch.randn(TOKENS, hidden, generator=g).double() * 2
        a = torch.nn.functional.gelu(z)
        bins = (z + torch.randn(TOKENS, hidden, generator=g) / 2 + BINS / 2).clamp(0, BINS - 1).long()
        one = torch.nn.functional.one_hot(bins, BINS).double()
        self.sums = Sums(torch.stack([torch.einsum("thb,th->bh", one, product) for product in products([z], a)]), 1)
        predictor, nested = int(torch.randint(1, 40, (), generator=g)), seed % 2 == 1
        self.costs = costs or Costs(fold=100, predictor=predictor, row=40, nested=nested)
        self.norm = torch.rand(hidden, generator=g) * 3
        self.priced = priced(self.sums, self.norm, self.costs)

    def error(self) -> Tensor:
        """[bins, h]: squared error that the surrogates leave, times the squared norm of the column of down."""
        return self.sums.error(self.priced.surrogate) * self.norm.double() ** 2

    def cost(self, n: int, price: float, hot: list[bool], *, guarded: bool) -> float:
        """What a neuron costs, by the definition."""
        error, count = self.error()[:, n].tolist(), self.sums.count[:, n].tolist()
        left = sum(e for e, h in zip(error, hot, strict=True) if h)
        corrected = sum(c for c, h in zip(count, hot, strict=True) if not h)
        read = guarded or (self.costs.nested and not any(hot))
        return float(left + price * (corrected * self.costs.row + read * TOKENS * self.costs.predictor))

    def total_error(self, ranges: Ranges) -> float:
        return float(torch.where(ranges.hot, self.error(), 0).sum())


@given(seeds, prices)
def test_every_neuron_takes_the_cheapest_of_the_three_classes_and_of_all_ranges(seed: int, price: float) -> None:
    site = Neurons(seed)
    ranges = site.priced.at(price)
    runs = [[i <= b < j for b in range(BINS)] for i, j in itertools.combinations_with_replacement(range(BINS + 1), 2)]
    for n in range(len(site.norm)):
        folded, exact = (
            site.cost(n, price, [True] * BINS, guarded=False),
            site.cost(n, price, [False] * BINS, guarded=False),
        )
        guarded = min(site.cost(n, price, run, guarded=True) for run in runs)
        hot = ranges.hot[:, n].tolist()
        taken = site.cost(n, price, hot, guarded=bool(ranges.guarded[n]))
        assert taken <= min(folded, exact, guarded) * (1 + 1e-9) + 1e-12
        assert hot in runs


@given(seeds, prices)
def test_the_classes_exclude_each_other_and_say_what_is_hot(seed: int, price: float) -> None:
    ranges = Neurons(seed).priced.at(price)
    folded = ~ranges.guarded & ~ranges.exact
    assert not (ranges.guarded & ranges.exact).any()
    assert ranges.hot[:, folded].all()
    assert not ranges.hot[:, ranges.exact].any()


@given(seeds, prices)
def test_touched_bytes_are_fold_predictor_rows_and_corrections(seed: int, price: float) -> None:
    site = Neurons(seed)
    ranges = site.priced.at(price)
    corrected = float(torch.where(ranges.hot, 0, site.sums.count).sum()) / TOKENS
    read = ranges.guarded | ranges.exact if site.costs.nested else ranges.guarded
    expected = site.costs.fold + site.costs.predictor * int(read.sum()) + site.costs.row * corrected
    assert abs(ranges.touched - expected) < 1e-6


@given(seeds, prices, prices)
def test_a_higher_price_never_touches_more_and_never_errs_less(seed: int, one: float, other: float) -> None:
    site = Neurons(seed)
    cheap, dear = site.priced.at(min(one, other)), site.priced.at(max(one, other))
    assert dear.touched <= cheap.touched * (1 + 1e-9)
    assert site.total_error(dear) >= site.total_error(cheap) * (1 - 1e-9) - 1e-12


@given(seeds)
def test_bytes_that_cost_nothing_leave_no_error_and_bytes_beyond_price_are_not_read(seed: int) -> None:
    site = Neurons(seed)
    assert site.total_error(site.priced.at(0.0)) <= 1e-9
    dear = site.priced.at(1e12)
    assert dear.hot.all()
    assert dear.touched == site.costs.fold


@given(seeds, prices)
def test_refitting_to_the_hot_bins_never_adds_error_there(seed: int, price: float) -> None:
    site = Neurons(seed)
    ranges = site.priced.at(price)
    before = site.total_error(ranges)
    site.priced = site.priced.refit(ranges.hot)
    assert site.total_error(ranges) <= before * (1 + 1e-9) + 1e-9
    assert torch.all(site.priced.surrogate[ranges.exact] == 0)


@given(seeds, prices)
def test_a_column_of_down_that_is_zero_is_folded(seed: int, price: float) -> None:
    site = Neurons(seed)
    zero = priced(site.sums, torch.zeros(6), site.costs)
    assert zero.at(price).touched == site.costs.fold
