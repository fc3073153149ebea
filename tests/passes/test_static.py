"""Laws that all rewrites without a guard keep."""

import re
from functools import cache

import pytest
import torch
from builders.compiled import compiled
from builders.ffns import FFN, Block, batches, config, entries, expected, ffn, ffn_of, inputs
from torch import Tensor, nn

from tardis_fx import CalibrationError, Plan
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.planning import plan_for
from tardis_fx.testing import LAWS, assert_equivalent, assert_plan_roundtrip, examine, laws
from tardis_fx.testing.assertions import relative_error
from tardis_fx.testing.observation import affine

PRUNED = ["magnitude", "wanda", "ria", "sparsegpt"]
TWO_OF_FOUR = [f"{name}_2_4" for name in PRUNED]
QUANTISED = ["rtn", "gptq", "gptq_rotated"]
FACTORED = ["low_rank", "ffsplit"]
FOLDED = ["hot_fold", "bilinear"]
METHODS = [*PRUNED, *TWO_OF_FOUR, *QUANTISED, *FACTORED, *FOLDED, "token_gate"]
D, HIDDEN, BUDGET = 20, 80, 0.6
every_method = pytest.mark.parametrize("method", METHODS)


@cache
def observed(*, bias: bool = True) -> tuple[FFN, BatchObservation]:
    """One FFN for all tests, that nothing changes."""
    model = ffn(D, HIDDEN, bias=bias)
    return model, BatchObservation(model, batches(d=D), progress=False)


def plan_of(method: str, budget: float = BUDGET, *, bias: bool = True) -> Plan:
    return plans(budget, bias=bias)[method]


@cache  # and all methods together: after each test Dynamo forgets the capture
def plans(budget: float, *, bias: bool = True) -> dict[str, Plan]:
    _, observation = observed(bias=bias)
    return {method: plan_for(observation, config(method=method, budget=budget)) for method in METHODS}


@torch.no_grad()
def error_on(method: str, plan: Plan, x: Tensor, *, bias: bool = True) -> float:
    model, _ = observed(bias=bias)
    return relative_error(expected(model, plan, x) if bias else unbiased(model, plan, x), model(x))


def unbiased(model: FFN, plan: Plan, x: Tensor) -> Tensor:
    from tardis_fx.graph.site import SiteWeights

    entry, rewrite = plan.rewritten[0], rewrite_named(str(plan.rewritten[0].method))
    weights = SiteWeights(model.up.weight.detach(), None, model.down.weight.detach(), None)
    return rewrite.forward(x, rewrite.constants(entry, weights), entry)


@every_method
@pytest.mark.parametrize("bias", [True, False])
def test_the_plan_touches_no_more_than_the_budget_and_what_its_constants_hold(method: str, bias: bool) -> None:
    model, observation = observed(bias=bias)
    plan = plan_of(method, bias=bias)
    (entry,), (site,) = plan.rewritten, observation.sites
    constants = rewrite_named(method).constants(entry, site.weights)
    if method in (*PRUNED, *TWO_OF_FOUR):
        values = sum(int((constants[name] != 0).sum()) for name in ("up", "down"))
        counted: float = 4 * values + sum(p.numel() * 4 for p in model.parameters() if p.dim() == 1)
        counted += values // 4 if method in TWO_OF_FOUR else 0  # two bits of position
    else:
        counted = sum(constant.nbytes for constant in constants.values())
    if method == "token_gate":  # reads either the map or the FFN
        share, folded = entry.outlier_rate, D * (D + 1) * 4
        counted -= share * folded + (1 - share) * entry.dense_bytes
    assert entry.method == method
    assert entry.touched_bytes == pytest.approx(counted)
    assert plan.touched_fraction <= BUDGET
    if method not in (*QUANTISED, "bilinear"):  # whose sizes are few
        assert plan.touched_fraction >= BUDGET - 0.1
    own = {p.data_ptr() for p in model.parameters()}
    extra = sum(c.nbytes for c in constants.values() if c.data_ptr() not in own)
    assert entry.stored_bytes == entry.dense_bytes + extra


