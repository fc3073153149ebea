"""Planes, and what they miss by bins of the score."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.partial_linear.products import BINS, Products, ProductSums, ScoreHistogram

H = 5


def neurons(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g, u = x[:, :H], x[:, H:]
    return g, u, torch.nn.functional.silu(g) * u


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn(count, 2 * H, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 3, 2 * H)


def histogram(seed: int) -> tuple[ScoreHistogram, Products, list[Tensor]]:
    """Sums over batches, the score being what the plane of all tokens misses of the exact product."""
    batches = [tokens(count, seed + count) for count in (7, 400, 1)]
    products = Products(H, neurons)
    for batch in batches:
        products.update(batch)
    found = ScoreHistogram(products.missed, neurons, lambda x: score(products, x))
    for batch in batches:
        found.update(batch)
    return found, products, batches


def score(products: Products, x: Tensor) -> Tensor:
    g, u, p = neurons(x)
    alpha, beta, gamma = products.plane.unbind(1)
    return (p - alpha * g - beta * u - gamma).abs()


@given(st.integers(0, 2**16))
def test_the_plane_is_the_one_of_least_squares(seed: int) -> None:
    _, products, batches = histogram(seed)
    g, u, p = neurons(torch.cat(batches).double())
    for n in range(H):
        columns = torch.stack([g[:, n], u[:, n], torch.ones(len(g))], 1)
        wanted = torch.linalg.lstsq(columns, p[:, n]).solution
        torch.testing.assert_close(products.plane[n].double(), wanted, rtol=1e-2, atol=1e-2)
        missed = (columns @ wanted - p[:, n]).square().mean().sqrt()
        torch.testing.assert_close(products.missed[n].double(), missed, rtol=1e-3, atol=1e-6)


@given(st.integers(0, 2**16))
def test_the_error_of_any_planes_is_that_of_the_tokens_of_each_bin(seed: int) -> None:
    found, products, batches = histogram(seed)
    x = torch.cat(batches)
    planes = torch.randn(3, H, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    g, u, p = (t.double() for t in neurons(x))
    squares = (p - planes[0] * g - planes[1] * u - planes[2]).square()
    inside = torch.bucketize  # of each neuron's own edges
    bins = torch.stack(
        [inside(score(products, x)[:, n].contiguous(), found.edges[1:-1, n].contiguous()) for n in range(H)], 1
    )
    wanted = torch.zeros(BINS, H, dtype=torch.float64).scatter_add_(0, bins, squares)
    error = found.sums.error(*planes)
    torch.testing.assert_close(error.sum(0), wanted.sum(0), rtol=1e-3, atol=1e-3)
    assert (error - wanted).abs().gt(1e-3 * wanted.sum(0)).sum() <= 2, "rounding may move a token to the next bin"


def test_every_token_is_counted_and_the_last_edge_is_beyond_all() -> None:
    found, products, batches = histogram(0)
    assert torch.all(found.sums.count.sum(0) == sum(map(len, batches)))
    assert torch.all(score(products, torch.cat(batches)).amax(0) <= found.edges[-1])
    assert torch.all(found.edges.diff(dim=0) > 0)


def test_a_neuron_without_a_chosen_bin_has_no_plane_and_a_constant_one_only_a_constant() -> None:
    found, *_ = histogram(0)
    for part in found.sums.regress(torch.zeros(BINS, H, dtype=torch.bool)):
        assert torch.all(part == 0)
    still = Products(H, neurons)
    still.update(torch.ones(50, 2 * H))
    torch.testing.assert_close(still.plane, torch.tensor([0, 0, 0.7310586]).expand(H, 3), rtol=0, atol=1e-5)
    assert torch.all(still.missed < 1e-4)


def test_sums_of_halves_add_up() -> None:
    """A profile is additive, so that shards of the text can be summed."""
    _, whole, batches = histogram(3)
    halves = [Products(H, neurons) for _ in batches]
    for half, batch in zip(halves, batches, strict=True):
        half.update(batch)
    added = ProductSums(*sum(half._sums for half in halves))
    torch.testing.assert_close(added.pp, ProductSums(*whole._sums).pp)
