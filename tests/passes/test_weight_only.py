"""Weight-only quantisation: rounding to nearest, and GPTQ."""

import pytest
import torch
from builders.ffns import batches, config, ffn, inputs

from tardis_fx.observation.observe import BatchObservation
from tardis_fx.planning import plan_for

D, HIDDEN = 80, 160


def observed(seed: int = 0) -> BatchObservation:
    """An FFN whose inputs are correlated."""
    mixing = inputs(D, D, seed=seed + 50) / 6 + torch.eye(D)
    model = ffn(D, HIDDEN, seed=seed)
    return BatchObservation(model, [batch @ mixing for batch in batches(d=D)], progress=False)


def test_the_budget_picks_the_widest_codes_that_fit() -> None:
    observation = observed()
    found = {}
    for budget in (0.12, 0.16, 0.3, 0.5):
        (plan,) = plan_for(observation, config(method="rtn", budget=budget)).rewritten
        found[plan.settings["bits"]] = plan.error
        assert plan.touched_bytes <= budget * plan.dense_bytes
    assert list(found) == [2, 3, 4, 8]
    assert found[2] > 1.5 * found[3] > 2 * found[4] > 10 * found[8]


@pytest.mark.parametrize(("budget", "group_size"), [(0.11, 128), (0.12, 64)])
def test_groups_are_as_small_as_the_budget_allows(budget: float, group_size: int) -> None:
    (plan,) = plan_for(observed(), config(method="rtn", budget=budget)).rewritten
    assert (plan.settings["bits"], plan.settings["group_size"]) == (2, group_size)
    assert plan.touched_bytes <= budget * plan.dense_bytes
    constants = sum(tensor.nbytes for tensor in plan.tensors.values()) + 4 * (D + HIDDEN)
    assert plan.touched_bytes == constants


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("budget", [0.12, 0.2, 0.3])
def test_gptq_errs_less_than_rounding_where_inputs_are_correlated(seed: int, budget: float) -> None:
    observation = observed(seed)
    gptq, rtn = (plan_for(observation, config(method=m, budget=budget)).sites[0].error for m in ("gptq", "rtn"))
    assert gptq < 0.95 * rtn