@pytest.mark.parametrize("method", [*PRUNED, *FACTORED, "hot_fold"])
def test_with_all_the_bytes_the_output_is_the_originals(method: str) -> None:
    assert plan_of(method, 1.0).touched_fraction == 1
    assert error_on(method, plan_of(method, 1.0), inputs(50, D, seed=9)) < 1e-5


@pytest.mark.parametrize("method", QUANTISED)
def test_with_all_the_bytes_8_bits_err_little(method: str) -> None:
    plan = plan_of(method, 1.0)
    assert plan.rewritten[0].settings["bits"] == 8
    assert error_on(method, plan, inputs(50, D, seed=9)) < 0.02


@every_method
@pytest.mark.parametrize("bias", [True, False])
def test_the_error_told_is_the_error_made_on_the_tokens_held_back(method: str, bias: bool) -> None:
    plan = plan_of(method, bias=bias)
    held_back = torch.cat([batch[-len(batch) // 8 :] for batch in batches(d=D)])
    assert error_on(method, plan, held_back, bias=bias) == pytest.approx(plan.sites[0].error, rel=1e-3)
    others = inputs(1000, D, seed=9)
    assert error_on(method, plan, others, bias=bias) == pytest.approx(plan.sites[0].error, rel=0.3)


@every_method
def test_drawn_sites_are_rewritten_by_the_laws_of_the_contract(method: str) -> None:
    quick = [law for law in LAWS if law is not laws.the_compiled_model_equals_the_eager_forward]
    assert not [str(verdict) for verdict in examine(method, examples=1, laws=quick) if not verdict.passed]


@every_method
def test_a_budget_below_the_floor_is_refused_and_the_floor_told_is_one(method: str) -> None:
    refusal, floor, plan = at_the_floor()[method]
    assert re.search(rf"too small for {method}.*{floor:.2%} of the original's", refusal)
    assert plan.touched_fraction == pytest.approx(floor, rel=1e-4)


@cache
def at_the_floor() -> dict[str, tuple[str, float, Plan]]:
    _, observation = observed()
    (site,) = observation.sites
    found = {}
    for method in METHODS:
        floor = rewrite_named(method).floor(site.weights) / site.weights.bytes  # type: ignore[attr-defined]
        with pytest.raises(CalibrationError) as refusal:
            plan_for(observation, config(method=method, budget=floor * 0.999))
        found[method] = (
            str(refusal.value), floor, plan_for(observation, config(method=method, budget=floor * 1.000001))
        )  # fmt: skip
    return found


@cache
def by_column() -> dict[str, Plan]:
    model, _ = observed()

    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(w.detach().T.contiguous()) for w in (model.up.weight, model.down.weight))
            self.up_bias, self.down_bias = model.up.bias, model.down.bias

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.down_bias, nn.functional.gelu(torch.addmm(self.up_bias, x, self.up)), self.down)

    observation = BatchObservation(Stored().eval(), batches(d=D), progress=False)
    return {method: plan_for(observation, config(method=method, budget=BUDGET)) for method in METHODS}


@every_method
def test_weights_stored_by_column_are_planned_like_those_stored_by_row(method: str) -> None:
    (stored,), (other,) = by_column()[method].rewritten, plan_of(method).rewritten
    assert stored.touched_bytes == other.touched_bytes
    assert stored.error == pytest.approx(other.error, rel=1e-3)


@every_method
def test_a_plan_comes_back_from_its_file_and_runs_alike(method: str) -> None:
    plan, x = plan_of(method), inputs(3, 5, D, seed=9)
    assert_plan_roundtrip(plan, lambda read: expected(observed()[0], read, x))


@every_method
def test_the_compiled_model_is_the_specification(method: str) -> None:
    model, _ = observed()
    run = compiled(model, plan_of(method))
    for shape in ((D,), (2, 30, D)):
        x = inputs(*shape, seed=9)
        with torch.no_grad():
            found, dense = run(x), model(x)
        if len(shape) > 1:  # a single token may be one that token_gate sends through the original
            assert relative_error(found, dense) > 1e-4, "the original ran"
        assert_equivalent(found, expected(model, plan_of(method), x), tolerance=1e-5)


@pytest.mark.parametrize("method", ["wanda", "gptq", "gptq_rotated", "low_rank"])
def test_inductor_compiles_what_takes_the_ffns_place(method: str) -> None:
    model, x = observed()[0], inputs(4, D, seed=9)
    with torch.no_grad():
        found = compiled(model, plan_of(method), inner=None)(x)
    torch.testing.assert_close(found, expected(model, plan_of(method), x), rtol=1e-4, atol=1e-4)


def test_prefill_original_keeps_the_ffns_of_many_tokens() -> None:
    model, _ = observed()
    run = compiled(model, plan_of("wanda"), prefill="original", dynamic=False)
    few, many = inputs(4, D, seed=9), inputs(40, D, seed=9)
    with torch.no_grad():
        assert torch.equal(run(many), model(many))
        torch.testing.assert_close(run(few), expected(model, plan_of("wanda"), few))


@cache
def stacked() -> tuple[nn.Sequential, BatchObservation]:
    model = nn.Sequential(*(Block(ffn(D, HIDDEN, seed=i), D) for i in range(2))).eval()
    with torch.no_grad():
        ffn_of(model[1]).down.weight.mul_(10)
    return model, BatchObservation(model, batches(d=D), progress=False)


@cache
def plans_of_two() -> dict[str, Plan]:
    return {method: plan_for(stacked()[1], config(method=method, budget=BUDGET)) for method in METHODS}


@every_method
def test_sites_of_one_shape_get_constants_of_one_shape(method: str) -> None:
    (_, observation), plan = stacked(), plans_of_two()[method]
    first, second = (
        {name: (t.shape, t.dtype) for name, t in rewrite_named(method).constants(entry, site.weights).items()}
        for entry, site in zip(entries(plan), observation.sites, strict=True)
    )
    assert first == second
    assert entries(plan)[0].settings == entries(plan)[1].settings


@pytest.mark.parametrize(
    ("method", "name"), [("sparsegpt", "up"), ("gptq", "up_codes"), ("gptq_rotated", "up_rows"), ("low_rank", "up_b")]
)
def test_sequential_fitting_sees_what_the_rewritten_sites_before_give(method: str, name: str) -> None:
    parallel, sequential = (
        entries(plan_for(stacked()[1], config(method=method, budget=0.3, sequential=value))) for value in (False, True)
    )
    assert torch.equal(parallel[0].tensors[name], sequential[0].tensors[name])
    assert not torch.equal(parallel[1].tensors[name], sequential[1].tensors[name])


@pytest.mark.parametrize("method", ["wanda", "rtn"])
def test_a_target_error_is_met_with_fewer_bytes_than_all(method: str) -> None:
    plan = plan_for(observed()[1], config(method=method, target_error=0.3))
    assert plan.sites[0].error <= 0.3
    assert plan.touched_fraction < 1


HALVES = ["ria", "sparsegpt", "gptq", "gptq_rotated", "low_rank", "ffsplit", "hot_fold", "token_gate"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_are_planned_in_their_own_dtype(dtype: torch.dtype) -> None:
    model = ffn(32, 64).to(dtype)
    observation = BatchObservation(model, [b.to(dtype) for b in batches(d=32)], progress=False)
    x = inputs(500, 32, seed=9).to(dtype)
    with torch.no_grad():
        original = model(x).float()
    for method in HALVES:
        plan = plan_for(observation, config(method=method, budget=BUDGET))
        found = expected(model, plan, x)
        assert found.dtype == dtype, method
        assert plan.touched_fraction <= BUDGET, method
        assert relative_error(found.float(), original) == pytest.approx(plan.sites[0].error, rel=0.3), method


@every_method
def test_sites_without_activation_are_refused_with_the_reason(method: str) -> None:
    assert "no activation" in str(rewrite_named(method).refuse(affine().site))
