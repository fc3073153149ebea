"""``tardis_fx.verify`` compares weights bit for bit."""

import pytest
import torch
from builders.compiled import compiled
from builders.ffns import FFN, ffn, inputs, planned

import tardis_fx
from tardis_fx import ConfigError, Plan, PlanMismatchError, StaleWeightError
from tardis_fx.runtime import snapshot


@torch.no_grad()
def test_verify_finds_one_element_that_a_call_does_not() -> None:
    model = ffn(64, 512)
    plan, x = planned(model, d=64), inputs(4, 64, seed=7)
    fast = compiled(model, plan)
    fast(x)
    assert tardis_fx.verify(fast) == tardis_fx.verify(model) == [plan.sites[0].name]
    weight = model.up.weight.numpy()
    for row in range(512):
        weight[row, 0] += 1
        try:
            for _ in range(snapshot.LINES):
                fast(x)
            break
        except StaleWeightError:  # a line that calls do compare
            weight[row, 0] -= 1
    for _ in range(2):
        with pytest.raises(StaleWeightError, match="not those that the plan was made for"):
            tardis_fx.verify(fast)
    with pytest.raises(StaleWeightError, match="changed since calibration"):
        fast(x)


def test_verify_takes_a_model_that_has_run_rewritten(model: FFN, plan: Plan) -> None:
    with pytest.raises(PlanMismatchError, match="call it once"):
        tardis_fx.verify(compiled(model, plan))
    with pytest.raises(ConfigError, match="compiled model"):
        tardis_fx.verify(lambda x: x)  # type: ignore[arg-type]  # no model
