"""The testing kit: correct rewrites pass, and a rewrite that breaks a law fails."""

import itertools
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


@pytest.mark.parametrize("method", ["guarded_fold", "low_rank", "hot_fold", "share_ffn"])
def test_the_projects_own_rewrites_keep_every_law(method: str) -> None:
    verdicts = examine(method, examples=2)
    assert [verdict.law for verdict in verdicts] == list(WORDS.values())
    assert not [str(verdict) for verdict in verdicts if not verdict.passed]


# ---- Rewrites that break a law


class Greedy(HotFold):
    """Reads twice the budget."""

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        choices = yield from super().choose(sites, config)
        return [Choice(2 * c.touched_bytes, c.tensors, c.settings) for c in choices]


class Weightless(HotFold):
    """Reports no stored bytes."""

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        plans = yield from super().fit(sites, config)
        return [SitePlan(**vars(p) | {"stored_bytes": 0}) for p in plans]


class Widening(HotFold):
    """Returns float32 for any dtype."""

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        return super().forward(x, constants, plan).float()


class Sociable(HotFold):
    """Depends on the other tokens."""

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        return super().forward(x - x.reshape(-1, x.shape[-1]).mean(0), constants, plan)


class Traced(HotFold):
    """Computes something else when it is traced."""

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        y = super().forward(x, constants, plan)
        return y if type(x) is Tensor else y * 2


class Boasting(HotFold):
    """Reports half of its error."""

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        plans = yield from super().fit(sites, config)
        return [SitePlan(**vars(p) | {"error": p.error / 2}) for p in plans]


class Forgetful(HotFold):
    """Keeps a factor outside the plan."""

    factors: ClassVar[dict[int, float]] = {}

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        plans = yield from super().fit(sites, config)
        for plan in plans:
            assert isinstance(plan, SitePlan)
            self.factors[id(plan.tensors)] = 2.0
        return plans

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        return super().forward(x, constants, plan) * self.factors.get(id(plan.tensors), 1.0)


class Uneven(LowRank):
    """Has constants whose size depends on the weights."""

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        extra = torch.zeros(int(weights.up.float().abs().sum() * 1000) % 97)
        return super().constants(plan, weights) | {"extra": extra}


class Fickle(HotFold):
    """Makes other plans at each fit."""

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        choices = yield from super().choose(sites, config)
        noise = {"noise": torch.tensor(list(os.urandom(8)))}
        return [Choice(c.touched_bytes, c.tensors | noise, c.settings) for c in choices]


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
    """Refuses without a reason."""

    def refuse(self, site: Site) -> str | None:
        return "" if site.kind == "gated" else super().refuse(site)


BROKEN: dict[type[Rewrite], Any] = {
    Greedy: laws.the_plan_meets_its_budget_or_an_error_is_raised,
    Weightless: laws.bytes_are_plausible,
    Widening: laws.forward_is_finite_and_keeps_the_shape_for_any_number_of_tokens,
    Sociable: laws.a_token_does_not_depend_on_other_tokens,
    Traced: laws.the_compiled_model_equals_the_eager_forward,
    Boasting: laws.the_reported_error_matches_the_measured_error,
    Forgetful: laws.a_plan_is_the_same_after_saving_and_loading,
    Uneven: laws.equal_sites_have_constants_of_equal_shapes,
    Fickle: laws.fitting_twice_gives_the_same_plan,
    Meddling: laws.inputs_and_weights_do_not_change,
    Scaling: laws.inputs_and_weights_do_not_change,
    Silent: laws.gated_and_affine_sites_are_refused_with_a_reason_or_handled,
}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type[Rewrite]]]:
    """The last rewrite of this list is registered under the name ``own``."""
    rewrites: list[type[Rewrite]] = []

    class Loaded(EntryPoint):
        def load(self) -> Any:
            return rewrites[-1]

    monkeypatch.setattr(registry, "entry_points", lambda group: [Loaded("own", "own:Own", group)])
    registry.rewrite_named.cache_clear()
    yield rewrites
    registry.rewrite_named.cache_clear()


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_rewrite_that_breaks_a_law_fails_with_an_example(
    broken: type[Rewrite], registered: list[type[Rewrite]]
) -> None:
    broken.name = "own"
    registered.append(broken)
    (verdict,) = examine("own", examples=5, laws=[BROKEN[broken]])
    assert not verdict.passed
    assert isinstance(verdict.example, Specimen), verdict


def test_every_law_has_a_rewrite_that_breaks_it() -> None:
    assert set(BROKEN.values()) == set(LAWS)


