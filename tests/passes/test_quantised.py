"""Plans whose folded weight and rows are quantised."""

from pathlib import Path

import pytest
import torch
from builders.compiled import compiled
from builders.ffns import ACTIVATIONS as NAMES
from builders.ffns import FFN, batches, config, ffn, inputs, planned
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx import CalibrationError, Plan, calibrate, count_touched
from tardis_fx.graph.site import SiteWeights
from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.packing import low_bits, row_bytes
from tardis_fx.runtime.reference import dequantise, rows_of

D, HIDDEN = 80, 160  # two blocks of input columns, the second in part
every_width = pytest.mark.parametrize(
    ("fold_bits", "row_bits", "group_size"),
    [(16, 8, 64), (8, 16, 128), (8, 8, 32), (4, 4, 128), (4, 3, 64)],
)


def rewritten(model: FFN, plan: SitePlan, x: Tensor) -> Tensor:
    values = (
        None if p is None else p.detach() for p in (model.up.weight, model.up.bias, model.down.weight, model.down.bias)
    )
    weights = SiteWeights(*values)  # type: ignore[arg-type]
    with torch.no_grad():
        return GuardedFold().forward(x, GuardedFold().constants(plan, weights), plan)


def error(model: FFN, plan: SitePlan, x: Tensor) -> float:
    with torch.no_grad():
        expected = model(x)
    return float((rewritten(model, plan, x) - expected).norm() / expected.norm())


@settings(max_examples=examples(4))
@given(st.integers(0, 2**16), st.sampled_from(NAMES), st.booleans())
def test_with_rows_of_8_bits_computing_every_neuron_is_close_to_the_original(
    seed: int, activation: str, bias: bool
) -> None:
    model = ffn(D, HIDDEN, activation, bias=bias, seed=seed)
    (plan,) = planned(model, D, budget=1, row_bits=8, fold_bits=8).rewritten
    assert plan.error < 0.02
    assert error(model, plan, inputs(200, D, seed=seed + 1)) < 0.03


def test_rounding_by_the_inputs_errs_less_than_to_nearest() -> None:
    model, mixing = ffn(D, HIDDEN), inputs(D, D, seed=50) / 6 + torch.eye(D)
    xs = [batch @ mixing for batch in batches(d=D)]
    widths = {"budget": 0.2, "fold_bits": 4, "row_bits": 4}
    gptq, nearest = (
        calibrate(model, xs, config=config(**widths, rounding=r)).rewritten[0] for r in ("gptq", "nearest")
    )
    assert gptq.error < 0.95 * nearest.error


def test_more_bits_in_a_row_err_less() -> None:
    errors = [planned(ffn(D, HIDDEN), D, budget=1, row_bits=bits).sites[0].error for bits in (3, 4, 8)]
    assert errors[0] > 1.2 * errors[1] > 5 * errors[2]


def test_more_bits_in_the_fold_err_less() -> None:
    """With an activation that hardly bends, the fold is all there is."""
    model = ffn(D, HIDDEN, bias=False)
    with torch.no_grad():
        model.up.weight.mul_(0.01)
    errors = [planned(model, D, budget=0.5, fold_bits=bits).sites[0].error for bits in (4, 8, 16)]
    assert errors[0] > 5 * errors[1] > 5 * errors[2]


