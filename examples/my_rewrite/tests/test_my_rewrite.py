"""What my_rewrite must do beside what every rewrite must do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tardis_fx import Config
from tardis_fx.planning import plan_for
from tardis_fx.testing import LAWS, assert_equivalent, assert_error_within, assert_matches, examine, rewritten, sites
from tardis_fx.testing.laws import output
from tardis_fx.testing.observation import SiteObservation


def fitted(specimen, model, budget):
    """The site and its plan."""
    observation = SiteObservation([model], specimen.batches())
    plan = plan_for(observation, Config(method="my_rewrite", budget=budget, prefill="rewritten", progress=False))
    return observation.sites[0], plan


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_every_law_holds(law):
    (verdict,) = examine("my_rewrite", examples=settings().max_examples, laws=[law])
    assert verdict.passed, str(verdict)


@given(sites(budgets=[0.25, 0.5], kinds=["plain"]), st.integers(0, 2**10))
def test_neurons_whose_input_is_constant_cost_nothing(specimen, seed):
    (model,) = specimen.ffns()
    chosen = torch.randperm(specimen.weights.hidden, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.up.weight[chosen[specimen.weights.hidden // 8 :]] = 0
    site, plan = fitted(specimen, model, specimen.budget)
    x = specimen.unseen(20)
    assert_error_within(0.0, output(site, plan.sites[0], x), model(x).detach())


@given(sites(budgets=[1.0]))
def test_a_budget_for_all_neurons_keeps_the_output(specimen):
    (model,), x = specimen.ffns(), specimen.unseen(20)
    site, plan = fitted(specimen, model, 1.0)
    if plan.sites[0].settings["kept"] == specimen.weights.hidden:
        assert_equivalent(output(site, plan.sites[0], x), model(x).detach())


@given(sites())
def test_the_graph_keeps_one_narrow_ffn(specimen):
    (model,) = specimen.ffns()
    _, plan = fitted(specimen, model, specimen.budget)
    assert_matches(rewritten(model, specimen.unseen(3), plan), count=1, present=[torch.nn.functional.linear])
