from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st

from tardis_fx.statistics.moments import ROUNDING, Moments


@given(st.integers(0, 2**16), st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_moments_are_mean_and_covariance_whatever_the_batches(seed: int, sizes: list[int]) -> None:
    x = torch.randn(sum(sizes), 8, generator=torch.Generator().manual_seed(seed)) + 1
    with patch("tardis_fx.statistics.moments.BLOCK", 3):
        moments = Moments(8)
        for part in x.split(sizes):
            moments.update(part)
        gram, covariance, noise = moments.gram, moments.covariance, moments.noise
    assert moments.tokens == len(x)
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(gram.float(), x.T @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(moments.mean, x.double().mean(0))
    torch.testing.assert_close(covariance, torch.cov(x.double().T, correction=0), rtol=1e-4, atol=1e-4)
    assert torch.equal(noise, ROUNDING * gram.diagonal() / len(x))
