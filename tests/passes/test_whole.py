"""Rewrites that replace some FFNs as a whole and leave the others."""

from functools import cache

import pytest
import torch
from builders.compiled import compiled
from builders.ffns import Block, batches, config, ffn, ffn_of, inputs
from torch import nn

from tardis_fx import CalibrationError, Plan
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.plan import KeptSite
from tardis_fx.planning import plan_for

D, HIDDEN = 20, 80
METHODS = ["linear_replace", "drop_ffn"]
both = pytest.mark.parametrize("method", METHODS)


@cache
def observed() -> tuple[nn.Sequential, BatchObservation]:
    """The second FFN is loud and nearly linear, the third quiet."""
    model = nn.Sequential(*(Block(ffn(D, HIDDEN, seed=i), D) for i in range(3))).eval()
    with torch.no_grad():
        ffn_of(model[1]).up.weight.mul_(0.05)
        ffn_of(model[1]).down.weight.mul_(200)
        ffn_of(model[2]).down.weight.mul_(0.01)
    return model, BatchObservation(model, batches(d=D), progress=False)


@cache
def plans() -> dict[tuple[str, float], Plan]:
    _, observation = observed()
    return {
        (method, budget): plan_for(observation, config(method=method, budget=budget))
        for method in METHODS
        for budget in (0.2, 0.5, 0.75, 1.0)
    }


def replaced(plan: Plan) -> list[bool]:
    return [site.method is not None for site in plan.sites]


@both
def test_as_few_sites_are_replaced_as_the_models_budget_asks(method: str) -> None:
    counts = {budget: sum(replaced(plan)) for (m, budget), plan in plans().items() if m == method}
    assert counts == {0.2: 3, 0.5: 2, 0.75: 1, 1.0: 0}
    for (_, budget), plan in plans().items():
        assert plan.touched_fraction <= budget


def test_the_site_that_a_line_explains_best_goes_first() -> None:
    plan = plans()["linear_replace", 0.75]
    assert replaced(plan) == [False, True, False]
    assert plan.sites[1].error < 0.1
    assert all("R²" in str(site.reason) for site in (plan.sites[0], plan.sites[2]))


def test_the_site_that_the_residual_stream_misses_least_goes_first_wherever_it_stands() -> None:
    plan = plans()["drop_ffn", 0.75]
    assert replaced(plan) == [False, False, True]
    assert "varies" in str(plan.sites[0].reason)
    assert replaced(plans()["drop_ffn", 0.5]) == [True, False, True]


@both
@torch.no_grad()
def test_the_compiled_model_is_the_original_but_for_the_sites_replaced(method: str) -> None:
    model, _ = observed()
    plan, x = plans()[method, 0.5], inputs(2, 7, D, seed=9)
    wanted = x
    for block, site in zip(model, plan.sites, strict=True):
        if isinstance(site, KeptSite):
            wanted = block(wanted)
            continue
        assert isinstance(block, Block)
        inner, t = block.norm(wanted), site.tensors
        if method == "drop_ffn":
            wanted = wanted + t["mean"]
        else:
            wanted = wanted + nn.functional.linear(inner, t["folded_weight"], t["folded_bias"])
    torch.testing.assert_close(compiled(model, plan)(x), wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_dropped_ffn_leaves_its_mean() -> None:
    model, _ = observed()
    fitted = torch.cat([batch[: len(batch) - len(batch) // 8] for batch in batches(d=D)])
    block = model[0]
    assert isinstance(block, Block)
    first = block.ffn(block.norm(fitted)).mean(0)
    torch.testing.assert_close(plans()["drop_ffn", 0.2].rewritten[0].tensors["mean"], first, rtol=1e-4, atol=1e-4)


@both
def test_what_cannot_be_met_is_refused(method: str) -> None:
    _, observation = observed()
    with pytest.raises(CalibrationError, match="with every FFN replaced"):
        plan_for(observation, config(method=method, budget=0.001))
    with pytest.raises(CalibrationError, match="without sequential"):
        plan_for(observation, config(method=method, budget=0.5, sequential=True))