def test_a_rewrite_that_takes_no_site_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hypothesis gives up after hundreds of examples; here all are one site."""
    specimen = Specimen(Weights(8, 32))
    observation = SiteObservation(specimen.ffns(), specimen.batches())
    monkeypatch.setattr(laws, "SiteObservation", lambda *_: observation)
    (verdict,) = examine("exact_fold", examples=1, laws=[laws.bytes_are_plausible])
    assert verdict.failure == NEVER_TAKEN


def test_the_command_refuses_a_name_that_is_not_registered() -> None:
    result = CliRunner().invoke(command, ["no_such_pass"])
    assert result.exit_code == 2
    assert "no rewrite named 'no_such_pass'" in result.stderr


def test_the_command_shows_every_law_and_fails_if_one_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict("one"), Verdict("other", "a | b", Specimen(Weights(8, 32)))]
    monkeypatch.setattr("tardis_fx.testing.__main__.examine", lambda *_, **__: verdicts)
    result = CliRunner().invoke(command, ["own"])
    assert result.exit_code == 1
    assert [line.split(" | ")[1] for line in result.stdout.splitlines()[2:]] == ["pass", "FAIL"]
    assert r"a \| b; Specimen(weights=Weights(d=8, hidden=32" in result.stdout
    verdicts.pop()
    assert CliRunner().invoke(command, ["own"]).exit_code == 0


def test_only_the_kit_needs_hypothesis_and_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import tardis_fx; import tardis_fx.testing"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'tardis-fx[testing]'" in result.stderr.splitlines()[-1]


# ---- Drawn specimens


@settings(max_examples=examples(30))
@given(sites())
def test_a_specimen_is_finite_and_the_same_each_time(specimen: Specimen) -> None:
    (model,), (repeated,) = specimen.ffns(), specimen.ffns()
    for first, second in zip(model.parameters(), repeated.parameters(), strict=True):
        assert torch.isfinite(first).all()
        assert torch.equal(first, second)
    x = specimen.unseen(5)
    assert x.dtype == specimen.weights.dtype
    assert model(x).shape == x.shape
    assert all(map(torch.equal, specimen.batches(), specimen.batches()))
    assert eval(repr(specimen), {**globals(), "torch": torch}) == specimen


def test_no_two_structures_and_no_two_streams_are_alike() -> None:
    planted = [Weights(8, 32, structure=structure).ffn() for structure in STRUCTURES]
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in planted]
    streams = [Calibration(stream=stream).batch(10, 8) for stream in STREAMS]
    for drawn in (flat, streams):
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


@settings(max_examples=examples(5))
@given(sites(dtypes=[torch.float32], budgets=[0.5, 0.8]))
def test_a_site_without_a_model_is_planned_as_the_model_is(specimen: Specimen) -> None:
    models, config = specimen.ffns(), Config(method="low_rank", budget=specimen.budget, progress=False)
    batches = specimen.batches()
    direct = plan_for(SiteObservation(models, batches), config).sites[0]
    captured = plan_for(BatchObservation(models[0], batches, progress=False), config).sites[0]
    assert (direct.fingerprint, direct.touched_bytes, direct.shapes) == (
        captured.fingerprint,
        captured.touched_bytes,
        captured.shapes,
    )
    assert direct.error == pytest.approx(captured.error, rel=1e-3, abs=1e-6)


# ---- Assertions


def test_equivalent_tensors_agree_in_shape_dtype_and_values() -> None:
    x = torch.linspace(1, 2, 6).view(2, 3)
    assert_equivalent(x * (1 + 1e-6), x)
    for different in (x.view(3, 2), x.double(), x * 1.01, x * float("nan")):
        with pytest.raises(AssertionError):
            assert_equivalent(different, x)


def test_an_error_above_the_reported_one_is_refused() -> None:
    x = torch.ones(10)
    assert_error_within(0.1, 1.1 * x, x)
    with pytest.raises(AssertionError, match="more than the reported 0.1"):
        assert_error_within(0.1, 1.2 * x, x)


def test_the_rewritten_graph_has_the_replacement_and_not_the_activation() -> None:
    specimen = Specimen(Weights(8, 32))
    (model,), x = specimen.ffns(), specimen.unseen(3)
    config = Config(method="linear_replace", budget=0.6, progress=False)
    plan = plan_for(SiteObservation([model], specimen.batches()), config)
    graph = rewritten(model, x, plan)
    assert_matches(graph, count=1, present=[F.linear], absent=[F.gelu])
    for wrong in ({"count": 2}, {"count": 1, "present": [F.gelu]}, {"count": 1, "absent": [F.linear]}):
        with pytest.raises(AssertionError):
            assert_matches(graph, **wrong)  # type: ignore[arg-type]


def test_a_plan_that_runs_differently_after_loading_is_refused() -> None:
    specimen = Specimen(Weights(8, 32))
    plan = plan_for(
        SiteObservation(specimen.ffns(), specimen.batches()), Config(method="low_rank", budget=0.5, progress=False)
    )
    assert_plan_roundtrip(plan)
    with pytest.raises(AssertionError, match="differently"):
        assert_plan_roundtrip(plan, lambda p: torch.zeros(()) if p is plan else torch.ones(()))
