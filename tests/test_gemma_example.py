"""The example with Gemma, on a tiny one with random weights: its rows of text, and that rewritten code runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders.gemma import BOS, LAYERS, gemma, text
from builders.scripts import load_script

from tardis_fx import Config, calibrate
from tardis_fx.errors import BenchError, CalibrationError
from tardis_fx.measure.quality import UNPREDICTED

example = load_script("examples/gemma.py")


@pytest.fixture(autouse=True)
def short_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "LENGTH", 40)


def letters(text: str, add_special_tokens: bool) -> Any:
    assert not add_special_tokens
    return SimpleNamespace(input_ids=[ord(letter) for letter in text])


def test_wikitext_becomes_ordinary_text() -> None:
    text = "It may grow to 0 @.@ 7 – 2 @,@ 000 cm ( 24 in ) , a <unk> lobster 's red @-@ tipped claws ; why ? Fine ."
    assert example.cleaned(text) == "It may grow to 0.7 – 2,000 cm (24 in), a lobster's red-tipped claws; why? Fine."


def test_half_of_a_file_calibrates_and_half_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("ab , cd")
    calibration, test = example.tokens(letters, file)
    assert [bytes(ids.tolist()).decode() for ids in (calibration, test)] == ["ab,", " cd"]
    with pytest.raises(CalibrationError, match="cannot read text from .*absent"):
        example.tokens(letters, tmp_path / "absent")
    calibration, test = example.tokens(letters, None)
    assert len(calibration) > len(test) > 100_000


def test_rows_begin_with_the_first_token_and_predict_the_next_one() -> None:
    ids = text(2000)
    rows = [example.rows(ids, 3, BOS, seed) for seed in (0, 1, 1, 2)]
    assert rows[0].shape == (3, 40)
    assert (rows[0][:, 0] == BOS).all()
    assert torch.equal(rows[0][0, 1:], ids[:39])
    assert torch.equal(rows[1], rows[2])
    assert not torch.equal(rows[2], rows[3])
    targets = example.targets(rows[0])
    assert torch.equal(targets[:, :-1], rows[0][:, 1:])
    assert (targets[:, -1] == UNPREDICTED).all()


def test_generate_computes_every_token_by_rewritten_ffns(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = gemma(), Config(budget=0.6, progress=False)
    plan = calibrate(model.model, example.rows(text(2000), 8, BOS).split(4), config=config)
    assert len(plan.rewritten) == LAYERS
    prompt = example.rows(text(2000, 1), 1, BOS)[:, : example.PROMPT]
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        continuation = example.continued(model, plan, prompt)
    assert continuation.shape == (1, example.PROMPT + example.NEW_TOKENS)
    assert torch.equal(continuation[:, : example.PROMPT], prompt)

    monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
    with pytest.raises(BenchError, match="0 tokens went through 0 rewritten FFNs, not 94"):
        example.continued(model, plan, prompt)
