"""Speech made of text by espeak-ng, as features for Whisper, and the word error rate of a transcript."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import Tensor
from transformers import WhisperFeatureExtractor

from tardis_fx.errors import BenchError

RATE = 16_000
#: Options of espeak-ng: 150 words a minute, with gaps of 50 ms, which halve tiny.en's mistakes.
_VOICE = ("-v", "en-us", "-s", "150", "-g", "5")


def speech(texts: Sequence[str]) -> Float[Tensor, "clips mels frames"]:
    """Whisper's features of texts as espeak-ng reads them out, 30 seconds each.

    Raises:
        BenchError: espeak-ng is not installed.
    """
    extractor = WhisperFeatureExtractor(feature_size=80)
    sounds = [_read_out(text) for text in texts]
    features: Tensor = extractor(sounds, sampling_rate=RATE, return_tensors="pt").input_features
    return features


def _read_out(text: str) -> Float[np.ndarray, " samples"]:
    """Sound of a text."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise BenchError("espeak-ng, which makes the speech, is not installed: try apt install espeak-ng")
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "speech.wav"))
        subprocess.run([program, *_VOICE, "-w", file, "--", text], check=True)
        rate, sound = wavfile.read(file)
    resampled: Float[np.ndarray, " samples"] = resample_poly(sound / np.float32(2**15), RATE, rate)
    return resampled


def word_errors(texts: Sequence[str], transcripts: Sequence[str]) -> float:
    """Words that are inserted, left out or replaced in transcripts, as a share of the words of the texts."""
    errors = words = 0
    for text, transcript in zip(texts, transcripts, strict=True):
        said, heard = _words(text), _words(transcript)
        row = list(range(len(heard) + 1))  # edit distance of the words so far to each beginning of the transcript
        for i, word in enumerate(said, 1):
            diagonal, row[0] = row[0], i
            for j, other in enumerate(heard, 1):
                diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other))
        errors, words = errors + row[-1], words + len(said)
    return errors / words


def _words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())
