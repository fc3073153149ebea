"""FFNs that are affine as they are fold without a plan, to rounding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders.ffns import Block, config, ffn, inputs, planned
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tardis_fx import explain
from tardis_fx.graph.matcher import find_sites
from tardis_fx.passes import pipeline
from tardis_fx.plan import Plan
from tardis_fx.testing.capture import capture

NO_PLAN = Plan((), config())

AFFINE: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda z: z,
    "a dropout that drops nothing": lambda z: F.dropout(z, 0.5, training=False),
    "a scale and a shift": lambda z: 2.5 * z - 0.75,
    "leaky_relu(1)": lambda z: F.leaky_relu(z, 1.0),
    "a clamp that never clamps": lambda z: z.clamp(min=-torch.inf),
    "a constant": lambda z: 0 * z + 1.5,
}
NOT_AFFINE: dict[str, Callable[[Tensor], Tensor]] = {
    "a wide clamp": lambda z: z.clamp(-1e4, 1e4),
    "leaky_relu(0.999)": lambda z: F.leaky_relu(z, 0.999),
    "relu": F.relu,
    "a slight bend": lambda z: z + 1e-9 * z * z,
    "dropout that drops": lambda z: F.dropout(z, 0.5, training=True),
}


class Spelt(nn.Module):
    """An FFN with any function between its projections, and before them."""

    def __init__(
        self, activation: Callable[[Tensor], Tensor], before: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        super().__init__()
        self.ffn, self.activation, self.before = ffn(), activation, before

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] to [..., d]."""
        return self.ffn.down(self.activation(self.ffn.up(self.before(x))))  # type: ignore[no-any-return]


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """Without a plan."""
    given_options: Any = {"inner": "eager"} | options
    return torch.compile(model, backend="tardis", options=given_options, fullgraph=True)


def methods(model: nn.Module, x: Tensor) -> list[str]:
    """What is done to each site with no plan at all."""
    with torch.no_grad():
        gm, given_inputs, _ = capture(model, x)
        rewritten = pipeline.apply(gm, given_inputs, NO_PLAN, "original")
    assert len(rewritten.guards) == sum(o.plan is not None for o in rewritten.outcomes)
    return [str(o.plan.method) for o in rewritten.outcomes if o.plan]


@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_what_is_affine_folds_with_no_plan(name: str, bias: bool, dtype: torch.dtype) -> None:
    model = Spelt(AFFINE[name]).to(dtype)
    if not bias:
        for linear in (model.ffn.up, model.ffn.down):
            linear.register_parameter("bias", None)
    x = inputs(20, 16).to(dtype)
    assert methods(model, x) == ["exact_fold"]
    exact = Spelt.forward(model.double(), x.double())
    model.to(dtype)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        compiled(model)(x).double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max())
    )
    report = explain(model, None, x)
    assert [(s.status, s.method, s.error) for s in report.sites] == [("rewritten", "exact_fold", 0.0)]
    assert report.sites[0].touched_bytes < 0.2 * report.sites[0].dense_bytes


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_what_is_not_affine_does_not_fold(name: str) -> None:
    assert methods(Spelt(NOT_AFFINE[name]), inputs(20, 16)) == []


POSITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "softmax": lambda x: x.softmax(-1),
    "sigmoid, viewed": lambda x: x.sigmoid().view(-1, 16),
    "clamp": lambda x: x.clamp(0, 3),
    "hardtanh": lambda x: F.hardtanh(x, min_val=0, max_val=2),
}


def signed(before: Callable[[Tensor], Tensor]) -> Spelt:
    """A ReLU whose neurons are all one-signed where the input is not negative: half of them one way, half the other."""
    model = Spelt(F.relu, before)
    sign = torch.ones(64)
    sign[::2] = -1
    with torch.no_grad():
        model.ffn.up.weight.abs_().mul_(sign[:, None])
        model.ffn.up.bias.abs_().mul_(sign)
    return model


