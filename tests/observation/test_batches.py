"""What a user may give for a model and for batches, and which tokens count."""

import logging
import re
from typing import Any

import pytest
import torch
from builders import models
from builders.ffns import Block, batches, config, ffn, inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tardis_fx import CalibrationError, Config, ConfigError, TardisError, calibrate
from tardis_fx.observation.batches import MASKS, checked, real_tokens
from tardis_fx.testing.assertions import contents

IDS = models.tokens(4, 16)


class Tokenizer:
    """Makes batches."""

    def encode(self, text: str) -> list[int]:
        return [len(text)]


class Pipeline:
    """Holds a model."""

    model = ffn()


def used() -> Any:
    generator = (batch for batch in batches())
    assert list(generator)
    return generator


def failing(x: Tensor) -> Any:
    yield x
    raise OSError("the disk is gone")


MODELS: dict[str, tuple[Any, str]] = {
    "a name": ("gpt2", "not the name 'gpt2': load the model"),
    "a tokenizer": (Tokenizer(), "not Tokenizer: a tokenizer makes batches"),
    "a pipeline": (Pipeline(), "not Pipeline: pass its attribute .model"),
    "a class": (nn.Linear, "not Linear: make an instance"),
    "weights": (ffn().state_dict(), "load the weights into a model"),
    "nothing": (None, "not NoneType"),
    "without weights": (ffn().to("meta"), "on the meta device"),
}
BATCHES: dict[str, tuple[Any, str]] = {
    "ids of one dimension": ([IDS[0]], "shape [16], and the model takes [batch, tokens]: use ids[None]"),
    "named ids of one dimension": ([{"input_ids": IDS[0]}], "use ids[None]"),
    "rows of a tensor": (list(IDS), "use ids[None]"),
    "a tensor": (IDS, "wrap a single one in a list"),
    "lists": ([{"input_ids": IDS.tolist()}], "input_ids of batch 0 must be a tensor, not list"),
    "arrays": ([{"input_ids": IDS.numpy()}], "must be a tensor, not ndarray"),
    "a mask of lists": ([{"input_ids": IDS, "attention_mask": [[1] * 16] * 4}], "attention_mask of batch 0"),
    "text": ("some text", "not text: give it to a tokenizer"),
    "texts": (["some text", "more"], "not str: tokenize the text"),
    "unknown ids": ([IDS, IDS + 10**6], "batch 1 holds ids from"),
    "negative ids": ([IDS - 100], "use the model's own tokenizer"),
    "a used generator": (used(), "this generator is exhausted"),
    "no batches": ([], "no calibration batches"),
    "on the meta device": ([IDS.to("meta")], "the batch is on meta, the model on cpu"),
    "an argument that the model does not have": ([{"tokens": IDS}], "the model fails on batch 0: ValueError"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_model_is_named(name: str) -> None:
    model, cause = MODELS[name]
    with pytest.raises(CalibrationError, match=re.escape(cause)):
        calibrate(model, batches(), config=config())


@pytest.mark.parametrize("name", BATCHES)
def test_what_is_no_batch_is_named(name: str) -> None:
    given, cause = BATCHES[name]
    with pytest.raises(CalibrationError, match=re.escape(cause)):
        calibrate(models.gpt2(), given, config=config())


def test_an_option_of_a_rewrite_beside_the_config_is_sent_there() -> None:
    with pytest.raises(ConfigError, match=re.escape("config=Config(options={'predictor_bits': 3})")):
        calibrate(ffn(), batches(), predictor_bits=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["budget", "method", "allocation"])
def test_a_field_of_the_config_beside_it_is_sent_there(name: str) -> None:
    given: Any = {name: getattr(Config(), name)}
    with pytest.raises(ConfigError, match=re.escape(f"config=Config({name}={given[name]!r})")):
        calibrate(ffn(), batches(), **given)
    with pytest.raises(ConfigError, match="no argument buget"):
        calibrate(ffn(), batches(), buget=0.2)  # type: ignore[arg-type]


def test_an_error_of_the_batches_own_is_passed_on() -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        calibrate(ffn(), failing(batches()[0]), config=config())


def test_an_error_of_the_model_names_the_batch_and_is_the_cause() -> None:
    with pytest.raises(CalibrationError, match="the model fails on batch 2") as raised:
        calibrate(ffn(), [*batches(2), torch.zeros(8, 3)], config=config())
    assert raised.value.__cause__ is not None
    assert not isinstance(raised.value.__cause__, TardisError)


def test_ids_beside_an_image_are_the_models_own_business() -> None:
    assert checked(models.gpt2(), [{"input_ids": IDS + 10**6, "pixel_values": torch.zeros(4, 3, 8, 8)}])
    with pytest.raises(CalibrationError, match="own tokenizer"):
        checked(models.gpt2(), [{"input_ids": IDS + 10**6}])


def test_a_compiled_model_is_taken_for_what_it_was_compiled_from() -> None:
    model = Block(ffn())
    plan = calibrate(model, batches(), config=config())
    whole: Any = torch.compile(model, backend="eager")
    assert contents(calibrate(whole, batches(), config=config())) == contents(plan)
    model.compile(backend="eager")
    assert contents(calibrate(model, batches(), config=config())) == contents(plan)


# ---- Padding


def padded(side: str) -> tuple[Tensor, Tensor]:
    mask = torch.ones(4, 16, dtype=torch.long)
    for row, length in enumerate((16, 9, 5, 12)):
        mask[row, length:] = 0
    mask = mask if side == "right" else mask.flip(1)
    return torch.where(mask == 1, IDS, 0), mask


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", ["guarded_fold", "wanda"])
def test_padding_changes_nothing(side: str, method: str) -> None:
    """What stands at padding reaches no other token of the model, and so no statistic."""
    ids, mask = padded(side)
    other = torch.where(mask == 1, ids, 7)
    chosen = config(method=method, budget=0.6)
    one, two, unmasked = (
        calibrate(models.gpt2(), [{"input_ids": i, "attention_mask": m} for _ in range(2)], config=chosen)
        for i, m in ((ids, mask), (other, mask), (other, torch.ones_like(mask)))
    )
    assert contents(one) == contents(two)
    assert contents(one) != contents(unmasked)


def test_a_mask_that_is_not_understood_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    mask = torch.zeros(4, 1, 16, 16)
    with caplog.at_level(logging.WARNING, "tardis_fx"):
        checked(models.gpt2(), [{"input_ids": IDS, "attention_mask": mask}] * 3)
    assert [record.message for record in caplog.records if "attention_mask" in record.message] == [
        "attention_mask is not [batch, tokens] with 0 at padding and 1 elsewhere: padding counts as text"
    ]


@given(
    st.integers(1, 4), st.integers(1, 6), st.sampled_from([torch.long, torch.bool, torch.float32]), st.integers(0, 99)
)
def test_a_mask_speaks_of_tensors_of_its_own_shape_and_of_flat_ones(
    rows: int, length: int, dtype: torch.dtype, seed: int
) -> None:
    real = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    for name in MASKS:
        batch = {name: real.to(dtype)}
        for shape in ((rows, length), (rows * length,)):
            found = real_tokens(batch, shape)
            assert found is not None
            assert torch.equal(found, real.reshape(shape))
        assert real_tokens(batch, (rows, length + 1)) is None
        assert real_tokens(batch, (rows, length, 1)) is None
    assert real_tokens(inputs(rows, length), (rows, length)) is None
    both = {MASKS[0]: real, MASKS[1]: ~real}
    assert real_tokens(both, (rows, length)) is None, "which of them is meant?"
    assert real_tokens({MASKS[0]: real, MASKS[1]: torch.ones(rows, length + 1)}, (rows, length)) is not None


# ---- How much


def test_few_tokens_are_told_once_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tardis_fx"):
        calibrate(ffn(), batches(), config=config(target_error=0.3))
        assert [r.message for r in caplog.records if "tokens" in r.message] == [
            "calibrated on 1,024 tokens: with fewer than 2,048 the error on other text may be higher than the plan says; "
            "16,000 are a good number"
        ]
        caplog.clear()
        calibrate(ffn(), batches(8), config=config())
        assert not caplog.records


@pytest.mark.parametrize("sizes", [[1], [3], [7, 7, 7]], ids=str)
def test_without_a_held_back_token_there_is_no_plan(sizes: list[int]) -> None:
    with pytest.raises(CalibrationError, match=rf"\({sum(sizes)} tokens, so a rank of {min(16, sum(sizes))} at most"):
        calibrate(ffn(), [inputs(size, 16, seed=i) for i, size in enumerate(sizes)], config=config())
