"""Calibration to a divergence of the model's output."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from builders.ffns import Block, batches, config, ffn, inputs
from builders.healing import Language, healed, language_plan, same
from builders.models import gpt2, tokens
from torch import Tensor, nn

from tardis_fx import CalibrationError, ConfigError, Plan, calibrate, target_kl
from tardis_fx.config import Options
from tardis_fx.measure.quality import DenseReference, rewrite_every_token
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.statistics import divergence
from tardis_fx.statistics.divergence import kl_divergence
from tardis_fx.statistics.target import RESOLUTION, SLACK, TRIES
from tardis_fx.testing.assertions import contents

TEXT = [tokens(4, 32, seed=i) for i in range(5)]
TARGET = 0.05
QUICK = config(target_kl=TARGET, method="wanda")


@cache
def model() -> nn.Module:
    """GPT-2 whose FFNs matter, and whose distributions are far from uniform: its initial weights are small."""
    made: nn.Module = gpt2()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("c_fc.weight", "mlp.c_proj.weight", "wte.weight")):
                parameter.mul_(15)
    return made


class Form(nn.Module):
    """The model with its logits in another form of output."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.model, self.form = model(), form
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        output = self.model(input_ids, attention_mask=attention_mask, use_cache=False)
        forms: dict[str, Any] = {
            "mapping": {"logits": output.logits},
            "tensor": output.logits,
            "tuple": (output.logits,),
            "nan": output.logits / torch.zeros(()),
            "ids": output.logits.argmax(-1),
        }
        return forms[self.form]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The divergences that the search measures."""
    measure, measured = target_kl._divergence, list[float]()

    def noted(*arguments: Any) -> float:
        measured.append(measure(*arguments))
        return measured[-1]

    monkeypatch.setattr(target_kl, "_divergence", noted)
    yield measured
    torch.compiler.reset()


def independent(plan: Plan, held_back: Tensor | Mapping[str, Tensor]) -> float:
    """The divergence through the backend, as a user would measure it on a batch."""
    fast = rewrite_every_token(model(), plan)
    given = held_back if isinstance(held_back, Mapping) else {"input_ids": held_back}
    with torch.no_grad():
        divergence = kl_divergence(fast(**given).logits, model()(**given).logits)
    mask = given.get("attention_mask")
    return float((divergence if mask is None else divergence[mask.bool()]).mean())


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"fold_bits": None, "row_bits": None, "sequential": True},
        {"method": "wanda"},
        {"method": "rtn"},
        {"method": ["drop_bias", "wanda"]},
        {"method": {"*.0.*": "gptq", "*": "guarded_fold"}},
    ],
    ids=str,
)
def test_the_plan_meets_the_target_with_few_fits(chosen: dict[str, Any], seen: list[float]) -> None:
    plan = calibrate(model(), TEXT, config=config(target_kl=TARGET, **chosen))
    assert plan.kl is not None
    assert plan.kl <= TARGET
    assert plan.kl in seen
    assert 1 < len(seen) <= TRIES
    assert plan.touched_fraction < 0.95, "the search ended at all bytes"
    assert independent(plan, TEXT[-1]) == pytest.approx(plan.kl, rel=1e-3)
    assert DenseReference(model(), TEXT[-1]).quality(rewrite_every_token(model(), plan)).kl == pytest.approx(
        plan.kl, rel=1e-3
    )


def test_the_plan_is_that_of_its_budget_and_of_the_batches_that_are_not_held_back() -> None:
    plan = calibrate(model(), TEXT, config=QUICK)
    assert plan.config == config(budget=plan.config.budget, method="wanda")
    assert contents(plan) == contents(calibrate(model(), TEXT[:-1], config=plan.config))


def test_a_slightly_smaller_budget_misses_the_target() -> None:
    plan = calibrate(model(), TEXT, config=QUICK)
    assert plan.kl is not None
    if plan.kl < TARGET * (1 - SLACK):
        smaller = config(budget=plan.config.budget / (1 + RESOLUTION), method="wanda")
        assert independent(calibrate(model(), TEXT[:-1], config=smaller), TEXT[-1]) > TARGET


def test_a_stricter_target_takes_more_bytes() -> None:
    plans = [calibrate(model(), TEXT, config=config(target_kl=kl)) for kl in (0.08, 0.02)]
    assert plans[0].touched_fraction < 0.8 * plans[1].touched_fraction


def test_offload_meets_the_target_too() -> None:
    texts = TEXT[-2:]  # every fit runs them anew for every FFN
    plan = calibrate(model(), texts, config=QUICK, offload=True)
    assert plan.kl is not None
    assert independent(plan, TEXT[-1]) == pytest.approx(plan.kl, rel=1e-3)
    assert plan.kl <= TARGET


def test_the_last_eighth_of_the_batches_is_held_back_from_every_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [tokens(1, 32, seed=i) for i in range(17)]
    shown: list[Tensor] = []
    show = BatchObservation._observe

    def noted(self: BatchObservation, *arguments: Any) -> None:
        assert isinstance(self._batch, Tensor)
        if self._observers:
            shown.append(self._batch)
        show(self, *arguments)

    monkeypatch.setattr(BatchObservation, "_observe", noted)
    calibrate(model(), texts, config=QUICK)
    assert {id(batch) for batch in shown} == {id(batch) for batch in texts[:15]}


def padded(filler: int) -> list[dict[str, Tensor]]:
    """Batches that end in padding, of any token."""
    made = []
    for text in TEXT:
        mask = torch.ones_like(text)
        mask[::2, 20:] = 0
        made.append({"input_ids": text.where(mask.bool(), filler), "attention_mask": mask})
    return made


def test_padding_does_not_count() -> None:
    first, second = (calibrate(model(), padded(filler), config=QUICK) for filler in (0, 7))
    assert first.kl == second.kl
    assert contents(first) == contents(second)
    assert first.kl is not None
    assert independent(first, padded(0)[-1]) == pytest.approx(first.kl, rel=1e-3)


@pytest.mark.parametrize("form", ["mapping", "tensor"])
def test_logits_may_come_in_a_mapping_or_alone(form: str) -> None:
    plan, wanted = (calibrate(m, TEXT, config=QUICK) for m in (Form(form), model()))
    assert plan.kl == pytest.approx(wanted.kl, rel=1e-4)


@pytest.mark.parametrize(("form", "said"), [("tuple", "returns tuple"), ("ids", "logits"), ("nan", "NaN or infinity")])
def test_an_output_without_logits_is_refused(form: str, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        calibrate(Form(form), TEXT, config=QUICK)


def test_few_positions_have_their_probabilities_in_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def noted(rewritten: Tensor, dense: Tensor) -> Tensor:
        sizes.append(len(dense))
        return measured(rewritten, dense)

    measured = divergence._kl_divergence
    monkeypatch.setattr(divergence, "_kl_divergence", noted)
    monkeypatch.setattr(divergence, "TOGETHER", 50)
    plan = calibrate(model(), TEXT, config=QUICK)
    assert plan.kl == pytest.approx(calibrate(model(), TEXT, config=QUICK).kl, rel=1e-5)
    assert set(sizes) == {50, 4 * 32 % 50}


def test_one_batch_is_too_few() -> None:
    with pytest.raises(CalibrationError, match="at least two batches"):
        calibrate(model(), TEXT[:1], config=QUICK)


def test_held_back_batches_of_nothing_but_padding_are_refused() -> None:
    given = padded(0)
    given[-1]["attention_mask"][:] = 0
    with pytest.raises(CalibrationError, match="padding"):
        calibrate(model(), given, config=QUICK)


def test_a_target_out_of_reach_names_the_best_divergence(seen: list[float]) -> None:
    with pytest.raises(CalibrationError, match="target_kl 1e-12: out of reach, the best is ") as raised:
        calibrate(model(), TEXT, config=config(target_kl=1e-12, method="rtn"))
    assert f"{min(seen):.3g}" in str(raised.value)


def test_what_no_budget_can_fit_is_the_error_of_the_fit() -> None:
    with pytest.raises(CalibrationError, match="the error of wanda is nan"):
        calibrate(model(), [TEXT[0][:1, :4], TEXT[1]], config=QUICK)


def test_without_a_plan_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="target_kl runs the model again and again: it needs calibrate and a plan"):
        Options(config=QUICK)


def test_the_divergence_is_saved_with_the_plan_and_told_with_it(tmp_path: Path) -> None:
    plan = calibrate(model(), TEXT, config=QUICK)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").kl == plan.kl
    assert f"KL {plan.kl:.3g} nats per token" in str(plan)


def test_a_healed_plan_has_no_divergence_yet() -> None:
    plan = replace(language_plan(), kl=0.1)
    better = healed(Language(), plan)
    assert not same(better, plan)
    assert better.kl is None


def test_an_interrupted_search_resumes_after_the_last_finished_run(tmp_path: Path) -> None:
    given = nn.Sequential(Block(ffn(seed=0)), Block(ffn(seed=1))).eval()
    chosen = config(target_kl=0.01)
    whole = calibrate(given, batches(), config=chosen, checkpoint=tmp_path)
    runs = sorted(tmp_path.iterdir())
    written = [run.stat().st_mtime_ns for run in runs]
    assert len(runs) > 3
    runs[-1].unlink()
    assert contents(calibrate(given, batches(), config=chosen, checkpoint=tmp_path)) == contents(whole)
    assert sorted(tmp_path.iterdir()) == runs
    assert [run.stat().st_mtime_ns for run in runs[:-1]] == written[:-1]


class Sometimes(nn.Module):
    """Runs its second block only for long inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(ffn(seed=0)), Block(ffn(seed=1))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if len(x) > 100 else x


def test_a_site_that_only_a_later_held_back_batch_reaches_is_replaced_there_too() -> None:
    long, short = batches(15), inputs(90, 16, seed=3)
    plan = calibrate(Sometimes(), [*long, short, inputs(256, 16, seed=4)], config=config(target_kl=0.01))
    given = Sometimes()
    fast = rewrite_every_token(given, plan)
    with torch.no_grad():
        divergences = [kl_divergence(fast(x), given(x)) for x in (short, inputs(256, 16, seed=4))]
    assert len(plan.rewritten) == 2
    assert plan.kl is not None
    assert plan.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-3)
    assert not math.isclose(plan.kl, float(divergences[0].mean()), rel_tol=0.01)
