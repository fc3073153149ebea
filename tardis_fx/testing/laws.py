"""The laws that every rewrite must obey: the contract of :class:`tardis_fx.passes.base.Rewrite`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import reject
from jaxtyping import Float
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import CalibrationError
from tardis_fx.observation.run import drive, steps
from tardis_fx.observation.site import ObservedSite, fitted_tokens
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.planning import plan_for
from tardis_fx.statistics.check import original
from tardis_fx.testing.assertions import (
    TOLERANCES,
    assert_equivalent,
    assert_error_within,
    assert_plan_roundtrip,
    contents,
    relative_error,
)
from tardis_fx.testing.observation import SiteObservation, affine, gated
from tardis_fx.testing.strategies import Specimen


@dataclass(frozen=True)
class Fit:
    """A rewrite fitted to drawn sites, with a budget of all bytes if the drawn budget is out of reach."""

    method: str
    specimen: Specimen
    count: int = 1

    @cached_property
    def observation(self) -> SiteObservation:
        """Observation of newly made FFNs."""
        return SiteObservation(self.specimen.ffns(self.count), self.specimen.batches())

    @cached_property
    def plan(self) -> Plan:
        """Plan of all sites; rejects examples without a rewritten site."""
        try:
            plan = plan_for(self.observation, self.config(self.specimen.budget))
        except CalibrationError:
            plan = plan_for(self.observation, self.config(1.0))
        if not plan.rewritten:
            reject()
        return plan

    def config(self, budget: float) -> Config:
        """A config that rewrites every token, without progress bars."""
        return Config(method=self.method, budget=budget, prefill="rewritten", progress=False)

    @property
    def taken(self) -> list[tuple[ObservedSite, SitePlan]]:
        """The rewritten sites with their plans."""
        return [
            (site, entry)
            for site, entry in zip(self.observation.sites, self.plan.sites, strict=True)
            if isinstance(entry, SitePlan)
        ]

    @property
    def first(self) -> tuple[ObservedSite, SitePlan]:
        """The first rewritten site with its plan."""
        return self.taken[0]


@torch.no_grad()
def output(site: ObservedSite, entry: SitePlan, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_out"]:
    """Applies the eager specification of a rewritten site."""
    rewrite = rewrite_named(entry.method)
    return rewrite.forward(x, rewrite.constants(entry, site.weights), entry)


def the_plan_meets_its_budget_or_an_error_is_raised(method: str, specimen: Specimen) -> None:
    """It raises CalibrationError if it cannot, and a budget of all bytes always suffices."""
    fit = Fit(method, specimen, 2)
    try:
        plan = plan_for(fit.observation, fit.config(specimen.budget))
    except CalibrationError:
        assert specimen.budget < 1, "a budget of all bytes is out of reach"
        return
    if len(plan.rewritten) < len(plan.sites):
        reject()
    touched, budget = plan.touched_fraction, specimen.budget
    assert touched <= budget * 1.01, f"reads {touched:.2%} of the bytes at a budget of {budget:.0%}"


def bytes_are_plausible(method: str, specimen: Specimen) -> None:
    """Touched bytes are positive; stored bytes are the constants, with or without the original weights."""
    for site, entry in Fit(method, specimen).taken:
        assert 0 < entry.touched_bytes <= entry.stored_bytes + entry.dense_bytes, f"touched: {entry.touched_bytes:,}"
        original_storages = {p.untyped_storage().data_ptr() for p in site.parameters}
        constants = rewrite_named(method).constants(entry, site.weights).values()
        added = sum(c.nbytes for c in constants if c.untyped_storage().data_ptr() not in original_storages)
        limit = sum(c.nbytes for c in constants) + entry.dense_bytes
        assert added <= entry.stored_bytes <= limit, f"stored: {entry.stored_bytes:,}, constants: {added:,}"
        assert entry.dense_bytes == site.weights.bytes


def forward_is_finite_and_keeps_the_shape_for_any_number_of_tokens(method: str, specimen: Specimen) -> None:
    """Checks 1, 5 and 40 tokens, and [batch, length, d]."""
    site, entry = Fit(method, specimen).first
    for shape in ((1,), (5,), (40,), (2, 3), (1, 7)):
        x = specimen.unseen(*shape)
        y = output(site, entry, x)
        expected = (*shape, len(site.weights.down))
        assert y.shape == expected, f"{tuple(x.shape)} becomes {tuple(y.shape)}, not {expected}"
        assert y.dtype == x.dtype, f"{x.dtype} becomes {y.dtype}"
        assert torch.isfinite(y).all(), f"NaN or infinity for {tuple(x.shape)}"


def a_token_does_not_depend_on_other_tokens(method: str, specimen: Specimen) -> None:
    """Compares all tokens at once, in parts, and as [batch, length, d]."""
    site, entry = Fit(method, specimen).first
    x = specimen.unseen(12)
    whole = output(site, entry, x)
    assert_equivalent(torch.cat([output(site, entry, part) for part in x.split([1, 1, 3, 7])]), whole)
    assert_equivalent(output(site, entry, x.view(3, 4, -1)), whole.view(3, 4, -1))


def the_compiled_model_equals_the_eager_forward(method: str, specimen: Specimen) -> None:
    """Compiles with the backend in strict mode, for few and for many tokens."""
    fit = Fit(method, specimen)
    site, entry = fit.first
    (model,) = specimen.ffns()
    torch._dynamo.reset()
    options: Any = {"plan": fit.plan, "inner": "eager", "select": "always", "strict": True}
    compiled = torch.compile(model, backend="tardis", options=options, fullgraph=True)
    for shape in ((1,), (2, 20)):
        x = specimen.unseen(*shape)
        with torch.no_grad():
            assert_equivalent(compiled(x), output(site, entry, x))


def the_reported_error_matches_the_measured_error(method: str, specimen: Specimen) -> None:
    """Compares them on the held-back calibration tokens, within 5% and rounding in both directions."""
    site, entry = Fit(method, specimen).first
    x = torch.cat([batch[fitted_tokens(len(batch)) :] for batch in specimen.batches()])
    actual = output(site, entry, x).float()
    expected = original(site.weights, str(entry.activation), x).float()
    rounding = TOLERANCES[x.dtype] / 2
    assert_error_within(entry.error + rounding, actual, expected, slack=0.05)
    measured = relative_error(actual, expected)
    assert entry.error <= measured * 1.05 + rounding, f"reports {entry.error:.4g}, but the error is {measured:.4g}"


def a_plan_is_the_same_after_saving_and_loading(method: str, specimen: Specimen) -> None:
    """Checks that the loaded plan is equal bit for bit."""
    fit = Fit(method, specimen)
    site, _ = fit.first
    x = specimen.unseen(5)

    def run(plan: Plan) -> Tensor:
        entry = plan.find(site.fingerprint)
        assert isinstance(entry, SitePlan)
        return output(site, entry, x)

    assert_plan_roundtrip(fit.plan, run)


def equal_sites_have_constants_of_equal_shapes(method: str, specimen: Specimen) -> None:
    """Sites of equal shapes and settings: one compiled graph may serve both, so names, shapes and dtypes agree."""
    fit = Fit(method, specimen, 2)
    if len(fit.taken) < 2 or fit.plan.rewritten[0].settings != fit.plan.rewritten[1].settings:
        reject()
    first, second = (
        {name: (tuple(t.shape), t.dtype) for name, t in rewrite_named(method).constants(e, s.weights).items()}
        for s, e in fit.taken
    )
    assert first == second, f"{first} and {second}"


def fitting_twice_gives_the_same_plan(method: str, specimen: Specimen) -> None:
    """Compares plans bit for bit, from observations that share nothing."""
    first, second = (contents(Fit(method, specimen).plan) for _ in range(2))
    assert first == second


def inputs_and_weights_do_not_change(method: str, specimen: Specimen) -> None:
    """Checks that fit, constants and forward do not write to them."""
    fit = Fit(method, specimen)
    site, entry = fit.first
    x = specimen.unseen(40)
    before = x.clone()
    output(site, entry, x)
    assert torch.equal(x, before), "the input changed"
    (untouched,) = specimen.ffns()
    for (name, expected), parameter in zip(untouched.named_parameters(), site.parameters, strict=True):
        assert torch.equal(parameter, expected), f"the weight {name} changed"
    copies = [tensor.clone() for tensor in entry.tensors.values()]
    output(site, entry, x)
    assert all(map(torch.equal, copies, entry.tensors.values())), "the plan changed"


def gated_and_affine_sites_are_refused_with_a_reason_or_handled(method: str, specimen: Specimen) -> None:
    """A site is handled if its output is finite and has the right shape."""
    rewrite, d = rewrite_named(method), specimen.weights.d
    for site in (gated(d), affine(d)):
        reason = rewrite.refuse(site.site)
        if reason is not None:
            assert reason.strip(), "refused without a reason"
            continue
        observation = SiteObservation([site], [specimen.calibration.batch(256, d)])
        (entry,) = drive(observation, steps(rewrite.fit([site], Fit(method, specimen).config(1.0))))
        if not isinstance(entry, SitePlan):
            assert entry.reason.strip(), "kept without a reason"
        else:
            y = output(site, entry, specimen.calibration.batch(5, d))
            assert y.shape == (5, len(site.weights.down))
            assert torch.isfinite(y).all(), "NaN or infinity"


#: Each law takes the name of a registered rewrite and drawn sites, and raises if the rewrite breaks it.
LAWS: tuple[Callable[[str, Specimen], None], ...] = (
    the_plan_meets_its_budget_or_an_error_is_raised,
    bytes_are_plausible,
    forward_is_finite_and_keeps_the_shape_for_any_number_of_tokens,
    a_token_does_not_depend_on_other_tokens,
    the_compiled_model_equals_the_eager_forward,
    the_reported_error_matches_the_measured_error,
    a_plan_is_the_same_after_saving_and_loading,
    equal_sites_have_constants_of_equal_shapes,
    fitting_twice_gives_the_same_plan,
    inputs_and_weights_do_not_change,
    gated_and_affine_sites_are_refused_with_a_reason_or_handled,
)
