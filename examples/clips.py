"""Clips of speech for Whisper, what the model hears in them, and the batches that teach a decoder what it heard."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from prose import spoken
from speech import speech
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperForConditionalGeneration

from tardis_fx.demo.corpus import Split
from tardis_fx.measure.quality import PADDING

#: Clips that are run at once, and the most tokens of a transcript.
BATCH, LONGEST = 8, 100

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Clips:
    """Clips of 30 seconds.

    Attributes:
        texts: that are spoken.
        features: [clips, mels, frames], in the model's dtype.
        heard: tokens of the dense model's transcripts, without those of the prompt and the end.
    """

    texts: list[str]
    features: Float[Tensor, "clips mels frames"]
    heard: list[list[int]]


def clips(model: WhisperForConditionalGeneration, split: Split, count: int, seed: int = 0) -> Clips:
    """Makes clips of text of a split, and has the model transcribe them."""
    texts = spoken(split, count, seed)
    features = speech(texts).to(model.dtype)
    return Clips(texts, features, transcribe(model, features))


@torch.no_grad()
def transcribe(model: WhisperForConditionalGeneration, features: Float[Tensor, "clips mels frames"]) -> list[list[int]]:
    """Tokens that the model hears in each clip, by greedy decoding with a key-value cache."""
    rows = [row for batch in features.split(BATCH) for row in model.generate(batch, max_new_tokens=LONGEST).tolist()]
    return [[token for token in row if token < model.config.eos_token_id] for row in rows]  # others are special


def prompt(model: WhisperForConditionalGeneration) -> list[int]:
    """Tokens before a transcript: English, without timestamps."""
    settings = model.generation_config
    language = [*settings.lang_to_id.values(), *settings.task_to_id.values()] if settings.is_multilingual else []
    return [settings.decoder_start_token_id, *language, settings.no_timestamps_token_id]


def batches(model: WhisperForConditionalGeneration, clips: Clips) -> list[Batch]:
    """The clips with their transcripts as the decoder's inputs."""
    rows = [torch.tensor(prompt(model) + tokens) for tokens in clips.heard]
    listed = []
    for i in range(0, len(rows), BATCH):
        tokens = rows[i : i + BATCH]
        listed.append(
            {
                "input_features": clips.features[i : i + BATCH],
                "decoder_input_ids": pad_sequence(tokens, batch_first=True, padding_value=model.config.eos_token_id),
                "decoder_attention_mask": pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True),
            }
        )
    return listed


def targets(model: WhisperForConditionalGeneration, batch: Batch) -> Int64[Tensor, "batch length"]:
    """The next token of the transcript at each position, the end included."""
    following = F.pad(batch["decoder_input_ids"][:, 1:], (0, 1), value=model.config.eos_token_id)
    following = following.where(batch["decoder_attention_mask"] == 1, PADDING)
    following[:, : len(prompt(model)) - 1] = PADDING
    return following


def logits(run: Callable[..., Any], batch: Batch) -> Float[Tensor, "batch length vocabulary"]:
    """Logits of a form of the model at every position of a batch."""
    computed: Tensor = run(**batch).logits
    return computed
