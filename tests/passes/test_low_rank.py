"""Low rank, alone and beside heavy hitters."""

import pytest
import torch
from builders.ffns import FFN, batches, config, ffn, inputs
from hypothesis import given
from hypothesis import strategies as st

from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.matrix_forms import truncated
from tardis_fx.plan import SitePlan
from tardis_fx.planning import plan_for
from tardis_fx.quantisation import DAMPING, factor


def plan(model: FFN, method: str, budget: float) -> SitePlan:
    observation = BatchObservation(model, batches(d=20), progress=False)
    return plan_for(observation, config(method=method, budget=budget)).rewritten[0]


@given(st.integers(1, 8), st.integers(0, 2**16), st.booleans())
def test_a_matrix_of_low_rank_is_its_own_truncation(rank: int, seed: int, whitened: bool) -> None:
    # A product in float32 would be of full rank, by its rounding, which whitening enlarges.
    weight = inputs(12, rank, seed=seed).double() @ inputs(rank, 9, seed=seed + 1).double()
    x = inputs(100, 9, seed=seed + 2) * torch.linspace(0.1, 5, 9)
    a, b = truncated(weight, rank, x.T @ x if whitened else None)
    assert a.shape == (12, min(rank, 9))
    torch.testing.assert_close(a @ b, weight, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 8), st.integers(0, 2**16))
def test_no_other_matrix_of_this_rank_errs_less_on_the_inputs(rank: int, seed: int) -> None:
    """Eckart-Young in the metric of the damped Gram matrix: what is left are the singular values cut off."""
    weight, x = inputs(12, 9, seed=seed).double(), inputs(100, 9, seed=seed + 2) * torch.linspace(0.1, 5, 9)
    gram = x.T @ x
    a, b = truncated(weight, rank, gram)
    lower = factor(gram)
    torch.testing.assert_close(
        lower @ lower.T, (gram + DAMPING * gram.diagonal().mean() * torch.eye(9)).double(), rtol=1e-4, atol=1e-3
    )
    left = torch.linalg.svdvals(weight @ lower)[rank:].norm()
    torch.testing.assert_close(((a @ b - weight) @ lower).norm(), left, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["low_rank", "ffsplit"])
def test_ffns_whose_matrices_have_low_rank_stay_what_they_are(method: str) -> None:
    model = ffn(20, 80)
    with torch.no_grad():
        for linear in (model.up, model.down):
            a, b = truncated(linear.weight.double(), 2)
            linear.weight.copy_(a @ b)
    assert plan(model, method, 0.5).error < 1e-4


def test_ranks_are_the_same_share_of_both_matrices_and_grow_with_the_budget() -> None:
    ranks = [plan(ffn(20, 80), "low_rank", budget).settings["ranks"] for budget in (0.15, 0.4, 0.7)]
    assert all(up == down for up, down in ranks)
    assert ranks[0] < ranks[1] < ranks[2]


def test_ffsplit_keeps_the_neurons_of_the_largest_output() -> None:
    model, loud = ffn(20, 80), [3, 17, 40, 71]
    with torch.no_grad():
        model.down.weight[:, loud[:2]] *= 50
        model.up.bias[loud[2:]] = 100
    neurons = plan(model, "ffsplit", 0.3).tensors["neurons"]
    assert sorted(neurons[:4].tolist()) == loud
    assert sorted(neurons.tolist()) == list(range(80))


def test_ffsplit_keeps_the_papers_proportion() -> None:
    """A quarter of 80 neurons beside a tenth of rank 20."""
    size = 4 * (20 * 40 + 60 * (2 + 2) + 2 * 2 * 20 + 100)
    found = plan(ffn(20, 80), "ffsplit", size / (4 * (2 * 20 * 80 + 100)))
    assert found.settings["heavy"] == 20
    assert found.tensors["up_b"].shape == found.tensors["down_a"].T.shape == (2, 20)
    assert found.touched_bytes == size
