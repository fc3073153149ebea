"""Different rewrites at different sites of one model."""

from functools import cache
from pathlib import Path

import pytest
import torch
from builders.compiled import compiled
from builders.ffns import Block, batches, config, ffn, inputs
from torch import nn

from tardis_fx import ConfigError, Plan, calibrate, explain
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.planning import plan_for
from tardis_fx.testing import assert_equivalent, assert_plan_roundtrip
from tardis_fx.testing.assertions import contents

D, HIDDEN = 16, 64


class Blocks(nn.Module):
    """Four blocks named as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(ffn(D, HIDDEN, seed=i), D) for i in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.h:
            x = block(x)
        return x


@cache
def model() -> Blocks:
    return Blocks().eval()


@cache
def observation() -> BatchObservation:
    return BatchObservation(model(), batches(d=D), progress=False)


MIXED = {"h.0.*": "low_rank", "h.1.*": None, "*": ["drop_bias", "guarded_fold"]}


@cache
def mixed() -> Plan:
    return plan_for(observation(), config(method=MIXED))


def test_the_first_pattern_that_matches_a_sites_name_counts() -> None:
    methods = [site.method for site in mixed().sites]
    assert methods == ["low_rank", None, "drop_bias+guarded_fold", "drop_bias+guarded_fold"]
    assert mixed().sites[1].reason == "left as it is by Config.method"


def test_each_methods_sites_share_a_budget_of_their_own() -> None:
    sites = mixed().sites
    assert sites[0].touched_bytes <= 0.5 * sites[0].dense_bytes
    share = sum(site.touched_bytes for site in sites[2:]) / sum(site.dense_bytes for site in sites[2:])
    assert 0.45 < share <= 0.5


def test_sites_of_one_method_are_fitted_as_if_the_others_were_not_there() -> None:
    """Also where another group has filled the memory of the observation with the same rewrite."""
    plan_for(observation(), config(method="guarded_fold"))
    found = plan_for(observation(), config(method={"h.0.*": "guarded_fold", "*": "paper"}))
    alone = plan_for(observation(), config(method={"h.0.*": "guarded_fold"}))
    assert contents(Plan(found.sites[:1], config())) == contents(Plan(alone.sites[:1], config()))


def test_a_mapping_of_everything_to_one_method_is_that_method() -> None:
    everything, plain = (plan_for(observation(), config(method=m)) for m in ({"*": "low_rank"}, "low_rank"))
    assert contents(Plan(everything.sites, config())) == contents(Plan(plain.sites, config()))


def test_a_site_that_is_left_alone_is_not_even_folded_exactly() -> None:
    affine = torch.nn.Sequential(torch.nn.Linear(D, 4 * D), torch.nn.Linear(4 * D, D)).eval().requires_grad_(False)
    x = [torch.randn(64, D)]
    assert calibrate(affine, x, config=config(method={"*": "paper"})).sites[0].method == "exact_fold"
    plan = calibrate(affine, x, config=config(method={"*": None}))
    assert plan.sites[0].method is None
    report = explain(affine, plan, x[0])
    assert [site.status for site in report.sites] == ["refused"]


def test_sequential_fitting_takes_no_mapping() -> None:
    with pytest.raises(ConfigError, match="sequential needs one rewrite for all sites"):
        config(method={"*": "low_rank"}, sequential=True)


@torch.no_grad()
def test_one_plan_file_holds_all_and_compiles(tmp_path: Path) -> None:
    assert_plan_roundtrip(mixed(), lambda plan: torch.zeros(0))
    mixed().save(tmp_path / "plan.safetensors")
    plan = Plan.load(tmp_path / "plan.safetensors")
    assert plan.config == mixed().config == config(method=MIXED)
    assert hash(plan.config) == hash(mixed().config)
    x = inputs(3, D)
    assert_equivalent(compiled(model(), plan)(x), compiled(model(), mixed())(x))


def test_a_pattern_that_matches_no_site_is_an_error_that_lists_the_sites() -> None:
    with pytest.raises(ConfigError, match=r"'transformer\.\*' matches no site; there are h\.0\.ffn"):
        calibrate(model(), batches(d=D), config=config(method={"transformer.*": "low_rank", "*": "guarded_fold"}))


def test_an_unknown_rewrite_of_any_pattern_is_refused_before_the_model_runs() -> None:
    with pytest.raises(ConfigError, match="nonesuch"):
        calibrate(model(), [], config=config(method={"h.0.*": "nonesuch", "*": "guarded_fold"}))
