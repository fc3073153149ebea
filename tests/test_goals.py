"""The goals of a config: a budget in bits per weight, and that only one goal is given."""

from dataclasses import asdict
from functools import cache
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import live
from builders.ffns import Block, batches, config, ffn, inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tardis_fx import Config, ConfigError, Plan, calibrate, explain
from tardis_fx.planning import plan_for
from tardis_fx.testing.assertions import contents
from tardis_fx.testing.observation import SiteObservation

D = 32
GOALS: dict[str, Any] = {"budget": 0.3, "bits": 3.0, "target_error": 0.1, "target_kl": 0.05}


@cache
def observation(*dtypes: torch.dtype) -> SiteObservation:
    """An FFN of each dtype."""
    return SiteObservation([ffn(D, 4 * D, seed=i).to(dtype) for i, dtype in enumerate(dtypes)], batches(2, d=D))


def touched_bits(plan: Plan) -> float:
    """Bits touched for each weight and bias of the sites."""
    weights = sum(torch.Size(shape).numel() for site in plan.sites for shape in site.shapes)
    return 8 * sum(site.touched_bytes for site in plan.sites) / weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"allocation": "per_site"},
        {"method": "wanda"},
        {"method": "drop_bias+guarded_fold"},
        {"method": "low_rank+int8_ffn"},
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_bits_are_the_share_of_the_weights_own_bits(dtype: torch.dtype, chosen: dict[str, Any], share: float) -> None:
    bits = share * 8 * dtype.itemsize
    given_bits, given_budget = (
        plan_for(observation(dtype), config(**goal, **chosen)) for goal in ({"bits": bits}, {"budget": share})
    )
    assert contents(given_bits)[1:] == contents(given_budget)[1:]
    assert given_bits.rewritten
    assert given_bits.config == config(bits=bits, **chosen), "the plan tells what was asked for"


@pytest.mark.parametrize("method", ["guarded_fold", "wanda", "linear_replace"])
def test_sites_of_two_dtypes_share_the_bits(method: str) -> None:
    both = observation(torch.bfloat16, torch.float32)
    bits = 14.0
    plan = plan_for(both, config(method=method, bits=bits))
    assert plan.rewritten
    assert touched_bits(plan) <= bits * 1.01
    if method != "linear_replace":  # which replaces whole sites
        assert touched_bits(plan) > 0.9 * bits


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(4.0, 16.0), min_size=2, max_size=4, unique=True))
def test_more_bits_are_never_fewer_bytes_and_never_exceeded(bits: list[float]) -> None:
    plans = [plan_for(observation(torch.bfloat16), config(bits=b, method="low_rank")) for b in sorted(bits)]
    for plan, most in zip(plans, sorted(bits), strict=True):
        assert touched_bits(plan) <= most
    for fewer, more in pairwise(plans):
        assert touched_bits(fewer) <= touched_bits(more)


def test_offloaded_sites_of_two_dtypes_get_the_same_plan() -> None:
    model = nn.Sequential(Block(ffn(seed=0)), Cast(Block(ffn(seed=1)))).eval()
    chosen = config(bits=12.0, allocation="per_site")
    apart = calibrate(model, batches(), config=chosen, offload=True)
    assert [site.dtype for site in apart.rewritten] == ["torch.float32", "torch.bfloat16"]
    assert contents(apart) == contents(calibrate(model, batches(), config=chosen))
    assert touched_bits(apart) <= 12.0 * 1.01


class Cast(nn.Module):
    """A block in bfloat16 in a model of float32."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x.bfloat16()).float()  # type: ignore[no-any-return]


@torch.no_grad()
def test_a_model_without_a_plan_takes_bits() -> None:
    model, x = Block(ffn()), inputs(4, 16, seed=99)
    fast = live.compiled(model, config=Config(bits=16.0, prefill="rewritten", progress=False))
    live.serve(fast, live.ENOUGH)
    (site,) = explain(fast, None, x).sites
    assert site.status == "rewritten"
    assert 0.45 < site.touched_bytes / site.dense_bytes <= 0.505


def test_more_bits_than_the_weights_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits=20: the FFN weights have 16 bits each"):
        plan_for(observation(torch.bfloat16), config(bits=20.0))


@pytest.mark.parametrize("bits", [0, -1.0, "3", True, float("nan"), float("inf")])
def test_a_wrong_number_of_bits_is_named(bits: Any) -> None:
    with pytest.raises(ConfigError, match="bits"):
        Config(bits=bits)


@pytest.mark.parametrize("names", [*combinations(GOALS, 2)], ids=" and ".join)
def test_two_goals_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=" and ".join(names)):
        Config(**{name: GOALS[name] for name in names})


@pytest.mark.parametrize("name", GOALS)
def test_a_goal_round_trips_through_a_plan_file(name: str, tmp_path: Path) -> None:
    chosen = Config(**{name: GOALS[name]})
    assert [field for field in GOALS if getattr(chosen, field) is not None] == [name]
    assert Config(**asdict(chosen)) == chosen
    Plan((), chosen).save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").config == chosen


def test_without_a_goal_the_budget_is_a_fifth() -> None:
    assert Config() == Config(budget=0.2) == Config(budget=None)  # type: ignore[arg-type]
