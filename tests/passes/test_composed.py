"""Rewrites behind each other at one site."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from builders.compiled import compiled
from builders.ffns import FFN, batches, config, expected, ffn, inputs
from torch import Tensor, nn

from tardis_fx import Config, ConfigError, Plan
from tardis_fx.explain import Report
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import RepeatableObservation
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes import registry
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import Planned, SitePlan
from tardis_fx.planning import plan_for
from tardis_fx.testing import assert_equivalent, assert_plan_roundtrip, examine, laws
from tardis_fx.testing.observation import SiteObservation

D, HIDDEN = 20, 80
SECOND = ["low_rank", "hot_fold", "gptq", "gptq_rotated", "wanda", "guarded_fold", "linear_replace"]


class Same(Rewrite):
    """Leaves the FFN that it found."""

    name: ClassVar[str] = "same"
    leaves_ffn = True

    def refuse(self, site: Site) -> str | None:
        return None

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> list[Planned]:
        return [
            SitePlan.from_site(s.site, s.parameters, method=self.name, touched_bytes=s.weights.bytes) for s in sites
        ]

    def weights(self, plan: SitePlan, weights: SiteWeights) -> SiteWeights:
        return weights

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        raise AssertionError("only its weights are asked for")

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        raise AssertionError("only its weights are asked for")


@cache
def observed() -> SiteObservation:
    return SiteObservation([ffn(D, HIDDEN)], batches(d=D))


def planned(method: Any, observation: RepeatableObservation | None = None, budget: float = 0.6) -> Plan:
    return plan_for(observation or observed(), config(method=method, budget=budget))


@pytest.fixture
def same(monkeypatch: pytest.MonkeyPatch) -> None:
    registered = registry._registered
    monkeypatch.setattr(registry, "_registered", lambda name: Same() if name == "same" else registered(name))
    registry.rewrite_named.cache_clear()


@pytest.mark.usefixtures("same")
@pytest.mark.parametrize("method", SECOND)
@torch.no_grad()
def test_behind_a_rewrite_that_changes_nothing_a_rewrite_is_itself(method: str) -> None:
    (alone,), (composed,) = planned(method).rewritten, planned(["same", method]).rewritten
    for name in ("fingerprint", "dense_bytes", "touched_bytes", "stored_bytes", "outlier_rate"):
        assert getattr(composed, name) == getattr(alone, name)
    assert composed.error == pytest.approx(alone.error, abs=1e-4)
    assert composed.settings["second"] == alone.settings
    x, weights = inputs(5, D), observed().sites[0].weights
    rewrites = rewrite_named(method), rewrite_named(f"same+{method}")
    a, b = (r.forward(x, r.constants(e, weights), e) for r, e in zip(rewrites, (alone, composed), strict=True))
    assert torch.equal(a, b)
    registry.rewrite_named.cache_clear()


@pytest.mark.parametrize("method", SECOND)
@torch.no_grad()
def test_behind_drop_bias_a_rewrite_gives_what_it_gives_on_the_model_without_biases(method: str) -> None:
    (site,) = observed().sites
    (dropped,) = planned("drop_bias", budget=1.0).rewritten
    left = rewrite_named("drop_bias").weights(dropped, site.weights)
    by_hand = FFN(nn.Linear(D, HIDDEN, bias=False), ffn(D, HIDDEN)[1], nn.Linear(HIDDEN, D)).eval()
    by_hand.up.weight.copy_(left.up)
    by_hand.down.weight.copy_(left.down)
    by_hand.down.bias.copy_(left.down_bias)  # type: ignore[arg-type]
    there = SiteObservation([by_hand], batches(d=D))
    (wanted,), (found,) = planned(method, there).rewritten, planned(["drop_bias", method]).rewritten
    assert found.touched_bytes == wanted.touched_bytes
    x, rewrite, composed = inputs(5, D), rewrite_named(method), rewrite_named(f"drop_bias+{method}")
    assert_equivalent(
        composed.forward(x, composed.constants(found, site.weights), found),
        rewrite.forward(x, rewrite.constants(wanted, there.sites[0].weights), wanted),
    )


def test_a_plan_is_keyed_by_the_original_weights_and_told_against_the_original() -> None:
    (site,), (entry,) = observed().sites, planned(["drop_bias", "low_rank"]).rewritten
    assert (entry.fingerprint, entry.dense_bytes) == (site.fingerprint, site.weights.bytes)
    (bare,) = planned("low_rank").rewritten
    (dropped,) = planned("drop_bias", budget=1.0).rewritten
    assert entry.error > dropped.error
    assert entry.error > bare.error


def test_compositions_keep_the_laws_of_rewrites() -> None:
    some = (
        laws.the_plan_meets_its_budget_or_an_error_is_raised,
        laws.bytes_are_plausible,
        laws.the_reported_error_matches_the_measured_error,
        laws.equal_sites_have_constants_of_equal_shapes,
    )
    verdicts = examine("drop_bias+guarded_fold+int8_ffn", examples=2, laws=some)
    assert not [str(verdict) for verdict in verdicts if not verdict.passed]


@torch.no_grad()
def test_a_composition_compiles_and_comes_back_from_its_file() -> None:
    model = ffn(D, HIDDEN)
    method = ["drop_bias", "guarded_fold", "int8_ffn"]
    plan = plan_for(BatchObservation(model, batches(d=D), progress=False), config(method=method, budget=0.6))
    assert plan.config.method == plan.sites[0].method == "drop_bias+guarded_fold+int8_ffn"
    assert "drop_bias+guarded_fold+int8_ffn" in str(Report.from_plan(plan))
    x = inputs(5, D)
    assert_plan_roundtrip(plan, lambda p: expected(model, p, x))
    assert_equivalent(compiled(model, plan)(x), expected(model, plan, x))


def test_an_observation_does_not_remember_a_site_for_what_a_rewrite_made_of_it() -> None:
    """As the drafts of guarded_fold would be mixed up: they are of weights with biases, and of weights without."""
    observation = SiteObservation([ffn(D, HIDDEN)], batches(d=D))
    composed = ["drop_bias", "guarded_fold"]
    after, fresh = (
        planned(composed, observation if planned("guarded_fold", observation) else None),
        planned(composed, SiteObservation([ffn(D, HIDDEN)], batches(d=D))),
    )
    assert replace(after.rewritten[0], tensors={}).__dict__ == replace(fresh.rewritten[0], tensors={}).__dict__


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (["hot_fold", "low_rank"], "hot_fold leaves no feed-forward network"),
        (["guarded_fold", "bilinear"], "guarded_fold leaves no feed-forward network"),
        (["drop_ffn", "low_rank"], "drop_ffn leaves no feed-forward network"),
        (["drop_ffn", "int8_ffn"], "drop_ffn leaves no dense matrix"),
        (["drop_bias", "gptq", "int8_ffn"], "drop_bias.gptq leaves no dense matrix"),
        (["int8_ffn", "low_rank"], "int8_ffn leaves no feed-forward network"),
        (["int8_ffn", "int4_ffn"], "int8_ffn leaves no dense matrix"),
        (["drop_bias", "drop_bias"], "drop_bias appears twice"),
        (["drop_bias", "exact_fold"], "exact_fold folds FFNs that are affine already"),
        (["drop_bias", "nonesuch"], "no rewrite named 'nonesuch'"),
    ],
)
def test_compositions_that_make_no_sense_are_refused_before_the_model_runs(method: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        rewrite_named(str(config(method=method).method))


def test_what_needs_one_rewrite_refuses_several() -> None:
    for given in ({"target_error": 0.1}, {"sequential": True}):
        with pytest.raises(ConfigError, match="one rewrite for all sites"):
            config(method=["drop_bias", "low_rank"], **given)


@pytest.mark.parametrize("method", ["", [], ["low_rank", ""], "a++b", 3, [3], {"*": 3}, {3: "low_rank"}, {}])
def test_what_is_no_method_is_refused(method: Any) -> None:
    with pytest.raises(ConfigError, match="method"):
        Config(method=method)
