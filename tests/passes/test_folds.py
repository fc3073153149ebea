"""Folds without a predictor: hot neurons beside an affine map, one line for all neurons, a gate by token."""

from functools import cache

import pytest
import torch
from builders.ffns import FFN, batches, config, expected, ffn
from torch import nn
from torch.nn import functional as F

from tardis_fx import Plan
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.planning import plan_for

D = 20


@cache
def observed() -> tuple[FFN, BatchObservation]:
    model = ffn(D, 80)
    return model, BatchObservation(model, batches(d=D), progress=False)


@cache  # all together: after each test Dynamo forgets the capture
def plans() -> dict[tuple[str, float], Plan]:
    _, observation = observed()
    wanted = [("hot_fold", 0.14), ("hot_fold", 0.3), ("hot_fold", 0.8), ("token_gate", 0.3), ("token_gate", 0.7)]
    wanted += [("linear_replace", 0.2), ("drop_bias", 0.98)]
    return {(m, b): plan_for(observation, config(method=m, budget=b)) for m, b in wanted}


def fit(model: nn.Module, method: str, budget: float) -> SitePlan:
    return plan_for(
        BatchObservation(model, batches(d=D), progress=False), config(method=method, budget=budget)
    ).rewritten[0]


def test_hot_fold_errs_less_the_more_neurons_it_keeps() -> None:
    errors, kept = zip(
        *(
            (plan.rewritten[0].error, plan.rewritten[0].settings["kept"])
            for (m, _), plan in plans().items()
            if m == "hot_fold"
        ),
        strict=True,
    )
    assert errors[0] > errors[1] > 1.5 * errors[2]
    assert kept[0] < kept[1] < kept[2]


def test_hot_fold_without_a_neuron_is_the_best_affine_map() -> None:
    """A budget that one neuron more would not fit."""
    fold, replaced = plans()["hot_fold", 0.14].rewritten[0], plans()["linear_replace", 0.2].rewritten[0]
    assert fold.settings["kept"] < 3
    assert fold.error == pytest.approx(replaced.error, rel=0.1)


def test_hot_fold_keeps_the_neurons_that_no_line_fits() -> None:
    model, curved = ffn(D, 80), [5, 30, 66]
    with torch.no_grad():
        model.down.weight[:, curved] *= 30
        model.down.weight[:, [1, 2]] *= 30
        model.up.bias[[1, 2]] = 40  # far out, where GELU is a line
    kept = fit(model, "hot_fold", 0.3).tensors["kept"].tolist()
    assert set(curved) <= set(kept)
    assert not {1, 2} & set(kept)


@torch.no_grad()
def test_one_line_for_all_neurons_is_exact_where_the_activation_is_one() -> None:
    model = ffn(D, 80, "relu")
    model.up.bias.fill_(40)
    plan = fit(model, "bilinear", 0.2)
    assert plan.error < 1e-5
    torch.testing.assert_close(plan.tensors["folded_weight"], model.down.weight @ model.up.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [0.3, 0.7])
@torch.no_grad()
def test_the_gate_sends_the_budgets_share_of_tokens_through_the_ffn_and_those_of_more_error(budget: float) -> None:
    model, plan = observed()[0], plans()["token_gate", budget]
    (entry,) = plan.rewritten
    x, t = torch.cat(batches(d=D)), entry.tensors
    whole = F.linear(x, t["token_gate"], t["token_gate_bias"])[:, 0] > 0
    affine, output = F.linear(x, t["folded_weight"], t["folded_bias"]), model(x)
    found = expected(model, plan, x)
    assert torch.equal(found[whole], output[whole])
    assert torch.equal(found[~whole], affine[~whole])
    assert whole.float().mean().item() == pytest.approx(entry.outlier_rate, abs=0.05)
    assert plan.touched_fraction == pytest.approx(budget, abs=0.01)
    missed = (affine - output).square().sum(1)
    assert missed[whole].mean() > missed[~whole].mean()


@torch.no_grad()
def test_what_the_dropped_biases_gave_in_the_mean_stays() -> None:
    model, plan = observed()[0], plans()["drop_bias", 0.98]
    x = torch.cat([batch[: len(batch) - len(batch) // 8] for batch in batches(d=D)])
    found, bias = expected(model, plan, x), plan.rewritten[0].tensors["bias"]
    torch.testing.assert_close(found, F.gelu(x @ model.up.weight.T) @ model.down.weight.T + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean(0), model(x).mean(0), rtol=1e-4, atol=1e-4)
    assert plan.sites[0].touched_bytes == 4 * (model.up.weight.numel() + model.down.weight.numel() + D)


def test_an_ffn_without_biases_has_none_to_lose() -> None:
    observation = BatchObservation(ffn(D, 80, bias=False), batches(d=D), progress=False)
    assert "no bias" in str(rewrite_named("drop_bias").refuse(observation.sites[0].site))
