"""The best affine surrogates of neurons, and their errors, from sums; for one pre-activation and for two."""

import pytest
import torch
from builders.ffns import inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.statistics.surrogates import Sums, products

H = 3
ks, seeds = st.integers(1, 2), st.integers(0, 2**16)


def sums_of(z: list[Tensor], response: Tensor) -> Sums:
    """The sums of tokens, [tokens, H] each, by their definition."""
    return Sums(torch.stack([product.sum(0) for product in products(z, response)]), len(z))


def neurons(k: int, seed: int, tokens: int = 60, offset: float = 0.0) -> tuple[list[Tensor], Tensor]:
    """Pre-activations, and responses that are not affine in them."""
    z = [inputs(tokens, H, seed=seed + i).double() + offset for i in range(k)]
    return z, sum(z[1:], z[0]).tanh() + inputs(tokens, H, seed=seed + 9).double()


def columns(z: list[Tensor], n: int) -> Tensor:
    return torch.stack([*(one[:, n] for one in z), torch.ones(len(z[0]), dtype=torch.float64)], 1)


@given(ks, seeds, st.floats(-20, 20))
def test_the_surrogate_is_that_of_least_squares(k: int, seed: int, offset: float) -> None:
    z, response = neurons(k, seed, offset=offset)
    sums = sums_of(z, response)
    found, error = sums.regress(), sums.error(sums.regress())
    for n in range(H):
        best = torch.linalg.lstsq(columns(z, n), response[:, n, None]).solution[:, 0]
        torch.testing.assert_close(found[n], best, rtol=1e-5, atol=1e-6)
        left = float((columns(z, n) @ best - response[:, n]).square().sum())
        assert float(error[n]) == pytest.approx(left, rel=1e-5)


@given(ks, seeds)
def test_the_error_is_the_sum_of_squares_to_the_rounding_of_the_sums(k: int, seed: int) -> None:
    z, response = neurons(k, seed)
    surrogate = inputs(H, k + 1, seed=seed + 20).double()
    found = sums_of(z, response).error(surrogate)
    for n in range(H):
        residuals = response[:, n] - columns(z, n) @ surrogate[n]
        terms = response[:, n].abs() + columns(z, n).abs() @ surrogate[n].abs()
        # The squares cancel, so the error is relative to the sums that are added, not to what is left of them: these
        # are at most the sum of terms², each term of it rounded by its products and one addition a token.
        bound = (len(response) + 32) * torch.finfo(torch.float64).eps * terms.square().sum()
        assert (found[n] - residuals.square().sum()).abs() <= bound
    assert (found >= 0).all()


@given(ks, seeds, st.floats(0.05, 1))
def test_regression_within_bins_is_that_of_their_tokens(k: int, seed: int, share: float) -> None:
    z, response = neurons(k, seed, tokens=400)
    g = torch.Generator().manual_seed(seed)
    bins, chosen = torch.randint(0, 10, (400, H), generator=g), torch.rand(10, H, generator=g) < share
    one = torch.nn.functional.one_hot(bins, 10).double()
    sums = Sums(torch.stack([torch.einsum("thb,th->bh", one, product) for product in products(z, response)]), k)
    found = sums.within(chosen).regress()
    for n in range(H):
        used = chosen[bins[:, n], n]
        if used.sum() > 3:
            best = torch.linalg.lstsq(columns(z, n)[used], response[used, n, None]).solution[:, 0]
            torch.testing.assert_close(found[n], best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_without_a_token_a_surrogate_is_zero_and_of_one_value_it_is_a_constant(k: int) -> None:
    z, response = neurons(k, 0)
    assert not sums_of([one[:0] for one in z], response[:0]).regress().any()
    same = [one[:1].expand(5, H) for one in z], response[:1].expand(5, H)
    found = sums_of(*same).regress()
    assert not found[:, :-1].any()
    torch.testing.assert_close(found[:, -1], response[0])


@pytest.mark.parametrize("constant", [0, 1])
def test_a_preactivation_that_never_varies_has_no_slope_and_takes_none_from_the_other(constant: int) -> None:
    varying = inputs(50, H, seed=1).double()
    z = [varying, torch.full_like(varying, 3)] if constant else [torch.full_like(varying, 3), varying]
    sums = sums_of(z, 3 * varying + 1)
    wanted = [3.0, 0.0, 1.0] if constant else [0.0, 3.0, 1.0]
    torch.testing.assert_close(sums.regress(), torch.tensor(wanted).double().expand(H, 3), rtol=1e-9, atol=1e-9)
    assert sums.error(sums.regress()).max() < 1e-9


def test_a_preactivation_that_repeats_another_has_no_slope() -> None:
    z = inputs(50, H, seed=1).double()
    found = sums_of([z, -2 * z], z.square()).regress()
    assert not found[:, 1].any()
    torch.testing.assert_close(found[:, [0, 2]], sums_of([z], z.square()).regress())
