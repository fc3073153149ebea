"""Arguments, batches, models and plans that healing refuses."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders.ffns import Block, batches, entries, ffn, planned
from builders.healing import TEXT, Language, healed, language_plan
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from tardis_fx import (
    CalibrationError,
    ConfigError,
    Plan,
    PlanMismatchError,
    StaleWeightError,
)
from tardis_fx.healing import student
from tardis_fx.passes.hot_fold import HotFold


@pytest.fixture(scope="module")
def pair() -> tuple[Language, Plan]:
    model = Language()
    return model, language_plan()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"plan": 3}, "plan"),
    ],
)
def test_arguments_out_of_range_are_named(pair: tuple[Language, Plan], wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        healed(pair[0], **({"plan": pair[1]} | wrong))


@pytest.mark.parametrize(
    ("given", "said"),
    [([], "no calibration batches"), (TEXT[:1], "two batches"), (TEXT[0], "iterable"), (3, "iterable")],
)
def test_batches_that_will_not_do_are_refused(pair: tuple[Language, Plan], given: Any, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        healed(*pair, given)


def test_a_model_in_training_mode_is_refused(pair: tuple[Language, Plan]) -> None:
    with pytest.raises(CalibrationError, match="training mode"):
        healed(copy.deepcopy(pair[0]).train(), pair[1])


def test_a_loss_that_is_no_number_names_the_batch() -> None:
    model = nn.Sequential(Block(ffn(seed=1))).eval()
    plan = planned(model)
    for at, said in ((1, "batch 1"), (-1, "tuning split")):
        given = batches()
        given[at] = torch.full_like(given[at], torch.nan)
        with pytest.raises(CalibrationError, match=said):
            healed(model, plan, given)


def test_a_plan_for_another_model_is_refused(pair: tuple[Language, Plan]) -> None:
    changed = copy.deepcopy(pair[0])
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(1)
    with pytest.raises((PlanMismatchError, StaleWeightError), match="sites"):
        healed(changed, pair[1])


def test_a_rewrite_that_cannot_be_healed_is_named(pair: tuple[Language, Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = pair
    only_exact = Plan(tuple(replace(site, method="exact_fold") for site in entries(plan)), plan.config)
    with pytest.raises(ConfigError, match="no site to heal"):
        healed(model, only_exact)
    monkeypatch.setattr(student, "rewrite_of", lambda _: HotFold())
    with pytest.raises(ConfigError, match="'dropping', which cannot be healed"):
        healed(model, Plan(tuple(replace(site, method="dropping") for site in entries(plan)), plan.config))


def test_a_batch_that_misses_a_site_is_refused(pair: tuple[Language, Plan]) -> None:
    class Half(Language):
        def forward(self, ids: Tensor, *, whole: bool = True) -> CausalLMOutput:
            x = self.embedding(ids)
            return CausalLMOutput(logits=self.head(self.blocks(x) if whole else self.blocks[0](x)))

    given = [{"ids": TEXT[0], "whole": False}, {"ids": TEXT[1]}]
    with pytest.raises(CalibrationError, match=r"no gradient reached blocks\.1\.ffn"):
        healed(Half(), pair[1], given)


def test_a_failed_healing_leaves_gradients_as_they_were(pair: tuple[Language, Plan]) -> None:
    model = copy.deepcopy(pair[0])
    with pytest.raises(PlanMismatchError):
        healed(model, planned(ffn(8, 32), 8))
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(TEXT[0]).logits.sum().backward()
    assert model.head.weight.grad is not None
