"""The trainable site in codes beside the specification."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from builders.ffns import batches, config, ffn, fitted, inputs
from builders.healing import slopes
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tardis_fx.graph.site import SiteWeights
from tardis_fx.healing.codes import TrainableCodes
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.partial_linear.calls import planned_call
from tardis_fx.passes.partial_linear import PartialLinear
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.touched import Touched
from tardis_fx.testing.ffn import gated_ffn

D, HIDDEN = 80, 160  # a block of 64 columns and one of 16
KINDS = ["plain", "gated", "normalised"]
kinds = pytest.mark.parametrize("kind", KINDS)


class Normalised(nn.Module):
    """A gated FFN whose output is normalised: thresholds are relative to the token's scale, and there is no bias."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.norm = gated_ffn(D, HIDDEN, bias=False), nn.RMSNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.norm(self.ffn(x))
        return output


@cache
def opened(kind: str) -> tuple[SitePlan, SiteWeights]:
    makers: dict[str, Any] = {"plain": lambda: ffn(D, HIDDEN), "gated": lambda: gated_ffn(D, HIDDEN)}
    model: nn.Module = makers.get(kind, Normalised)()
    observation = BatchObservation(model.eval(), batches(8, d=D), progress=False)
    (plan,) = fitted(observation, PartialLinear(), config(method="partial_linear", budget=0.2))
    assert plan.settings["relative"] == (kind == "normalised")
    return plan, observation.sites[0].weights


def trainable(kind: str) -> TrainableCodes:
    return TrainableCodes(*opened(kind), PartialLinear())


def changed(site: TrainableCodes, seed: int) -> TrainableCodes:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return site


@settings(max_examples=examples(12))
@given(st.sampled_from(KINDS), st.integers(0, 2**16))
def test_the_differentiable_forward_is_what_the_stored_plan_runs_after_any_change(kind: str, seed: int) -> None:
    site, x = changed(trainable(kind), seed), inputs(3, 20, D, seed=seed)
    with torch.no_grad():
        same = torch.isclose(site.train()(x), site.eval()(x), atol=2e-4, rtol=2e-4).all(-1)
    assert int((~same).sum()) <= 2  # tokens at which rounding tips a decision


@kinds
def test_without_a_change_the_plan_is_the_old_one_to_the_bit(kind: str) -> None:
    site = trainable(kind)
    before, after = site.entry.tensors, site.planned().tensors
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


@kinds
def test_codes_neurons_rotations_norms_and_noise_stay_and_all_else_changes(kind: str) -> None:
    site = trainable(kind)
    before, after = site.entry.tensors, changed(site, 0).planned().tensors
    for name, tensor in before.items():
        if name in ("neurons", "norms", "noise", "signs", "out_signs") or (name == "bias" and kind == "normalised"):
            assert torch.equal(tensor, after[name]), name
        elif tensor.dtype == torch.uint8:
            assert torch.equal(tensor[:, :-2], after[name][:, :-2]), name
            assert not torch.equal(tensor[:, -2:], after[name][:, -2:]), name
        else:
            assert not torch.equal(tensor, after[name]), name


@kinds
def test_every_small_tensor_gets_a_gradient(kind: str) -> None:
    site = trainable(kind).train()
    site(inputs(200, D)).square().sum().backward()
    for name, parameter in site.named_parameters():
        assert parameter.grad is not None
        assert (kind == "normalised" and name == "bias") or parameter.grad.abs().max() > 0, name


@kinds
def test_gradients_are_finite_where_a_token_is_zero_and_where_a_threshold_is(kind: str) -> None:
    plan, weights = opened(kind)
    zero = {"thresholds": torch.zeros_like(plan.tensors["thresholds"])}
    for entry in (plan, replace(plan, tensors={**plan.tensors, **zero})):
        site = TrainableCodes(entry, weights, PartialLinear()).train()
        x = inputs(20, D)
        x[3] = 0
        (site(x).square().sum() + site.reading).backward()
        for name, parameter in site.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all(), name


@kinds
def test_the_gradient_of_scales_and_surrogates_is_the_slope_of_the_specification(kind: str) -> None:
    site, x = trainable(kind), inputs(50, D)
    names = [name for name, _ in site.named_parameters() if name not in ("bounds", "bias")]
    with torch.no_grad():
        site.bounds.sub_(200.0)  # everything is read, so that no decision changes
    for name in names:
        gradient, difference = slopes(site, x, name, 1.0)  # the rounding of stored scales hides smaller steps
        assert gradient == pytest.approx(difference, rel=0.1, abs=5e-2), name


@kinds
def test_what_it_reads_is_what_the_op_touches_and_higher_thresholds_read_as_much_as_foretold(kind: str) -> None:
    site, x = trainable(kind), inputs(500, D)
    site(x)
    fixed = site.entry.touched_bytes - site.promised
    foretold = site.read()
    assert (foretold.diff() <= 0).all()
    for step in (0, 100, 50):
        site.widen(step)
        site.eval()(x)
        read = float(site.read()[0])
        assert read == pytest.approx(float(foretold[{0: 0, 100: 100, 50: 155}[step]]), rel=1e-3)
        assert fixed + read == pytest.approx(touched(site, x), rel=1e-4)
    site.train()(x)
    assert float(site.reading.detach()) == pytest.approx(read * len(x), rel=1e-4)


def touched(site: TrainableCodes, x: Tensor) -> float:
    entry = site.planned()
    counter = Touched()
    counter.add(planned_call(x, entry, site.weights))
    assert counter.outlier_rate == pytest.approx(site.outlier_rate, rel=1e-3)
    return counter.per_token
