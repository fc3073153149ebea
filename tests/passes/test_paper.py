import pytest
import torch
from builders.ffns import batches, config, ffn, planned
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from tardis_fx import CalibrationError, calibrate
from tardis_fx.passes.paper import _narrowest


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_every_neuron_is_folded_and_guarded(activation: str) -> None:
    (plan,) = planned(ffn(32, 128, activation), 32, method="paper", budget=0.5).rewritten
    assert plan.method == "paper"
    assert plan.tensors["neurons"].tolist() == list(range(128))
    lower, upper = plan.tensors["guard"].T
    assert len(lower) == 128
    assert torch.all(lower < upper)
    assert plan.tensors["surrogate"][:, 0].abs().max() > 0


@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8])
def test_the_paper_keeps_the_budget(budget: float) -> None:
    plan = planned(ffn(32, 128), 32, method="paper", budget=budget)
    assert plan.touched_fraction <= budget * 1.02
    assert plan.touched_fraction >= budget * 0.95


def test_every_neuron_leaves_its_hot_range_as_often() -> None:
    model, xs = ffn(32, 128), batches(d=32)
    (plan,) = calibrate(model, xs, config=config(method="paper", budget=0.5, predictor_bits=8)).rewritten
    with torch.no_grad():
        estimates = torch.cat(xs) @ model.up.weight.T  # 8 bits: as good as the predictor's
    lower, upper = plan.tensors["guard"].T
    rate = ((estimates < lower) | (estimates > upper)).float().mean(0)
    assert rate.mean().item() == pytest.approx(plan.outlier_rate, rel=0.02)
    assert rate.min() > plan.outlier_rate * 0.7
    assert rate.max() < plan.outlier_rate * 1.3


def test_the_surrogate_is_least_squares_on_the_hot_range() -> None:
    model, xs = ffn(32, 128), batches(d=32)
    (plan,) = calibrate(model, xs, config=config(method="paper", budget=0.5, predictor_bits=8)).rewritten
    x = torch.cat(xs)
    with torch.no_grad():
        z, estimate = model.up(x), x @ model.up.weight.T
        a = model[1](z)
    for n in range(0, 128, 16):
        lower, upper = plan.tensors["guard"][n]
        hot = (estimate[:, n] >= lower) & (estimate[:, n] <= upper)
        columns = torch.stack([z[hot, n], torch.ones(int(hot.sum()))], 1)
        slope, intercept = torch.linalg.lstsq(columns, a[hot, n, None]).solution[:, 0]
        assert plan.tensors["surrogate"][n].tolist() == pytest.approx([slope.item(), intercept.item()], abs=0.02)


def test_the_fold_is_that_of_the_surrogates() -> None:
    model = ffn(32, 128)
    (plan,) = planned(model, 32, method="paper", budget=0.5).rewritten
    slope, intercept = plan.tensors["surrogate"].T
    with torch.no_grad():
        weight = (model.down.weight * slope) @ model.up.weight
        bias = model.down.weight @ (slope * model.up.bias + intercept) + model.down.bias
    torch.testing.assert_close(plan.tensors["folded_weight"], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plan.tensors["folded_bias"], bias, rtol=1e-4, atol=1e-5)


def test_ours_has_less_error_than_the_paper_at_the_same_bytes() -> None:
    errors = {
        method: planned(ffn(32, 128), 32, method=method, budget=0.5).sites[0].error
        for method in ("guarded_fold", "paper")
    }
    assert errors["guarded_fold"] < errors["paper"]


def test_a_budget_below_fold_and_predictor_is_refused() -> None:
    with pytest.raises(CalibrationError, match="the fold and the predictor alone read"):
        planned(ffn(32, 128), 32, method="paper", budget=0.2)


@settings(max_examples=examples(50))
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.floats(0, 1))
def test_the_hot_range_is_the_narrowest_that_holds_its_share(counts: list[int], share: float) -> None:
    count = torch.tensor(counts, dtype=torch.float64)[:, None]
    wanted = share * count.sum(0)
    start, stop = _narrowest(count, wanted)
    width = max(0, int(stop - start))
    need = wanted.item() - 0.5  # counts are whole: half a token is rounding
    runs = [(i, j) for i in range(len(counts) + 1) for j in range(i, len(counts) + 1) if sum(counts[i:j]) >= need]
    assert sum(counts[int(start) : int(stop)]) >= need
    assert width == min(j - i for i, j in runs)
