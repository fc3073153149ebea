"""Dynamic precision: neurons in codes, each as precise as its token needs."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from builders.ffns import batches, config, ffn, fitted, inputs
from torch import Tensor, nn

from tardis_fx import CalibrationError, ConfigError, Plan, Report, calibrate
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.run import RepeatableObservation
from tardis_fx.passes.partial_linear import PartialLinear
from tardis_fx.plan import SitePlan
from tardis_fx.runtime.touched import count_touched
from tardis_fx.testing.ffn import gated_ffn
from tardis_fx.testing.observation import SiteObservation

D, HIDDEN = 80, 160  # a block of 64 columns and one of 16


def model_of(*, gated: bool, bias: bool = True) -> nn.Module:
    return (gated_ffn if gated else ffn)(D, HIDDEN, bias=bias)


class Normalised(nn.Module):
    """An FFN whose output is normalised before the residual addition."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.ffn, self.norm = model_of(gated=gated, bias=False), nn.RMSNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.norm(self.ffn(x))
        return output


def plan_of(model: nn.Module, xs: Sequence[Tensor], budget: float) -> SitePlan:
    (plan,) = fitted(
        BatchObservation(model, xs, progress=False), PartialLinear(), config(method="partial_linear", budget=budget)
    )
    return plan


def replacement(model: nn.Module, plan: SitePlan) -> Callable[[Tensor], Tensor]:
    x = inputs(8, D).to(next(model.parameters()).dtype)
    (site,) = BatchObservation(model, [x], progress=False).sites
    PartialLinear().validate(plan, site.weights)
    return PartialLinear().replacement(plan, site.weights)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_error_falls_as_bytes_grow_and_is_that_of_the_output(gated: bool, bias: bool) -> None:
    model, xs = model_of(gated=gated, bias=bias), batches(8, d=D)
    errors = []
    for budget in (0.14, 0.17, 0.22, 0.3):
        plan = plan_of(model, xs, budget)
        assert plan.touched_bytes <= 1.01 * budget * plan.dense_bytes
        x = inputs(1024, D, seed=9)
        with torch.no_grad():
            exact, output = model(x), replacement(model, plan)(x)
        assert float((output - exact).norm() / exact.norm()) == pytest.approx(plan.error, rel=0.15)
        errors.append(plan.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_touched_bytes_are_those_that_the_op_counts(gated: bool, normalised: bool, dtype: torch.dtype) -> None:
    model = (Normalised(gated=gated).eval() if normalised else model_of(gated=gated)).to(dtype)
    xs = [x.to(dtype) for x in batches(8, d=D)]
    plan = plan_of(model, xs, 0.16)
    assert plan.settings["relative"] == normalised
    rewritten = replacement(model, plan)
    with torch.no_grad(), count_touched() as touched:
        for x in xs:
            rewritten(x)
    assert touched.per_token == pytest.approx(plan.touched_bytes, rel=0.01)


@pytest.mark.parametrize("gated", [False, True])
def test_a_budget_below_the_base_codes_is_refused(gated: bool) -> None:
    with pytest.raises(CalibrationError, match="the base codes alone read"):
        plan_of(model_of(gated=gated), batches(d=D), 0.02)


@pytest.mark.parametrize("gated", [False, True])
def test_every_budget_down_to_the_base_codes_is_met(gated: bool) -> None:
    model, xs = model_of(gated=gated), batches(8, d=D)
    with pytest.raises(CalibrationError) as refused:
        plan_of(model, xs, 0.02)
    floor = float(str(refused.value).rsplit(" ", 1)[-1].replace(",", ""))
    dense = sum(parameter.nbytes for parameter in model.parameters())
    for above in (1.001, 1.01, 1.05):
        plan = plan_of(model, xs, above * floor / dense)
        assert plan.touched_bytes <= 1.005 * above * floor


def test_a_neuron_without_a_column_is_not_listed() -> None:
    model = ffn(D, HIDDEN)
    with torch.no_grad():
        model.down.weight[:, 7] = 0
    plan = plan_of(model, batches(8, d=D), 0.2)
    assert 7 not in plan.tensors["neurons"].tolist()
    assert len(plan.tensors["neurons"]) == HIDDEN - 1


@pytest.mark.parametrize("gated", [False, True])
def test_nan_in_a_token_shows_in_its_output_alone(gated: bool) -> None:
    model = model_of(gated=gated)
    plan, x = plan_of(model, batches(8, d=D), 0.2), inputs(4, D)
    clean = replacement(model, plan)(x)
    x[1, 3] = torch.nan
    output = replacement(model, plan)(x)
    assert output[1].isnan().all()
    others = [0, 2, 3]  # round values with other neurons, because the NaN reads all of them
    torch.testing.assert_close(output[others], clean[others], rtol=0, atol=1e-4 * float(clean.abs().max()))


def test_a_plan_gives_the_same_output_after_it_was_saved(tmp_path: object) -> None:
    model, x = model_of(gated=True), inputs(8, D)
    plan = plan_of(model, batches(8, d=D), 0.2)
    Plan((plan,), config(method="partial_linear", budget=0.2)).save(f"{tmp_path}/plan.safetensors")
    (loaded,) = Plan.load(f"{tmp_path}/plan.safetensors").rewritten
    (site,) = BatchObservation(model, [x], progress=False).sites
    PartialLinear().validate(loaded, site.weights)
    assert torch.equal(replacement(model, loaded)(x), replacement(model, plan)(x))


def test_sequential_fitting_and_other_devices_are_refused_with_a_way_out() -> None:
    model = ffn(D, HIDDEN)
    with pytest.raises(ConfigError, match="without sequential, or guarded_fold with it"):
        calibrate(model, batches(d=D), config=config(method="partial_linear", sequential=True))
    (site,) = BatchObservation(model, [inputs(8, D)], progress=False).sites
    elsewhere = replace(site.weights, up=site.weights.up.to("meta"))
    with pytest.raises(ConfigError, match="on meta, use guarded_fold"):
        PartialLinear().constants(plan_of(model, batches(d=D), 0.2), elsewhere)


@pytest.mark.parametrize("gated", [False, True])
def test_a_report_names_the_parts_of_a_neuron_and_their_bits(gated: bool) -> None:
    plan = plan_of(model_of(gated=gated), batches(d=D), 0.2)
    text = str(Report.from_plan(Plan((plan,), config(method="partial_linear", budget=0.2))))
    widths = plan.settings
    assert (
        f"partial_linear: projections {widths['bits']}+{widths['low_bits']}, columns {widths['column_bits']}+" in text
    )
    assert (f", fold {widths['fold_bits']} bits" in text) == bool(widths["fold_bits"])
    assert not (gated and widths["fold_bits"])


# ---- What is worth its bytes


class Output(NamedTuple):
    logits: Tensor


class Hidden(NamedTuple):
    hidden: Tensor


class Weighed(nn.Module):
    """Two equal FFNs, of which one counts less in the output."""

    def __init__(self, scale: float, form: Callable[[Tensor], Any] = Output) -> None:
        super().__init__()
        self.first, self.second = ffn(D, HIDDEN, seed=1), ffn(D, HIDDEN, seed=2)
        self.scale, self.form = scale, form
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.form(self.first(x) + self.scale * self.second(x))


def share_of_first(observation: RepeatableObservation) -> float:
    """Bytes of the first site over those of the second."""
    first, second = fitted(observation, PartialLinear(), config(method="partial_linear", budget=0.2))
    return first.touched_bytes / second.touched_bytes


@pytest.mark.parametrize("form", [Output, Hidden])
def test_the_bytes_go_where_the_output_needs_them(form: Callable[[Tensor], Any]) -> None:
    """Logits, and hidden states of an encoder."""

    def share(scale: float) -> float:
        return share_of_first(BatchObservation(Weighed(scale, form), batches(8, d=D), progress=False))

    assert share(1.0) == pytest.approx(1, rel=0.1)
    assert share(0.05) > 1.3


def test_where_nothing_moves_the_output_all_sites_count_alike() -> None:
    """An output of integers, logits that no site reaches, and sites without a model."""
    xs = batches(8, d=D)
    shares = [
        share_of_first(BatchObservation(Weighed(0.05, lambda x: Hidden(x.argmax(-1))), xs, progress=False)),
        share_of_first(BatchObservation(Weighed(0.05, lambda x: Output(0 * x)), xs, progress=False)),
        share_of_first(SiteObservation([Weighed(1.0).first, Weighed(1.0).second], xs)),
    ]
    assert shares == pytest.approx([1.0] * 3, rel=0.1)
