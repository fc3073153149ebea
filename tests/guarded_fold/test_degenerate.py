"""Calibration data that says little: a plan that states the error that it makes, or a CalibrationError."""

import math
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from builders.ffns import config, ffn
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx import CalibrationError
from tardis_fx.observation.site import fitted_tokens
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.planning import plan_for
from tardis_fx.quantisation import DAMPING, factor, inverse_factor
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.reference import estimate
from tardis_fx.statistics.moments import Moments, precise
from tardis_fx.statistics.regression import Residual, relative_error
from tardis_fx.testing.ffn import FFN, gated_ffn
from tardis_fx.testing.observation import SiteObservation

D = 12


def normal(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "as many as there are": lambda x: x,
    "constant rows": lambda x: torch.ones_like(x),
    "one row": lambda x: x[:1].expand_as(x),
    "constant columns": lambda x: torch.cat([x[:, :4], torch.full_like(x[:, 4:], 3.0)], 1),
    "all zeros": torch.zeros_like,
    "dead columns": lambda x: x * (torch.arange(D) < 3),
    "repeated columns": lambda x: x[:, :1].expand_as(x),
    "two directions": lambda x: x[:, :2] @ normal(2, 7),
    "a huge mean": lambda x: x + 1e3,
    "a huge mean of one column": lambda x: x + 1e4 * (torch.arange(D) == 3),
    "tiny": lambda x: 1e-12 * x,
    "large": lambda x: 1e6 * x,
    "huge": lambda x: 1e18 * x,
    "beyond all squares": lambda x: 1e30 * x,
    "every neuron dead": lambda x: -x.abs(),
}
METHODS = ("guarded_fold", "gptq", "gptq_rotated", "sparsegpt", "low_rank", "hot_fold", "linear_replace")


def on_an_edge(plan: SitePlan, x: Tensor) -> bool:
    """Whether rounding decides if an estimate is in its hot range; [tokens, d].

    That is so of two inputs that are as frequent: they lie a standard deviation off the mean, and a bin is an eighth of it.
    """
    if plan.kind == "gated" or "guard" not in plan.tensors:
        return False
    codes, scale, zero = (plan.tensors[name][:, 0] for name in ("codes", "scale", "zero"))
    found = estimate(x, codes, scale, zero, int(plan.settings["bits"]))
    edges = plan.tensors["guard"].T
    return bool(((found - edges[:, None]).abs() <= 1e-5 * found.abs()).any())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "gated"])
@settings(max_examples=examples(10))
@given(
    st.sampled_from(sorted(DATA)),
    st.lists(st.sampled_from([1, 7, 8, 9, 40, 200]), min_size=1, max_size=3),
    st.sampled_from([4, 16]),
    st.sampled_from(["relu", "gelu"]),
    st.integers(0, 2**16),
)
def test_a_plan_states_the_error_that_it_makes(
    method: str, kind: str, name: str, sizes: list[int], bits: int, activation: str, seed: int
) -> None:
    model = ffn(D, 40, activation, seed=seed) if kind == "plain" else gated_ffn(D, 40, activation, seed=seed)
    with torch.no_grad():
        if name == "every neuron dead" and isinstance(model, FFN):
            model.up.weight.abs_()
            model.up.bias.abs_().neg_()
    batches = [DATA[name](normal(size, seed + i)) for i, size in enumerate(sizes)]
    observation = SiteObservation([model], batches)
    (site,) = observation.sites
    chosen = config(method=method, budget=0.7, fold_bits=bits, row_bits=bits)
    try:
        (plan,) = plan_for(observation, chosen).sites
    except CalibrationError as error:
        assert str(error)
        return
    if plan.method is None:
        assert plan.reason
        return
    assert any(size >= 8 for size in sizes), "no token was held back"
    rewrite = rewrite_named(plan.method)
    held = torch.cat([batch[fitted_tokens(len(batch)) :] for batch in batches])
    if on_an_edge(plan, held):
        return
    # By the specification: the kernel rounds x to 2^-13 of its block's largest, so that beside a huge column a narrow hot
    # range is decided by chance.
    with torch.no_grad(), mock.patch.object(cpu_build, "load", return_value=None):
        exact = model(held).double()
        found = rewrite.forward(held, rewrite.constants(plan, site.weights), plan).double()
    made = relative_error(float((found - exact).square().sum()), float(exact.square().sum()))
    assert math.isfinite(plan.error)
    assert made <= 1.5 * plan.error + 1e-3, (plan.error, made)


@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from([0.0, 1e-9, 1.0, 1e18]), st.integers(0, 2**16))
def test_every_symmetric_matrix_has_a_damped_factor(d: int, rank: int, off: float, seed: int) -> None:
    """Differences of sums need be no Gram matrices, and with few tokens these have no rank to speak of."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rank, d, generator=g, dtype=torch.float64)
    noise = torch.randn(d, d, generator=g, dtype=torch.float64)
    gram = x.T @ x + off * (noise + noise.T)
    lower, upper = factor(gram), inverse_factor(gram)
    assert torch.isfinite(lower).all()
    assert torch.isfinite(upper).all()
    added = lower @ lower.T - gram
    added.diagonal().zero_()
    assert added.abs().max() <= 1e-6 * gram.abs().max() + 1e-12, "only the diagonal is damped"


@given(st.integers(2, 48), st.integers(0, 2**16))
def test_a_healthy_matrix_is_damped_as_it_always_was(d: int, seed: int) -> None:
    x = torch.randn(4 * d, d, generator=torch.Generator().manual_seed(seed))
    gram = (x.T @ x).double()
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    lower = torch.linalg.cholesky(damped)
    assert torch.equal(factor(gram), lower)
    assert torch.equal(inverse_factor(gram), torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_matrix_that_is_not_finite_has_no_factor(value: float) -> None:
    with pytest.raises(CalibrationError, match="8 columns is not finite"):
        factor(torch.eye(8).index_fill(0, torch.tensor([2]), value))


@given(st.floats(0, 1e6), st.integers(0, 2**16))
def test_the_covariance_outlives_a_huge_mean(mean: float, seed: int) -> None:
    x = normal(256, seed) + mean
    moments = Moments(D)
    for part in x.split(64):
        moments.update(part)
    exact = torch.cov(x.double().T, correction=0)
    assert (moments.covariance - exact).abs().max() < 0.01


def test_healthy_tokens_are_multiplied_as_they_are() -> None:
    x = normal(64, 0)
    assert precise(x) is x
    assert precise(1e18 * x).dtype == torch.float64


@pytest.mark.parametrize(
    ("missed", "total", "error"),
    [(0, 0, 0), (1, 0, math.inf), (1, 4, 0.5), (math.nan, 0, math.nan), (math.nan, 1, math.nan)],
)
def test_an_error_that_is_not_known_is_no_zero(missed: float, total: float, error: float) -> None:
    assert relative_error(missed, total) == pytest.approx(error, nan_ok=True)


def test_sums_that_are_nan_give_an_error_that_is_nan() -> None:
    residual = Residual(2, 2)
    x = torch.ones(16, 2)
    residual.update(x, torch.full_like(x, torch.nan), x)
    zero = torch.zeros(2, 2, dtype=torch.float64)
    assert math.isnan(residual.error(zero, zero[0]))
    assert math.isnan(residual.missed(zero, zero[0]))
