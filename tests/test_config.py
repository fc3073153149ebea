"""The config and the options of rewrites."""

import re
from dataclasses import asdict
from typing import Any

import pytest
import torch
from builders.ffns import batches
from torch import Tensor, nn

from tardis_fx import Config, ConfigError, calibrate


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget": 0}, {"budget": -0.1}, {"budget": 1.01}, {"budget": torch.nan}, {"budget": torch.inf}, {"budget": "0.2"},
        {"budget": True}, {"method": ""}, {"method": 3}, {"prefill": "exact"}, {"prefill": None},
        {"sequential": 1}, {"sequential": None}, {"progress": "no"}, {"options": 3}, {"options": {"guarded_fold": 3, "a": {}}},
        {"options": {3: 2}}, {"options": ["fold_bits"]}, {"options": {"paper": {"fold_bits": 3}}},
        {"options": {"guarded_fold": {"fold_bits": [3]}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_its_range_is_a_config_error_that_names_field_and_value(wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=name) as raised:
        Config(**wrong)
    assert str(value) in str(raised.value) or name == "options"


class Untouched(nn.Module):
    """Must not run."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the model runs")


WRONG_OPTIONS: list[dict[str, Any]] = [
    {"predictor_bits": 0}, {"predictor_bits": 9}, {"predictor_bits": 16}, {"predictor_bits": True}, {"predictor_bits": "2"},
    {"fold_bits": 2}, {"fold_bits": 32}, {"row_bits": 2}, {"row_bits": True}, {"group_size": 16}, {"group_size": 256}, {"fold_bits": 4.0}, {"group_size": 64.0},
    {"rounding": "up"}, {"rounding": None},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_OPTIONS, ids=str)
@pytest.mark.parametrize("method", ["guarded_fold", "paper"])
def test_so_is_an_option_of_a_rewrite_before_the_model_runs(method: str, wrong: dict[str, Any]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=name) as raised:
        calibrate(Untouched(), batches(), config=Config(method=method, options=wrong))
    assert str(value) in str(raised.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"method": "guarded_fold", "options": {"bits": 3}},
            "guarded_fold has no option 'bits': it has predictor_bits, fold_bits",
        ),
        ({"method": "wanda", "options": {"fold_bits": 3}}, "wanda has no option 'fold_bits': it has none"),
        ({"method": "drop_bias+low_rank", "options": {"fold_bits": 3}}, "go by rewrite unless method names one"),
        ({"method": {"*": None}, "options": {"fold_bits": 3}}, "go by rewrite unless method names one"),
        ({"method": "wanda", "options": {"ria": {}}}, "'ria' is not a rewrite of method, which names wanda"),
        ({"bugdet": 0.3}, "unknown option 'bugdet': the options are budget, bits, target_error, target_kl"),
        ({"fold_bits": 3, "group_size": 64}, "give method and options={'fold_bits': 3, 'group_size': 64}"),
    ],
)
def test_an_option_that_nobody_has_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        calibrate(Untouched(), batches(), config=Config(**given))


def test_options_go_by_rewrite_where_there_are_several() -> None:
    given = Config(method={"0": "drop_bias+guarded_fold", "*": "paper"}, options={"guarded_fold": {"fold_bits": 3}})
    assert given.options_of("guarded_fold") == {"fold_bits": 3}
    assert given.options_of("paper") == given.options_of("drop_bias") == {}
    assert given.with_options("paper", row_bits=8).options_of("paper") == {"row_bits": 8}
    assert Config(method="guarded_fold", options={"row_bits": 3}) == Config(
        method="guarded_fold", options={"guarded_fold": {"row_bits": 3}}
    )
    assert hash(given) == hash(Config(**asdict(given)))


def test_configs_take_keywords_only() -> None:
    with pytest.raises(TypeError):
        Config(0.2)  # type: ignore[misc]
    assert Config(budget=1).budget == 1
