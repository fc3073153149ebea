from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.partial_linear.histogram import BINS, Histogram, Sums
from tardis_fx.quantisation import quantise
from tardis_fx.statistics.moments import Moments

seeds = st.integers(0, 2**16)
FIELDS = ("count", "z", "zz", "a", "az", "aa")


def moments_of(*parts: Tensor) -> Moments:
    moments = Moments(parts[0].shape[1])
    for part in parts:
        moments.update(part)
    return moments


def site(seed: int, tokens: int = 300, d: int = 8, hidden: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with a mean, W1, b1."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, d, generator=g) + 1,
        torch.randn(hidden, d, generator=g) / 3,
        torch.randn(hidden, generator=g),
    )


def direct(bins: Tensor, z: Tensor, a: Tensor) -> Sums:
    """The sums by their definition, in float64: bins, z and a are [tokens, h]."""
    one = torch.nn.functional.one_hot(bins, BINS).double()  # [tokens, h, bins]
    z, a = z.double(), a.double()
    values = (torch.ones_like(z), z, z * z, a, a * z, a * a)
    return Sums(*(torch.einsum("thb,th->bh", one, value) for value in values))


# ---- Moments


@given(seeds, st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_moments_are_mean_and_covariance_whatever_the_batches(seed: int, sizes: list[int]) -> None:
    x, _, _ = site(seed, sum(sizes))
    moments = moments_of(*x.split(sizes))
    assert moments.tokens == len(x)
    torch.testing.assert_close(moments.gram.float(), x.T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(moments.mean, x.double().mean(0))
    expected = torch.cov(x.double().T, correction=0)
    torch.testing.assert_close(moments.covariance, expected, rtol=1e-4, atol=1e-4)


# ---- Histograms


@given(seeds, st.booleans(), st.sampled_from(["gelu", "relu", "silu"]))
def test_histogram_sums_are_direct_sums(seed: int, bias: bool, name: str) -> None:
    x, w1, b1 = site(seed)
    moments, activation = moments_of(x), ACTIVATIONS[name]
    predictor = quantise(w1, moments.gram, 3, 64)
    histogram = Histogram(moments, w1, b1 if bias else None, predictor, activation)
    estimates, inner = predictor(x), histogram.edges[1:-1]
    width = inner[1] - inner[0]
    unsure = ((estimates[:, None] - inner).abs().amin(1) < 1e-3 * width).any(1)  # on an edge, to rounding
    x, estimates = x[~unsure], estimates[~unsure]
    for part in x.split(100):
        histogram.update(part)
    z = x @ w1.T + (b1 if bias else 0)
    bins = (estimates[:, None] >= inner).sum(1)
    expected = direct(bins, z, activation.eager(z))
    for field in FIELDS:
        torch.testing.assert_close(getattr(histogram.sums, field), getattr(expected, field), rtol=1e-4, atol=1e-3)


@given(seeds)
def test_the_outer_edges_are_the_extreme_estimates_where_these_lie_beyond(seed: int) -> None:
    x, w1, b1 = site(seed)
    moments = moments_of(x)
    predictor = quantise(w1, moments.gram, 3, 64)
    histogram = Histogram(moments, w1, b1, predictor, ACTIVATIONS["gelu"])
    laid = histogram.edges[1:-1]
    histogram.update(x)
    histogram.update(20 * x[:3])
    seen = torch.cat([predictor(x), predictor(20 * x[:3])])
    assert torch.all(histogram.edges[0] <= seen.amin(0))
    assert torch.all(histogram.edges[-1] >= seen.amax(0))
    assert torch.all(histogram.edges.diff(dim=0) >= 0)
    assert torch.equal(histogram.edges[1:-1], laid)
    assert torch.all(histogram.sums.count.sum(0) == len(seen))


def test_a_neuron_whose_estimate_never_changes_has_one_full_bin() -> None:
    x, w1, b1 = site(0)
    w1[2] = 0
    moments = moments_of(x)
    histogram = Histogram(moments, w1, b1, quantise(w1, moments.gram, 3, 64), ACTIVATIONS["gelu"])
    histogram.update(x)
    assert torch.isfinite(histogram.edges).all()
    assert histogram.sums.count[:, 2].max() == len(x)
    assert torch.all(histogram.sums.count.sum(0) == len(x))


def test_most_tokens_lie_within_the_inner_bins() -> None:
    x, w1, b1 = site(0, tokens=3000)
    moments = moments_of(x)
    histogram = Histogram(moments, w1, b1, quantise(w1, moments.gram, 3, 64), ACTIVATIONS["gelu"])
    histogram.update(x)
    assert histogram.sums.count[1:-1].sum() == histogram.sums.count.sum()
    assert torch.all((histogram.sums.count > 0).sum(0) > BINS / 4), "too coarse"


# ---- Sums


@given(seeds)
def test_the_error_of_a_bin_is_the_sum_of_squares_to_the_rounding_of_the_sums(seed: int) -> None:
    tokens = 200
    g = torch.Generator().manual_seed(seed)
    bins, z = torch.randint(0, BINS, (tokens, 4), generator=g), torch.randn(tokens, 4, generator=g)
    a = ACTIVATIONS["gelu"].eager(z)
    slope, intercept = torch.randn(4, generator=g).double(), torch.randn(4, generator=g).double()
    found = direct(bins, z, a).error(slope, intercept)
    residuals, terms = a - slope * z - intercept, a.abs() + (slope * z).abs() + intercept.abs()
    # The squares cancel, so the error is relative to the sums that are added, not to what is left of them: these are
    # at most the sum of terms², each term of it rounded by its products (4 of them) and one addition a token.
    bound = (tokens + 16) * torch.finfo(torch.float64).eps * direct(bins, terms, terms).zz
    assert ((found - direct(bins, residuals, residuals).zz).abs() <= bound).all()
    assert (found >= 0).all()


@given(seeds, st.floats(0.05, 1))
def test_regression_is_least_squares_over_the_chosen_bins(seed: int, share: float) -> None:
    g = torch.Generator().manual_seed(seed)
    bins, z = torch.randint(0, BINS, (400, 3), generator=g), torch.randn(400, 3, generator=g) * 2 + 1
    a = ACTIVATIONS["gelu"].eager(z)
    chosen = torch.rand(BINS, 3, generator=g) < share
    slope, intercept = direct(bins, z, a).regress(chosen)
    for n in range(3):
        used = chosen[bins[:, n], n]
        if used.sum() < 3:
            continue
        columns = torch.stack([z[used, n], torch.ones(int(used.sum()))], 1).double()
        expected = torch.linalg.lstsq(columns, a[used, n, None].double()).solution[:, 0]
        torch.testing.assert_close(torch.stack([slope[n], intercept[n]]), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chosen", ["none", "empty bins", "one value"])
def test_regression_over_what_tells_no_slope_gives_a_constant(chosen: str) -> None:
    bins = torch.tensor([[0], [0], [5]])
    sums = direct(bins, torch.tensor([[2.0], [2.0], [3.0]]), torch.tensor([[1.0], [1.0], [7.0]]))
    mask = torch.zeros(BINS, 1, dtype=torch.bool)
    if chosen == "empty bins":
        mask[50:] = True
    if chosen == "one value":
        mask[0] = True
    slope, intercept = sums.regress(mask)
    assert slope.item() == 0
    assert intercept.item() == (1 if chosen == "one value" else 0)
