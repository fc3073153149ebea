"""One FFN for several sites."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.ffns import FFN, Block, batches, config, entries, ffn, inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tardis_fx
from tardis_fx import CalibrationError, Plan
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.planning import plan_for
from tardis_fx.testing.observation import SiteObservation

D = 12


def image(of: FFN, rank: int, seed: int) -> FFN:
    """An FFN that gives so many features of another one's output, scaled, and nothing else but a bias."""
    other = ffn(D, len(of.up.weight), of.activation)
    other.load_state_dict(of.state_dict())
    scale = inputs(D, seed=seed).sign() * (1 + inputs(D, seed=seed + 1).abs())
    scale[torch.randperm(D, generator=torch.Generator().manual_seed(seed))[rank:]] = 0
    with torch.no_grad():
        other.down.weight.copy_(scale[:, None] * of.down.weight)
        other.down.bias.normal_()
    return other


def fit(ffns: list[FFN], budget: float) -> tuple[Plan, SiteObservation]:
    observation = SiteObservation(ffns, batches(d=D))
    return plan_for(observation, config(method="share_ffn", budget=budget)), observation


def constants(plan: Plan, observation: SiteObservation) -> list[dict[str, Tensor]]:
    rewrite = rewrite_named("share_ffn")
    return [rewrite.constants(e, s.weights) for e, s in zip(entries(plan), observation.sites, strict=True)]


@given(st.integers(1, D), st.integers(0, 99), st.sampled_from(["gelu", "silu", "relu"]))
def test_ffns_that_are_maps_of_one_of_them_are_shared_without_error(rank: int, seed: int, activation: str) -> None:
    """Where the maps may have the rank that they need. The FFN that all others are maps of is kept.

    Left is what the regression's ridge costs: at most 0.0055 over all that is drawn here.
    """
    base = ffn(D, 96, activation, seed=seed)
    ffns = [image(base, rank, 2 * seed), base, image(base, rank, 2 * seed + 7)]
    numbers = sum(p.numel() for p in base.parameters())
    plan, _ = fit(ffns, (numbers + 2 * (3 * rank * D + D)) / (3 * numbers) + 1e-4)
    kept = [entry.settings["rank"] for entry in entries(plan)]
    assert kept == [rank, None, rank] or (rank == D and sorted(kept, key=bool) == [None, D, D])
    assert max(entry.error for entry in plan.sites) < 6e-3


@given(st.integers(1, 5), st.floats(0.3, 1), st.booleans())
def test_bytes_touched_are_those_of_all_constants_each_once(count: int, budget: float, bias: bool) -> None:
    ffns = [ffn(D, 96, bias=bias, seed=i) for i in range(count)]
    try:
        plan, observation = fit(ffns, budget)
    except CalibrationError:
        assert budget < (1 + (count - 1) * 0.05) / count
        return
    once = {t.data_ptr(): t.nbytes for own in constants(plan, observation) for t in own.values()}
    assert sum(entry.touched_bytes for entry in plan.sites) == pytest.approx(sum(once.values()))
    own = {t.data_ptr() for site in observation.sites for t in site.parameters}
    added = sum(size for pointer, size in once.items() if pointer not in own)
    assert sum(e.stored_bytes for e in plan.sites) == sum(e.dense_bytes for e in plan.sites) + added
    assert plan.touched_fraction <= budget + 1e-9


def test_more_bytes_err_less_and_all_bytes_not_at_all() -> None:
    ffns = [ffn(D, 96, seed=i) for i in range(4)]
    plans = [fit(ffns, budget)[0] for budget in (0.3, 0.4, 0.6, 1.0)]
    errors = [sum(entry.error**2 for entry in plan.sites) for plan in plans]
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0
    assert [sum(e.settings["rank"] is None for e in entries(plan)) for plan in plans] == [1, 1, 2, 4]


def test_an_ffn_of_another_shape_or_activation_shares_nothing() -> None:
    ffns = [ffn(D, 96), ffn(D, 96, seed=1), ffn(D, 96, "silu"), ffn(D, 80)]
    with pytest.raises(CalibrationError, match="too small for share_ffn: one FFN for all sites of a shape"):
        fit(ffns, 0.9)
    plan, observation = fit(ffns[:2], 0.6)
    assert {entry.settings["rank"] is None for entry in entries(plan)} == {True, False}
    kept = next(i for i, entry in enumerate(entries(plan)) if entry.settings["rank"] is None)
    for own in constants(plan, observation):
        assert torch.equal(own["up"], ffns[kept].up.weight)


def test_a_plan_outlives_the_weights_that_it_shares() -> None:
    ffns = [ffn(D, 96), ffn(D, 96, seed=1)]
    plan, observation = fit(ffns, 0.6)
    before = [own["up"].clone() for own in constants(plan, observation)]
    taker = next(i for i, entry in enumerate(entries(plan)) if entry.settings["rank"] is not None)
    with torch.no_grad():
        ffns[1 - taker].up.weight.zero_()
    assert torch.equal(constants(plan, observation)[taker]["up"], before[taker])


def test_the_file_and_what_is_read_from_it_hold_a_shared_ffn_once(tmp_path: Path) -> None:
    plan, _ = fit([ffn(D, 96, seed=i) for i in range(4)], 0.4)
    plan.save(tmp_path / "plan")
    back = Plan.load(tmp_path / "plan")
    held = [entry.tensors["up"] for entry in entries(back) if "up" in entry.tensors]
    assert len(held) == 4
    assert len({t.data_ptr() for t in held}) == 1
    tensors = {t.data_ptr(): t.nbytes for entry in entries(plan) for t in entry.tensors.values()}
    assert (tmp_path / "plan").stat().st_size < sum(tensors.values()) + 8192


def test_layers_cannot_be_fitted_one_after_the_other() -> None:
    with pytest.raises(CalibrationError, match="fit without sequential"):
        plan_for(SiteObservation([ffn(D, 96)], batches(d=D)), config(method="share_ffn", budget=1.0, sequential=True))


@torch.no_grad()
def test_a_compiled_model_shares_its_ffns() -> None:
    model = nn.Sequential(*(Block(ffn(D, 96, seed=i), D) for i in range(3))).eval()
    plan = tardis_fx.calibrate(model, batches(d=D), config=config(method="share_ffn", budget=0.5))
    options: dict[str, Any] = {"plan": plan, "strict": True}
    compiled = torch.compile(model, backend="tardis", fullgraph=True, options=options)
    rewrite = rewrite_named("share_ffn")
    x = wanted = inputs(5, D)
    for block, entry in zip(model, entries(plan), strict=True):
        own = SiteObservation([block.ffn], []).sites[0]  # type: ignore[arg-type, list-item]
        wanted = wanted + rewrite.forward(block.norm(wanted), rewrite.constants(entry, own.weights), entry)  # type: ignore[operator]
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(wanted, model(x), atol=1e-3)
