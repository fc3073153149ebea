"""What my_rewrite must do beside what every rewrite must do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from my_rewrite import MyRewrite

from tardis_fx import Config, ConfigError
from tardis_fx.planning import plan_for
from tardis_fx.testing import LAWS, assert_equivalent, assert_error_within, assert_matches, examine, rewritten, sites
from tardis_fx.testing.laws import output
from tardis_fx.testing.observation import SiteObservation


def fitted(specimen, model, budget, **options):
    """The site and its plan."""
    observation = SiteObservation([model], specimen.batches())
    config = Config(method="my_rewrite", budget=budget, options=options, prefill="rewritten", progress=False)
    return observation.sites[0], plan_for(observation, config)


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


@given(sites(budgets=[0.5]))
def test_the_option_leaves_the_bias_as_it_is(specimen):
    (model,) = specimen.ffns()
    _, plan = fitted(specimen, model, specimen.budget, rest="nothing")
    bias = torch.zeros(1) if model.down.bias is None else model.down.bias.detach()
    assert_equivalent(plan.sites[0].tensors["bias"], bias.expand(model.down.out_features))


def test_a_wrong_option_is_refused_before_anything_is_measured():
    with pytest.raises(ConfigError, match="rest must be one of 'mean', 'nothing'"):
        MyRewrite().options(Config(method="my_rewrite", options={"rest": "all"}))
