"""The examples with Whisper, on a tiny one with random weights: what the decoder is taught, and that rewritten code runs."""

import shutil
from typing import Any

import pytest
import torch
from builders.scripts import load_script
from builders.whisper import END, LAYERS, NO_TIMESTAMPS, POSITIONS, START, features, whisper

from tardis_fx import Plan, calibrate
from tardis_fx.errors import BenchError
from tardis_fx.measure.quality import PADDING
from tardis_fx.runtime.touched import count_touched

pytest.importorskip("tokenizers")
prose = load_script("examples/prose.py")
speech = load_script("examples/speech.py")
clips = load_script("examples/clips.py")
transcription = load_script("examples/transcription.py")
example = load_script("examples/whisper.py")


@pytest.fixture(scope="module")
def model() -> Any:
    return whisper()


@pytest.fixture(scope="module")
def heard(model: Any) -> Any:
    sound = features(10)
    return clips.Clips([""] * 10, sound, clips.transcribe(model, sound))


@pytest.fixture(scope="module")
def plan(model: Any, heard: Any) -> Plan:
    return calibrate(model, clips.batches(model, heard), config=example.tardis_fx.Config(budget=0.5, prefill="rewritten", progress=False))  # fmt: skip


def test_the_decoder_is_taught_what_the_model_hears(model: Any, heard: Any) -> None:
    batches = clips.batches(model, heard)
    assert [len(batch["input_features"]) for batch in batches] == [8, 2]
    rows = [row for batch in batches for row in zip(clips.targets(model, batch), batch["decoder_input_ids"], clips.logits(model, batch), strict=True)]  # fmt: skip
    for (target, given, logits), transcript in zip(rows, heard.heard, strict=True):
        assert transcript
        assert given[: 2 + len(transcript)].tolist() == [START, NO_TIMESTAMPS, *transcript]
        assert target[0] == PADDING
        assert target[target != PADDING].tolist() == [*transcript, END]
        likeliest = logits[:, : END + 1].argmax(-1)
        assert likeliest[1 : 1 + len(transcript)].tolist() == transcript


def test_generate_computes_every_token_by_rewritten_ffns(model: Any, heard: Any, plan: Plan) -> None:
    rewritten = example.compile_parts(model, plan, inner="eager")
    with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
        tokens = example.check_generate(rewritten, plan, heard.features[:1])
    assert tokens > LAYERS * (POSITIONS + 20)


def test_a_generate_that_runs_the_original_is_an_error(model: Any, heard: Any, plan: Plan) -> None:
    options: Any = {"plan": plan, "inner": "eager"}
    for original in (model, torch.compile(model, backend="tardis", options=options)):
        with pytest.raises(BenchError, match="0 tokens went through 0 rewritten FFNs"):
            example.check_generate(original, plan, heard.features[:1])


def test_a_transcription_runs_rewritten_code_and_gives_the_models_logits(
    model: Any, heard: Any, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = transcription.Transcriber(model, plan, "rewritten")
    tokens = torch.tensor([START, NO_TIMESTAMPS, *heard.heard[0]])
    with count_touched() as touched:
        form.listen(heard.features[:1])
        form.follow(tokens)
    assert touched.tokens == LAYERS * (POSITIONS + len(tokens))

    dense, logits = transcription.Transcriber(model), []
    monkeypatch.setattr(dense, "_encode", transcription._encode)
    monkeypatch.setattr(dense, "_step", lambda *args: logits.append(transcription._step(*args)))
    for _ in range(2):  # the second clip and its tokens find nothing of the first
        logits.clear()
        dense.listen(heard.features[:1])
        dense.follow(tokens)
    with torch.no_grad():
        expected = model(input_features=heard.features[:1], decoder_input_ids=tokens[None]).logits
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-3, atol=1e-3)


def test_word_errors_count_insertions_omissions_and_replacements() -> None:
    assert speech.word_errors(["One two, three.", "four"], ["one two THREE!", "four"]) == 0
    assert speech.word_errors(["a b c d"], ["a x c"]) == 2 / 4
    assert speech.word_errors(["a"], ["b a c"]) == 2
    assert speech.word_errors(["a b", "c d"], ["", "c d"]) == 2 / 4


def test_spoken_text_is_plain_and_differs_by_seed_and_split() -> None:
    texts = prose.spoken("calibration", 8)
    assert len(texts) == 8
    assert all(text.replace(",", "").replace(".", "").replace("-", "").replace(" ", "").isalpha() for text in texts)
    drawn = [prose.spoken("calibration", 8, seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]).isdisjoint(prose.spoken("test", 64))


def test_without_espeak_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(BenchError, match="apt install espeak-ng"):
        speech.speech(["A sentence."])
