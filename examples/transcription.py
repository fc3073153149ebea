"""Times Whisper at batch 1 with a static cache: the encoder, a step of the decoder, and a whole transcription."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch._inductor import config as inductor_config
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
    WhisperForConditionalGeneration,
)

from tardis_fx import Plan
from tardis_fx.measure.decoding import cache_argument
from tardis_fx.measure.timing import Ratio, interleave, seconds
from tardis_fx.observation.capture import own_code

#: Tokens that the cache holds.
CONTEXT = 128


def timings(
    model: WhisperForConditionalGeneration,
    plan: Plan,
    features: Float[Tensor, "1 mels frames"],
    tokens: Int64[Tensor, " tokens"],
    rounds: int,
) -> list[dict[str, str]]:
    """Rows of a table: each form of the model decodes the same tokens of one clip, in interleaved rounds."""
    forms = {
        "Inductor": Transcriber(model),
        "Inductor, freezing": Transcriber(model, freezing=True),
        "tardis, exact encoder": Transcriber(model, plan, "original"),
        "tardis, exact encoder, freezing": Transcriber(model, plan, "original", freezing=True),
        "tardis": Transcriber(model, plan, "rewritten"),
    }
    runs: dict[str, Callable[[], float]] = {}
    for name, form in forms.items():
        runs[f"{name}: encoder"] = partial(form.listen, features)
        runs[f"{name}: step"] = partial(form.follow, tokens)
    times = interleave(runs, rounds)
    whole = {
        name: [e + len(tokens) * s for e, s in zip(times[f"{name}: encoder"], times[f"{name}: step"], strict=True)]
        for name in forms
    }
    return [
        {
            "": name,
            "encoder, ms": f"{1e3 * statistics.median(times[f'{name}: encoder']):.0f}",
            "decoder, ms a token": f"{1e3 * statistics.median(times[f'{name}: step']):.2f}",
            "decoding against Inductor": str(Ratio.between(times["Inductor: step"], times[f"{name}: step"])),
            "transcription against Inductor": str(Ratio.between(whole["Inductor"], whole[name])),
        }
        for name in forms
    ]


class Transcriber:
    """A form of Whisper that listens to a clip, and then decodes given tokens of it.

    In place of :class:`tardis_fx.measure.decoding.Decoder`, which knows no encoder.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        plan: Plan | None = None,
        prefill: str = "original",
        *,
        freezing: bool = False,
    ) -> None:
        """Compiles nothing before the first clip.

        Args:
            model: the dense model.
            plan: of the model; None means the original, compiled by Inductor.
            prefill: whether the encoder is ``"rewritten"``; a step of the decoder always is.
            freezing: whether Inductor packs the weights.
        """
        options: dict[str, Any] = {"fullgraph": True}
        if plan is not None:
            options |= {"backend": "tardis", "options": {"plan": plan, "prefill": prefill, "select": "always"}}
        self._encode, self._step = (torch.compile(own_code(part), **options) for part in (_encode, _step))
        self._model, self._frozen = model, {"freezing": True} if freezing else {}
        self._cache = EncoderDecoderCache(StaticCache(config=model.config, max_cache_len=CONTEXT), DynamicCache())

    @torch.no_grad()
    def listen(self, features: Float[Tensor, "1 mels frames"]) -> float:
        """Seconds for the encoder, and for the projections of its output that the decoder attends to."""

        def run() -> None:
            self._heard = self._encode(self._model, features)
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            start = torch.full((1, 1), self._model.config.decoder_start_token_id)
            _step(self._model, start, torch.zeros_like(start), self._heard, cache)
            self._cache.cross_attention_cache, self._cache.is_updated = cache.cross_attention_cache, cache.is_updated

        with inductor_config.patch(self._frozen):
            return seconds(run)

    @torch.no_grad()
    def follow(self, tokens: Int64[Tensor, " tokens"]) -> float:
        """Seconds per step along given tokens of the clip that was heard last."""
        self._cache.self_attention_cache.reset()

        def run() -> None:
            for position, token in enumerate(tokens.view(-1, 1, 1)):
                self._step(self._model, token, torch.tensor([[position]]), self._heard, self._cache)

        with inductor_config.patch(self._frozen):
            return seconds(run) / len(tokens)


def _encode(
    model: WhisperForConditionalGeneration, features: Float[Tensor, "1 mels frames"]
) -> Float[Tensor, "1 positions d"]:
    heard: Tensor = model.model.encoder(features).last_hidden_state
    return heard


def _step(
    model: WhisperForConditionalGeneration,
    token: Int64[Tensor, "1 1"],
    position: Int64[Tensor, "1 1"],
    heard: Float[Tensor, "1 positions d"],
    cache: Cache,
) -> Float[Tensor, "1 1 vocabulary"]:
    """Logits of the next token."""
    decoder = model.model.decoder
    cached = {cache_argument(decoder): cache}
    states = decoder(token, encoder_hidden_states=heard, position_ids=position, use_cache=True, **cached)
    logits: Tensor = model.proj_out(states.last_hidden_state)
    return logits
