"""Sums by bins of the level that a guard measures, for neurons of one pre-activation and of two."""

import pytest
import torch
from builders.ffns import FFN, ffn, inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.guarded_fold.draft import Draft, DraftObserver, Quantisation
from tardis_fx.guarded_fold.guards import Interval
from tardis_fx.guarded_fold.histogram import Histogram
from tardis_fx.statistics.surrogates import products
from tardis_fx.testing.ffn import gated_ffn
from tardis_fx.testing.observation import observed

D, H = 8, 20
GATED = pytest.mark.parametrize("gated", [False, True])


def tokens(count: int, seed: int = 0) -> Tensor:
    return inputs(count, D, seed=seed) + 1


def drafted(gated: bool, x: Tensor, activation: str = "gelu", bias: bool = True, seed: int = 0) -> Draft:
    make = gated_ffn if gated else ffn
    site = observed(make(D, H, activation, bias=bias, seed=seed))
    seen = DraftObserver(site)
    seen.update(x)
    return Draft.from_observer(site, seen, Quantisation(3, 64, "gptq"))


def filled(draft: Draft, x: Tensor) -> Histogram:
    histogram = Histogram(draft)
    for part in x.split(100):
        histogram.update(part)
    return histogram


@given(st.booleans(), st.integers(0, 2**16), st.booleans(), st.sampled_from(["gelu", "relu", "silu"]))
def test_histogram_sums_are_direct_sums(gated: bool, seed: int, bias: bool, activation: str) -> None:
    x = tokens(300, seed)
    draft = drafted(gated, x, activation, bias, seed)
    level, inner = draft.guard.level(draft.estimates(x)), Histogram(draft).edges[1:-1]
    # On an edge, to rounding.
    unsure = ((level[:, None] - inner).abs() < 1e-3 * inner.diff(dim=0).amin(0)).any(1).any(1)
    x, level = x[~unsure], level[~unsure]
    histogram = filled(draft, x)
    one = torch.nn.functional.one_hot((level[:, None] >= inner).sum(1), draft.guard.bins).double()
    z, response = draft.neurons.evaluate(x)
    for found, product in zip(histogram.sums.table, products(z, response), strict=True):
        wanted = torch.einsum("thb,th->bh", one, product.double())
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@GATED
def test_the_outer_edges_are_the_extreme_levels_where_these_lie_beyond(gated: bool) -> None:
    x = tokens(300)
    draft = drafted(gated, x)
    histogram = Histogram(draft)
    laid = histogram.edges[1:-1].clone()
    histogram.update(x)
    histogram.update(20 * x[:3])
    seen = torch.cat([draft.guard.level(draft.estimates(part)) for part in (x, 20 * x[:3])])
    assert torch.all(histogram.edges[0] <= seen.amin(0))
    assert torch.all(histogram.edges[-1] >= seen.amax(0))
    assert torch.all(histogram.edges.diff(dim=0) >= 0)
    assert torch.equal(histogram.edges[1:-1], laid)
    assert torch.all(histogram.sums.count.sum(0) == len(seen))


@GATED
def test_a_neuron_whose_estimates_never_change_has_one_full_bin(gated: bool) -> None:
    model = gated_ffn(D, H) if gated else ffn(D, H)
    for parameter in (model.up if isinstance(model, FFN) else model.gate_up).parameters():
        if parameter.dim() == 2:
            parameter.data[2] = 0
    x, site = tokens(300), observed(model)
    seen = DraftObserver(site)
    seen.update(x)
    histogram = filled(Draft.from_observer(site, seen, Quantisation(3, 64, "gptq")), x)
    assert not histogram.edges.isnan().any()
    assert histogram.sums.count[:, 2].max() == len(x)
    assert torch.all(histogram.sums.count.sum(0) == len(x))


def test_most_tokens_lie_within_the_inner_bins_of_an_interval() -> None:
    x = tokens(3000)
    count = filled(drafted(False, x), x).sums.count
    assert count[1:-1].sum() == count.sum()
    assert torch.all((count > 0).sum(0) > Interval.bins / 4), "too coarse"
