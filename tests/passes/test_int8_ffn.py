"""Dense matrices in integers: by themselves, and of what other rewrites leave."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from builders.compiled import compiled
from builders.ffns import Block, batches, config, expected, ffn, inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from tardis_fx import CalibrationError, ConfigError, Plan
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.int8_ffn import Int4Ffn, Int8Ffn
from tardis_fx.passes.matrix_forms import Int8
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan
from tardis_fx.planning import plan_for
from tardis_fx.runtime.reference import dequantise
from tardis_fx.testing import examine, laws
from tardis_fx.testing.observation import SiteObservation

D, HIDDEN = 64, 192
INNER = [
    "low_rank",
    "ffsplit",
    "hot_fold",
    "bilinear",
    "linear_replace",
    "wanda",
    "wanda_2_4",
    "sparsegpt",
    "drop_bias",
]
INNER += ["guarded_fold"]


@cache
def observed(dtype: torch.dtype = torch.float32) -> SiteObservation:
    return SiteObservation([ffn(D, HIDDEN).to(dtype)], [x.to(dtype) for x in batches(d=D)])


def planned(method: str, budget: float = 1.0, dtype: torch.dtype = torch.float32) -> Plan:
    return plan_for(observed(dtype), config(method=method, budget=budget))


@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 130), st.sampled_from([torch.float32, torch.bfloat16]))
def test_codes_of_8_bits_are_off_by_half_a_step_at_the_most(
    seed: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    matrix = (inputs(rows, columns, seed=seed) * inputs(rows, 1, seed=seed + 1)).to(dtype)
    form = Int8.from_matrix(matrix)
    codes, scale = form.codes, form.scale
    missed = (codes.float() * scale.float()[:, None] - matrix.float()).abs()
    clipped = 127 * 2**-8  # of a scale rounded down to bfloat16
    assert (missed <= (0.5 + clipped * (dtype == torch.bfloat16)) * scale.float()[:, None] * 1.001).all()


@pytest.mark.parametrize("rewrite", [Int8Ffn(), Int4Ffn()])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@given(seed=st.integers(0, 2**16), size=st.sampled_from([1.0, 20.0, 60.0]))
def test_a_layer_of_codes_is_as_near_to_what_they_hold_as_its_dtype_allows(
    rewrite: Int8Ffn, dtype: torch.dtype, seed: int, size: float
) -> None:
    """Of outputs that float16 holds by far, but not divided by the scale of the codes."""
    columns = 768
    matrix = (inputs(8, columns, seed=seed) * 0.02).to(dtype)
    x, bias = (inputs(4, columns, seed=seed + 1) * size).to(dtype), inputs(8, seed=seed + 2).to(dtype)
    form = rewrite.quantise(matrix)
    if isinstance(form, Int8):
        held = form.codes.double() * form.scale.double()[:, None]
    else:
        held = dequantise(form.codes, form.scale, form.zero, 4, columns, torch.float64)
    found = form.apply(x, bias).double()
    missed = (found - F.linear(x.double(), held, bias.double())).abs()
    # A weight, the product, its scaling and the bias are rounded to the dtype, and sums of products are float32.
    rounding = 4 * torch.finfo(dtype).eps / 2 + columns * torch.finfo(torch.float32).eps / 2
    assert (missed <= rounding * F.linear(x.double().abs(), held.abs(), bias.double().abs())).all()


@pytest.mark.parametrize("rewrite", [Int8Ffn(), Int4Ffn()])
@given(st.integers(0, 2**16))
def test_zeros_stay_zeros(rewrite: Int8Ffn, seed: int) -> None:
    matrix = inputs(6, 130, seed=seed) * (inputs(6, 130, seed=seed + 1) > 0.5)
    matrix[0] = 0
    opened = rewrite.quantise(matrix).apply(torch.eye(130)).T
    assert (opened[matrix == 0] == 0).all()
    assert torch.isfinite(opened).all()


@pytest.mark.parametrize(("method", "bits", "beside"), [("int8_ffn", 8, 4), ("int4_ffn", 4, 3)])
def test_alone_it_reads_the_codes_the_scales_and_the_biases(method: str, bits: int, beside: int) -> None:
    (entry,) = planned(method).rewritten
    groups = HIDDEN + D if bits == 8 else HIDDEN * D // 64 + D * HIDDEN // 64
    assert entry.touched_bytes == 2 * D * HIDDEN * bits / 8 + groups * beside + 4 * (D + HIDDEN)
    assert entry.error < (0.012 if bits == 8 else 0.15)


@pytest.mark.parametrize("inner", INNER)
def test_behind_another_rewrite_it_saves_bytes_and_adds_little_error(inner: str) -> None:
    config_ = config(method=inner, budget=1.0 if inner == "drop_bias" else 0.6)
    (alone,) = plan_for(observed(), config_).rewritten
    (entry,) = planned(f"{inner}+int8_ffn", config_.budget).rewritten
    assert entry.settings["matrices"]
    assert entry.touched_bytes < (0.95 if inner == "guarded_fold" else 0.35) * alone.touched_bytes
    assert entry.error == pytest.approx(alone.error, abs=0.01)
    assert entry.method == f"{inner}+int8_ffn"


@pytest.mark.parametrize("method", ["int4_ffn", "low_rank+int8_ffn"])
def test_the_laws_of_rewrites_hold(method: str) -> None:
    some = [law for law in laws.LAWS if law is not laws.the_compiled_model_equals_the_eager_forward]
    assert not [str(v) for v in examine(method, examples=2, laws=some) if not v.passed]


@torch.no_grad()
def test_inductor_compiles_it_to_products_of_numbers_and_codes() -> None:
    dtype = torch.bfloat16
    model, plan, x = ffn(D, HIDDEN).to(dtype), planned("int8_ffn", dtype=dtype), inputs(1, 1, D).to(dtype)
    torch._dynamo.utils.counters.clear()
    found = compiled(model, plan, inner=None)(x)
    torch.testing.assert_close(found, expected(model, plan, x), rtol=3e-2, atol=3e-2)
    assert torch._dynamo.utils.counters["inductor"]["woq_matcher_count"] == 2


def test_the_sites_that_another_rewrite_leaves_are_quantised_too() -> None:
    model = nn.Sequential(*(Block(ffn(D, HIDDEN, seed=i), D) for i in range(2))).eval()
    observation = BatchObservation(model, batches(d=D), progress=False)
    plan = plan_for(observation, config(method=["linear_replace", "int8_ffn"], budget=0.7))
    assert sorted(str(site.method) for site in plan.sites) == ["int8_ffn", "linear_replace+int8_ffn"]
    assert all(0 < site.error < 1 for site in plan.sites)
    assert plan.touched_fraction < 0.25


def test_a_matrix_too_small_to_save_anything_stays_as_it_is() -> None:
    (entry,) = planned("low_rank+int8_ffn", 0.032).rewritten
    assert entry.settings["inner"]["ranks"] == [1, 1]
    assert set(entry.settings["matrices"]) == {"up_b", "down_b"}, "factors of one column have a scale for each weight"


def test_a_budget_or_a_target_out_of_reach_is_refused() -> None:
    for changed, why in (
        ({"budget": 0.2}, "too small for int8_ffn"),
        ({"target_error": 1e-4}, "out of reach of int8_ffn"),
    ):
        with pytest.raises(CalibrationError, match=why):
            plan_for(observed(), config(method="int8_ffn", **changed))


@pytest.mark.parametrize("method", ["int8_ffn", "int4_ffn"])
def test_a_target_is_for_the_root_mean_square_of_the_sites_errors(method: str) -> None:
    rough = ffn(D, HIDDEN, seed=1)
    with torch.no_grad():
        rough.up.weight[:, 0] *= 30  # leaves few steps to the other columns of the rows
    two = SiteObservation([ffn(D, HIDDEN), rough], batches(d=D))
    low, high = (site.error for site in plan_for(two, config(method=method, budget=1.0)).sites)
    joint = ((low**2 + high**2) / 2) ** 0.5
    assert low < 0.95 * joint < 1.05 * joint < high
    assert len(plan_for(two, config(method=method, target_error=joint * 1.01)).sites) == 2
    with pytest.raises(CalibrationError, match=f"out of reach of {method}"):
        plan_for(two, config(method=method, target_error=joint * 0.99))


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "int8_ffn", "budget": 1.0},
        {"method": "int8_ffn", "target_error": 0.9},
        {"method": "low_rank+int8_ffn", "budget": 1.0},
    ],
)
def test_what_overflows_is_refused_whatever_the_budget(changed: dict[str, Any]) -> None:
    wide = SiteObservation([ffn(D, HIDDEN).half()], [x.clamp(0.1) * 2e4 for x in batches(d=D)])
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        plan_for(wide, config(**changed))


def test_a_fold_in_few_bits_leaves_nothing_to_quantise() -> None:
    with pytest.raises(ConfigError, match="its fold is in few bits already"):
        plan_for(observed(), config(method=["guarded_fold", "int8_ffn"], fold_bits=4))


def test_what_reads_codes_as_numbers_fails() -> None:
    rewrite = rewrite_named("low_rank+int8_ffn")
    (entry,) = planned("low_rank+int8_ffn", 0.6).rewritten
    constants = rewrite.constants(entry, observed().sites[0].weights)
    inner = rewrite.inner  # type: ignore[attr-defined]

    class Careless(type(inner)):  # type: ignore[misc]
        def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
            return super().forward(x, constants, plan) + torch.mean(constants["up_a"])  # type: ignore[no-any-return]

    with pytest.raises(TypeError, match="Int8"):
        Int8Ffn(Careless()).forward(inputs(2, D), constants, entry)