@every_width
def test_the_error_told_is_the_error_made_on_the_tokens_held_back(
    fold_bits: int, row_bits: int, group_size: int
) -> None:
    model = ffn(D, HIDDEN)
    (plan,) = planned(model, D, budget=0.4, fold_bits=fold_bits, row_bits=row_bits, group_size=group_size).rewritten
    held_back = torch.cat([batch[-len(batch) // 8 :] for batch in batches(d=D)])
    assert error(model, plan, held_back) == pytest.approx(plan.error, rel=0.01)


@every_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_touched_bytes_are_those_of_the_plans_tensors(
    fold_bits: int, row_bits: int, group_size: int, dtype: torch.dtype
) -> None:
    model, xs = ffn(D, HIDDEN).to(dtype), [batch.to(dtype) for batch in batches(d=D)]
    plan = Plan((planned_in(model, xs, fold_bits, row_bits, group_size),), config())
    (site,) = plan.rewritten
    tensors, size = site.tensors, dtype.itemsize
    row = 2 * D * size if row_bits == 16 else tensors["up"].shape[1] + tensors["columns"].shape[1]
    row += 4 + 12  # bias; number, slope, intercept
    fixed = sum(tensors[name].nbytes for name in ("folded_weight", "folded_bias", "codes", "scale", "zero", "guard"))
    assert site.touched_bytes == pytest.approx(fixed + row * site.outlier_rate * HIDDEN, rel=1e-6)
    with count_touched() as touched, torch.no_grad():
        run = compiled(model, plan, prefill="rewritten")
        for x in xs:
            run(x)
    assert touched.per_token == pytest.approx(site.touched_bytes, rel=0.01)


def planned_in(model: FFN, xs: list[Tensor], fold_bits: int, row_bits: int, group_size: int) -> SitePlan:
    widths = {"fold_bits": fold_bits, "row_bits": row_bits, "group_size": group_size}
    return calibrate(model, xs, config=config(budget=0.6, **widths)).rewritten[0]


@pytest.mark.parametrize(("fold_bits", "row_bits", "group_size"), [(8, 8, 64), (4, 3, 128)])
def test_a_quantised_fold_and_rows_are_what_is_stored(fold_bits: int, row_bits: int, group_size: int) -> None:
    widths = {"fold_bits": fold_bits, "row_bits": row_bits, "group_size": group_size}
    (plan,) = planned(ffn(D, HIDDEN), D, budget=0.15, **widths).rewritten
    listed = len(plan.tensors["neurons"])
    assert 0 < listed < HIDDEN
    assert plan.tensors["folded_weight"].shape == (D, row_bytes(D, fold_bits, group_size))
    for name, bits in (("up", low_bits(2, row_bits)), ("columns", row_bits)):
        assert plan.tensors[name].shape == (listed, row_bytes(D, bits, group_size))
        assert plan.tensors[name].dtype == torch.uint8
    rows = row_bytes(D, low_bits(2, row_bits), group_size) + row_bytes(D, row_bits, group_size)
    codes = HIDDEN * rows + D * row_bytes(D, fold_bits, group_size)
    predictor = HIDDEN * (row_bytes(D, 2, group_size) + 4 * 6)  # bounds, slope, intercept, bias, number; all padded
    assert plan.stored_bytes == plan.dense_bytes + codes + D * 4 + predictor + 16


def test_the_predictor_and_the_rows_nested_in_it_are_the_weights_of_the_listed_neurons() -> None:
    model = ffn(D, HIDDEN)
    (plan,) = planned(model, D, budget=0.4, row_bits=8).rewritten
    tensors, listed = plan.tensors, plan.tensors["neurons"].long()
    codes, scale, zero = (tensors[name][:, 0] for name in ("codes", "scale", "zero"))
    up = dequantise(codes, scale, zero, 2, D) + rows_of(tensors["up"], 6, D, torch.float32)
    columns = rows_of(tensors["columns"], 8, D, torch.float32)
    for found, weight in ((up, model.up.weight), (columns, model.down.weight.T)):
        step = (weight.amax() - weight.amin()) / 255
        assert (found - weight[listed]).abs().max() < 3 * step


def test_neurons_that_are_always_exact_have_a_predictor_that_no_estimate_satisfies() -> None:
    (plan,) = planned(ffn(D, HIDDEN), D, budget=0.5, row_bits=4).rewritten
    lower, upper = plan.tensors["guard"].T
    always = lower == torch.inf
    assert 0 < always.sum() < len(always) == len(plan.tensors["neurons"])
    assert (upper[always] == -torch.inf).all()


def test_the_bias_makes_up_for_what_quantising_the_fold_changes_in_the_mean() -> None:
    model, xs = ffn(D, HIDDEN), [batch + 2 for batch in batches(d=D)]
    plan = planned_in(model, xs, 4, 16, 64)
    fitted = torch.cat([x[: len(x) - len(x) // 8] for x in xs])
    with torch.no_grad():
        missing = model(fitted) - rewritten(model, plan, fitted)
    assert missing.mean(0).norm() < 0.05 * missing.std(0).norm()


@every_width
def test_a_plan_comes_back_from_its_file_and_runs_alike(
    fold_bits: int, row_bits: int, group_size: int, tmp_path: Path
) -> None:
    model = ffn(D, HIDDEN)
    plan = planned(model, D, budget=0.4, fold_bits=fold_bits, row_bits=row_bits, group_size=group_size)
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert again.config == plan.config
    assert again.rewritten[0].settings == plan.rewritten[0].settings
    x = inputs(3, 5, D, seed=9)
    assert torch.equal(rewritten(model, again.rewritten[0], x), rewritten(model, plan.rewritten[0], x))


@every_width
def test_the_compiled_model_is_the_specification(fold_bits: int, row_bits: int, group_size: int) -> None:
    model = ffn(D, HIDDEN)
    plan = planned(model, D, budget=0.4, fold_bits=fold_bits, row_bits=row_bits, group_size=group_size)
    for shape in ((D,), (4, D), (2, 30, D)):
        x = inputs(*shape, seed=9)
        with torch.no_grad():
            found = compiled(model, plan)(x)
        torch.testing.assert_close(found, rewritten(model, plan.rewritten[0], x), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("budget", "expected"), [(0.08, 3), (0.9, 8)])
def test_open_widths_become_those_of_least_error(budget: float, expected: int) -> None:
    """Few bytes are worth more as many rough weights than as few fine ones."""
    model = ffn(D, HIDDEN, "silu")
    found = planned(model, D, budget=budget, fold_bits=None, row_bits=None).rewritten[0]
    assert found.settings["fold_bits"] == expected
    assert found.touched_bytes <= budget * 1.02 * found.dense_bytes
    for bits in (3, 4, 8, 16):
        try:
            other = planned(model, D, budget=budget, fold_bits=bits, row_bits=bits).rewritten[0]
        except CalibrationError:  # the fold alone reads more than the budget
            continue
        assert found.error <= other.error


def test_open_widths_become_those_of_least_bytes_under_a_target() -> None:
    model = ffn(D, HIDDEN)
    found = planned(model, D, target_error=0.2, fold_bits=None, row_bits=None).rewritten[0]
    whole = planned(model, D, target_error=0.2).rewritten[0]  # of 16 bits
    assert found.error <= 0.2
    assert found.touched_bytes < whole.touched_bytes / 2