@pytest.mark.parametrize("name", POSITIVE)
@torch.no_grad()
def test_a_relu_of_known_signs_folds(name: str) -> None:
    model, x = signed(POSITIVE[name]), inputs(20, 16)
    assert methods(model, x) == ["exact_fold"]
    torch.testing.assert_close(compiled(model)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", [lambda x: x, lambda x: x.clamp(min=-10), torch.tanh, F.hardtanh, F.gelu])
def test_a_relu_of_an_input_that_may_be_negative_does_not_fold(before: Callable[[Tensor], Tensor]) -> None:
    assert methods(signed(before), inputs(20, 16)) == []


@given(st.integers(0, 2**16), st.floats(-3, 3), st.floats(0, 3), st.sampled_from([0.0, 1.0, 4.0]))
@torch.no_grad()
def test_a_bounded_input_folds_exactly_where_every_corner_has_one_sign(
    seed: int, low: float, width: float, push: float
) -> None:
    """Of an affine function on a box, the extremes lie in corners; the corners of two dimensions can all be tried."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Hardtanh(low, low + width + 1e-3), up := nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)
    ).eval()
    up.bias.mul_(push)
    gm, given_inputs, _ = capture(model, inputs(3, 2))
    (outcome,) = pipeline.outcomes(gm, given_inputs, NO_PLAN)
    corners = torch.cartesian_prod(*2 * [torch.tensor([low, low + width + 1e-3])]).double()
    z = F.linear(corners, up.weight.double(), up.bias.double())
    one_signed = bool(((z >= 0).all(0) | (z <= 0).all(0)).all())
    if z.abs().min() > 1e-6:
        assert (outcome.plan is not None) == one_signed


@torch.no_grad()
def test_a_changed_weight_is_folded_anew() -> None:
    model, x = Spelt(AFFINE["nothing"]), inputs(20, 16)
    fast = compiled(model)
    fast(x)
    for weight in (model.ffn.up.weight, model.ffn.down.bias):
        weight.mul_(1.5)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    model.ffn.up.weight = nn.Parameter(model.ffn.up.weight.flip(0))
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_relu_whose_signs_are_lost_is_no_longer_folded() -> None:
    model, x = signed(F.relu), inputs(20, 16)
    fast = compiled(model)
    fast(x)
    model.ffn.up.weight[0].neg_()
    for _ in range(2):
        assert torch.equal(fast(x), model(x))


@torch.no_grad()
def test_a_fold_gives_way_to_an_ffn_that_shares_its_projection() -> None:
    first, second = ffn(), ffn(seed=1)
    for before, after in (((first.up, first.down), second), (first, (second.up, second.down))):
        model = nn.Sequential(*before, *after).eval()
        gm, _, _ = capture(model, inputs(20, 16))
        found = [(site.activation, site.reason) for site in find_sites(gm.graph)]
        assert ("gelu", None) in found
    linear = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 80), nn.GELU(), nn.Linear(80, 16)).eval()
    gm, _, _ = capture(linear, inputs(20, 16))
    assert [(s.activation, s.reason is None) for s in find_sites(gm.graph)] == [("identity", False), ("gelu", True)]


@torch.no_grad()
def test_calibration_folds_what_needs_no_fitting() -> None:
    model = nn.Sequential(Block(ffn()), Spelt(AFFINE["nothing"])).eval()
    plan = planned(model)
    assert [entry.method for entry in plan.sites] == ["guarded_fold", "exact_fold"]


@torch.no_grad()
def test_a_planned_fold_is_not_used_where_the_graph_shows_no_bounds() -> None:
    """The plan knows the weights; that their inputs are positive, only the graph of the first model tells."""
    bounded, unbounded, x = signed(F.relu).eval(), signed(lambda x: x).eval(), inputs(20, 16)
    plan = planned(bounded)
    assert [entry.method for entry in plan.sites] == ["exact_fold"]
    options: dict[str, Any] = {"plan": plan, "inner": "eager"}
    torch.testing.assert_close(torch.compile(unbounded, backend="tardis", options=options)(x), unbounded(x))
    gm, given_inputs, _ = capture(unbounded, x)
    (outcome,) = pipeline.outcomes(gm, given_inputs, plan)
    assert "bounds" in str(outcome.reason)
