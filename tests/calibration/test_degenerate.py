"""Calibration data that says little: a plan that states the error that it makes, or a CalibrationError."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from builders.ffns import config, ffn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx import CalibrationError
from tardis_fx.calibrate import plan_for
from tardis_fx.calibration.regression import fitted_tokens, relative_error
from tardis_fx.passes.base import rewrite_named
from tardis_fx.testing.ffn import gated_ffn
from tardis_fx.testing.observation import SiteObservation

if TYPE_CHECKING:
    from collections.abc import Callable

D = 12


def normal(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "as many as there are": lambda x: x,
    "constant rows": lambda x: torch.ones_like(x),
    "one row": lambda x: x[:1].expand_as(x),
    "constant columns": lambda x: torch.cat([x[:, :4], torch.full_like(x[:, 4:], 3.0)], 1),
    "all zeros": torch.zeros_like,
    "dead columns": lambda x: x * (torch.arange(D) < 3),
    "repeated columns": lambda x: x[:, :1].expand_as(x),
    "two directions": lambda x: x[:, :2] @ normal(2, 7),
    "a huge mean": lambda x: x + 1e6,
    "a huge mean of one column": lambda x: x + 1e5 * (torch.arange(D) == 3),
    "tiny": lambda x: 1e-12 * x,
    "large": lambda x: 1e6 * x,
    "huge": lambda x: 1e18 * x,
    "nearly the largest number": lambda x: 1e37 * x,
    "every neuron dead": lambda x: -x.abs(),
}
METHODS = ("partial_linear", "gptq", "sparsegpt", "low_rank", "hot_fold", "linear_replace")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["plain", "gated"])
@given(
    st.sampled_from(sorted(DATA)),
    st.lists(st.sampled_from([1, 7, 8, 9, 40, 200]), min_size=1, max_size=3),
    st.sampled_from([4, 16]),
    st.sampled_from(["relu", "gelu"]),
    st.integers(0, 2**16),
)
def test_a_plan_states_the_error_that_it_makes(
    method: str, kind: str, name: str, sizes: list[int], bits: int, activation: str, seed: int
) -> None:
    model = ffn(D, 40, activation, seed=seed) if kind == "plain" else gated_ffn(D, 40, activation, seed=seed)
    with torch.no_grad():
        if name == "every neuron dead" and kind == "plain":
            model.up.weight.abs_()
            model.up.bias.abs_().neg_()
    batches = [DATA[name](normal(size, seed + i)) for i, size in enumerate(sizes)]
    observation = SiteObservation([model], batches)
    (site,) = observation.sites
    chosen = config(method=method, budget=0.7, fold_bits=bits, row_bits=bits)
    try:
        (plan,) = plan_for(observation, chosen).sites
    except CalibrationError as error:
        assert str(error)
        return
    if plan.method is None:
        assert plan.reason
        return
    assert any(size >= 8 for size in sizes), "no token was held back"
    rewrite = rewrite_named(plan.method)
    held = torch.cat([batch[fitted_tokens(len(batch)) :] for batch in batches])
    with torch.no_grad():
        exact = model(held).double()
        found = rewrite.forward(held, rewrite.constants(plan, site.weights), plan).double()
    made = relative_error(float((found - exact).square().sum()), float(exact.square().sum()))
    assert math.isfinite(plan.error)
    assert made <= 1.5 * plan.error + 1e-3, (plan.error, made)
