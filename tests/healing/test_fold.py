"""The trainable site of a guarded fold beside the specification."""

from functools import cache

import pytest
import torch
from builders.ffns import ACTIVATIONS as NAMES
from builders.ffns import FFN, Oracle, classes, ffn, inputs, oracles, planned
from builders.gated import FUNCTIONS, Gated
from builders.healing import slopes
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from tardis_fx.graph.site import SiteWeights
from tardis_fx.healing.fold import TrainableFold
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.plan import SitePlan

KINDS = ["plain", "gated"]
kinds = st.sampled_from(KINDS)
D, HIDDEN = 80, 160  # two blocks of input columns, the second in part


@cache
def opened(
    fold_bits: int, row_bits: int, activation: str = "gelu", kind: str = "plain"
) -> tuple[SitePlan, SiteWeights]:
    group_size, weights = 128 if fold_bits == 4 else 64, {}
    budget = (0.1 if fold_bits < 16 else 0.3) + (0.02 if row_bits < 16 else 0.2)
    model: FFN | Gated = ffn(D, HIDDEN, activation)
    if kind == "gated":
        model, budget = Gated(D, HIDDEN, activation), budget + 0.1
        weights = {"gate": model.gate.weight.detach(), "gate_bias": model.gate.bias.detach()}
    (entry,) = planned(model, D, budget=budget, fold_bits=fold_bits, row_bits=row_bits, group_size=group_size).rewritten
    assert len(entry.tensors["codes"]) > 0
    own = (p.detach() for module in (model.up, model.down) for p in (module.weight, module.bias))
    return entry, SiteWeights(*own, **weights)


def quantised(fold_bits: int, row_bits: int, activation: str = "gelu", kind: str = "plain") -> TrainableFold:
    return TrainableFold(*opened(fold_bits, row_bits, activation, kind), GuardedFold())


def changed(site: TrainableFold, seed: int, amount: float = 0.1) -> TrainableFold:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.add_(amount * torch.randn(parameter.shape, generator=generator))
    return site


@settings(max_examples=examples(20))
@given(st.data(), oracles())
def test_the_differentiable_forward_is_the_specification_whatever_the_classes(
    data: st.DataObject, case: Oracle
) -> None:
    guarded, exact = data.draw(classes(len(case.lower)))
    site = TrainableFold(case.plan(guarded, exact), case.weights, GuardedFold()).train()
    torch.testing.assert_close(site(case.x), case.rewritten(guarded, exact), atol=1e-4, rtol=1e-4)


@settings(max_examples=examples(8))
@given(kinds, st.sampled_from([4, 8, 16]), st.sampled_from([3, 4, 16]), st.data(), st.integers(0, 2**16))
def test_the_differentiable_forward_is_what_the_stored_plan_runs_after_any_change(
    kind: str, fold_bits: int, row_bits: int, data: st.DataObject, seed: int
) -> None:
    activation = data.draw(st.sampled_from(sorted(FUNCTIONS) if kind == "gated" else NAMES))
    site, x = changed(quantised(fold_bits, row_bits, activation, kind), seed), inputs(3, 20, D, seed=seed)
    with torch.no_grad():
        torch.testing.assert_close(site.train()(x), site.eval()(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fold_bits", [4, 8, 16])
def test_without_a_change_the_plan_is_the_old_one_to_the_bit(fold_bits: int, kind: str) -> None:
    site = quantised(fold_bits, 4, kind=kind)
    before, after = site.entry.tensors, site.planned().tensors
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize(("kind", "rows"), [("plain", {"up"}), ("gated", {"gate", "up"})])
def test_only_the_small_tensors_change(kind: str, rows: set[str]) -> None:
    site = quantised(4, 4, kind=kind)
    after = changed(site, 0).planned().tensors
    kept = {name for name, tensor in site.entry.tensors.items() if torch.equal(tensor, after[name])}
    assert kept == {"neurons", "codes", "scale", "zero", "columns"} | rows


def test_the_plane_of_the_score_stays() -> None:
    site = quantised(4, 4, kind="gated")
    before, after = site.entry.tensors["guard"], changed(site, 0).planned().tensors["guard"]
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fold_bits", "row_bits"), [(4, 4), (16, 16)])
def test_every_small_tensor_gets_a_gradient(fold_bits: int, row_bits: int, kind: str) -> None:
    site = quantised(fold_bits, row_bits, kind=kind).train()
    site(inputs(200, D)).square().sum().backward()
    for name, parameter in site.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_continuous_tensors_is_the_slope_of_the_specification(kind: str) -> None:
    site, x = quantised(8, 8, kind=kind), inputs(50, D)
    for name in ("folded_bias", "surrogate"):
        gradient, difference = slopes(site, x, name, 1e-2)
        assert gradient == pytest.approx(difference, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_wider_ranges_correct_as_many_as_was_foretold(kind: str) -> None:
    site, x = quantised(16, 16, kind=kind), inputs(500, D)
    site(x)
    foretold = site.read()
    assert (foretold.diff() <= 0).all()
    for step in (100, 50):
        site.widen(step)
        site.eval()(x)
        assert float(site.read()[0]) == pytest.approx(float(foretold[100 if step == 100 else 150]), rel=1e-3)
