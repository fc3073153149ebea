"""The best affine surrogate of a neuron, from sums."""

from __future__ import annotations

import pytest
import torch
from builders.ffns import inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.statistics.affine import regress


def sums_of(terms: Tensor) -> Tensor:
    """[h, k, k] from [tokens, h, k]."""
    return torch.einsum("thi,thj->hij", terms, terms)


@given(st.integers(1, 2), st.integers(0, 2**16), st.floats(-20, 20))
def test_the_surrogate_is_that_of_least_squares(slopes: int, seed: int, offset: float) -> None:
    tokens, h = 40, 3
    z = inputs(tokens, h, slopes, seed=seed).double() + offset
    given_ = z.prod(2).tanh() + inputs(tokens, h, seed=seed + 1).double()
    found = regress(sums_of(torch.cat([torch.ones(tokens, h, 1), z, given_[..., None]], 2)))
    for n in range(h):
        terms = torch.cat([z[:, n], torch.ones(tokens, 1)], 1)
        best = torch.linalg.lstsq(terms, given_[:, n, None]).solution[:, 0]
        torch.testing.assert_close(torch.cat([found[0][n], found[1][n, None]]), best, rtol=1e-5, atol=1e-6)
        assert float(found[2][n]) == pytest.approx(float((terms @ best - given_[:, n]).square().sum()), rel=1e-5)


def test_a_preactivation_that_never_varies_has_no_slope_and_takes_none_from_the_other() -> None:
    z = torch.stack([torch.full((50,), 3.0), inputs(50, seed=1)], 1).double()
    terms = torch.cat([torch.ones(50, 1), z, 3 * z[:, 1:] + 1], 1)[:, None]
    slopes, intercepts, missed = regress(sums_of(terms))
    torch.testing.assert_close(slopes[0], torch.tensor([0.0, 3.0]).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(intercepts[0], torch.tensor(1.0).double(), rtol=1e-9, atol=1e-9)
    assert float(missed[0]) < 1e-9
