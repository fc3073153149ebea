"""The kit for other people's rewrites: what it passes, and what it does not let pass."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch
import typer
from builders.profile import examples
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from tardis_fx import Config
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import Fit
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes import Rewrite, registry
from tardis_fx.passes.hot_fold import HotFold
from tardis_fx.passes.low_rank import LowRank
from tardis_fx.passes.static import Choice
from tardis_fx.plan import Planned, SitePlan
from tardis_fx.planning import plan_for
from tardis_fx.testing import (
    LAWS,
    assert_equivalent,
    assert_error_within,
    assert_matches,
    assert_plan_roundtrip,
    examine,
    laws,
    rewritten,
    sites,
)
from tardis_fx.testing.__main__ import main
from tardis_fx.testing.observation import SiteObservation
from tardis_fx.testing.strategies import STREAMS, STRUCTURES, Calibration, Specimen, Weights
from tardis_fx.testing.suite import NEVER_TAKEN, Verdict

command = typer.Typer()
command.command()(main)

WORDS = {law: law.__name__.replace("_", " ") for law in LAWS}


@pytest.mark.parametrize("method", ["partial_linear", "low_rank", "hot_fold", "share_ffn"])
def test_the_projects_own_rewrites_keep_every_law(method: str) -> None:
    verdicts = examine(method, examples=2)
    assert [verdict.law for verdict in verdicts] == list(WORDS.values())
    assert not [str(verdict) for verdict in verdicts if not verdict.passed]


# ---- Rewrites that break a law are found out


class Greedy(HotFold):
    """Reads twice what it may."""

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        choices = yield from super().choose(sites, config)
        return [Choice(2 * c.touched_bytes, c.tensors, c.settings) for c in choices]


class Weightless(HotFold):
    """Stores nothing, it says."""

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        plans = yield from super().fit(sites, config)
        return [SitePlan(**vars(p) | {"stored_bytes": 0}) for p in plans]


class Widening(HotFold):
    """Gives float32 whatever comes in."""

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        return super().forward(x, constants, plan).float()


class Sociable(HotFold):
    """Looks at the other tokens."""

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        return super().forward(x - x.reshape(-1, x.shape[-1]).mean(0), constants, plan)


class Traced(HotFold):
    """Is not the same when it is traced."""

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        found = super().forward(x, constants, plan)
        return found if isinstance(x, Tensor) and type(x) is Tensor else found * 2


class Boasting(HotFold):
    """Tells half of its error."""

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        plans = yield from super().fit(sites, config)
        return [SitePlan(**vars(p) | {"error": p.error / 2}) for p in plans]


class Forgetful(HotFold):
    """Keeps beside the plan what belongs into it."""

    kept: ClassVar[dict[int, float]] = {}

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        plans = yield from super().fit(sites, config)
        for plan in plans:
            assert isinstance(plan, SitePlan)
            self.kept[id(plan.tensors)] = 2.0
        return plans

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        return super().forward(x, constants, plan) * self.kept.get(id(plan.tensors), 1.0)


class Uneven(LowRank):
    """Has constants whose size depends on the weights."""

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        found = super().constants(plan, weights)
        return found | {"extra": torch.zeros(int(weights.up.float().abs().sum() * 1000) % 97)}


class Fickle(HotFold):
    """Is drawn anew by each fit."""

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        found = yield from super().choose(sites, config)
        return [
            Choice(c.touched_bytes, c.tensors | {"noise": torch.tensor(list(os.urandom(8)))}, c.settings) for c in found
        ]


class Meddling(HotFold):
    """Writes to its input."""

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        return super().forward(x.mul_(2), constants, plan)


class Scaling(HotFold):
    """Writes to the weights."""

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        weights.up.mul_(2)
        return super().constants(plan, weights)


class Silent(HotFold):
    """Refuses for no reason."""

    def refuse(self, site: Site) -> str | None:
        return "" if site.kind == "gated" else super().refuse(site)


BROKEN: dict[type[Rewrite], Any] = {
    Greedy: laws.the_plan_meets_its_budget_or_says_that_it_cannot,
    Weightless: laws.bytes_are_plausible,
    Widening: laws.forward_is_finite_and_shaped_for_any_number_of_tokens,
    Sociable: laws.a_token_gives_the_same_in_any_company,
    Traced: laws.the_compiled_model_is_the_eager_forward,
    Boasting: laws.the_reported_error_matches_the_measured_error,
    Forgetful: laws.a_plan_comes_back_from_its_file_and_runs_alike,
    Uneven: laws.sites_alike_have_constants_alike,
    Fickle: laws.fitting_twice_gives_the_same_plan,
    Meddling: laws.inputs_and_weights_stay_what_they_are,
    Scaling: laws.inputs_and_weights_stay_what_they_are,
    Silent: laws.gated_and_affine_sites_are_refused_with_a_reason_or_handled,
}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type[Rewrite]]]:
    """Rewrites that are put in here are registered under the name ``own``, one at a time."""
    own: list[type[Rewrite]] = []

    class Loaded(EntryPoint):
        def load(self) -> Any:
            return own[-1]

    monkeypatch.setattr(registry, "entry_points", lambda group: [Loaded("own", "own:Own", group)])
    registry.rewrite_named.cache_clear()
    yield own
    registry.rewrite_named.cache_clear()


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_rewrite_that_breaks_a_law_is_found_out_with_an_example(
    broken: type[Rewrite], registered: list[type[Rewrite]]
) -> None:
    broken.name = "own"
    registered.append(broken)
    (verdict,) = examine("own", examples=5, laws=[BROKEN[broken]])
    assert not verdict.passed
    assert isinstance(verdict.example, Specimen), verdict


def test_every_law_has_a_rewrite_that_breaks_it() -> None:
    assert set(BROKEN.values()) == set(LAWS)


def test_a_rewrite_that_takes_no_site_is_not_passed() -> None:
    (verdict,) = examine("exact_fold", examples=1, laws=[laws.bytes_are_plausible])
    assert verdict.failure == NEVER_TAKEN


def test_the_command_says_what_is_registered_where_a_name_is_not() -> None:
    result = CliRunner().invoke(command, ["no_such_pass"])
    assert result.exit_code == 2
    assert "no rewrite named 'no_such_pass'" in result.stderr


def test_the_command_shows_every_law_and_fails_where_one_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict("one"), Verdict("other", "a | b", Specimen(Weights(8, 32)))]
    monkeypatch.setattr("tardis_fx.testing.__main__.examine", lambda *_, **__: verdicts)
    result = CliRunner().invoke(command, ["own"])
    assert result.exit_code == 1
    assert [line.split(" | ")[1] for line in result.stdout.splitlines()[2:]] == ["pass", "FAIL"]
    assert r"a \| b; Specimen(weights=Weights(d=8, hidden=32" in result.stdout
    verdicts.pop()
    assert CliRunner().invoke(command, ["own"]).exit_code == 0


def test_the_package_needs_no_hypothesis_and_the_kit_says_that_it_does() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import tardis_fx; import tardis_fx.testing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'tardis-fx[testing]'" in result.stderr.splitlines()[-1]


# ---- What is drawn


@settings(max_examples=examples(30))
@given(sites())
def test_what_is_drawn_is_whole_and_the_same_each_time(specimen: Specimen) -> None:
    (model,), (again,) = specimen.ffns(), specimen.ffns()
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, other)
    x = specimen.unseen(5)
    assert x.dtype == specimen.weights.dtype
    assert model(x).shape == x.shape
    assert all(map(torch.equal, specimen.batches(), specimen.batches()))
    assert eval(repr(specimen), {**globals(), "torch": torch}) == specimen


def test_no_two_structures_and_no_two_streams_are_alike() -> None:
    planted = [Weights(8, 32, structure=structure).ffn() for structure in STRUCTURES]
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in planted]
    streams = [Calibration(stream=stream).batch(10, 8) for stream in STREAMS]
    for several in (flat, streams):
        assert not any(torch.equal(a, b) for i, a in enumerate(several) for b in several[:i])


@settings(max_examples=examples(5))
@given(sites(dtypes=[torch.float32], budgets=[0.5, 0.8]))
def test_a_site_without_a_model_is_planned_as_the_model_is(specimen: Specimen) -> None:
    models, config = specimen.ffns(), Config(method="low_rank", budget=specimen.budget, progress=False)
    batches = specimen.batches()
    alone = plan_for(SiteObservation(models, batches), config).sites[0]
    captured = plan_for(BatchObservation(models[0], batches, progress=False), config).sites[0]
    assert (alone.fingerprint, alone.touched_bytes, alone.shapes) == (
        captured.fingerprint,
        captured.touched_bytes,
        captured.shapes,
    )
    assert alone.error == pytest.approx(captured.error, rel=1e-3, abs=1e-6)


# ---- Assertions


def test_equivalent_is_of_one_shape_dtype_and_value() -> None:
    x = torch.linspace(1, 2, 6).view(2, 3)
    assert_equivalent(x * (1 + 1e-6), x)
    for other in (x.view(3, 2), x.double(), x * 1.01, x * float("nan")):
        with pytest.raises(AssertionError):
            assert_equivalent(other, x)


def test_an_error_beyond_the_one_told_is_none_within_it() -> None:
    x = torch.ones(10)
    assert_error_within(0.1, 1.1 * x, x)
    with pytest.raises(AssertionError, match="more than the reported 0.1"):
        assert_error_within(0.1, 1.2 * x, x)


def test_the_rewritten_graph_has_what_took_the_ffns_place_and_not_the_activation() -> None:
    specimen = Specimen(Weights(8, 32))
    (model,), x = specimen.ffns(), specimen.unseen(3)
    config = Config(method="linear_replace", budget=0.6, progress=False)
    plan = plan_for(SiteObservation([model], specimen.batches()), config)
    graph = rewritten(model, x, plan)
    assert_matches(graph, count=1, present=[F.linear], absent=[F.gelu])
    for wrong in ({"count": 2}, {"count": 1, "present": [F.gelu]}, {"count": 1, "absent": [F.linear]}):
        with pytest.raises(AssertionError):
            assert_matches(graph, **wrong)  # type: ignore[arg-type]


def test_a_plan_that_runs_differently_is_no_round_trip() -> None:
    specimen = Specimen(Weights(8, 32))
    plan = plan_for(
        SiteObservation(specimen.ffns(), specimen.batches()), Config(method="low_rank", budget=0.5, progress=False)
    )
    assert_plan_roundtrip(plan)
    with pytest.raises(AssertionError, match="differently"):
        assert_plan_roundtrip(plan, lambda p: torch.zeros(()) if p is plan else torch.ones(()))
