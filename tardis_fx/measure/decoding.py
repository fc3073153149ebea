"""Decoding at batch 1 with one compiled call per token, for timing."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch._inductor import config as inductor_config

from tardis_fx.errors import BenchError
from tardis_fx.measure.timing import seconds
from tardis_fx.observation.batches import uncompiled
from tardis_fx.observation.capture import own_code
from tardis_fx.plan import Plan


class Decoder:
    """Decodes with a static cache, greedily or along given tokens.

    Freezing is not an option of ``torch.compile``, because Dynamo also reads the setting at every compilation.
    """

    def __init__(
        self,
        model: Any,
        context: int,
        plan: Plan | Path | None = None,
        *,
        freezing: bool = False,
        mode: str | None = None,
    ) -> None:
        """Allocates the cache; the model is compiled at the first token.

        Args:
            model: a causal language model of transformers.
            context: tokens that the cache holds; attention reads all of it at every step.
            plan: of the model, or its file; None compiles the original model with Inductor.
            freezing: whether Inductor turns weights into constants that it packs.
            mode: of ``torch.compile``.
        """
        from transformers import StaticCache

        options: dict[str, Any] = {"mode": mode}
        if plan is not None:
            options = {"backend": "tardis", "options": {"plan": plan, "mode": mode, "select": "always"}}
        self._frozen: dict[str, Any] = {"freezing": True} if freezing else {}
        self._step: Callable[..., Tensor] = torch.compile(own_code(call_model), fullgraph=True, **options)
        self._model, self._device = model, model.device
        self.cache = StaticCache(config=model.config, max_cache_len=context)
        self._cache = {cache_argument(model): self.cache}
        self._positions = torch.arange(context, dtype=torch.int64, device=self._device)[:, None]
        if self._device.type == "cuda":  # a CUDA graph can only hold cache memory that exists before it is captured
            self._read(torch.zeros(1, dtype=torch.int64, device=self._device))

    def follow(self, tokens: Int64[Tensor, " tokens"]) -> float:
        """Seconds per step along given tokens, from an empty cache, so that every contender does the same work."""
        self.cache.reset()
        positions = self._positions[: len(tokens)]

        def run() -> None:
            for token, position in zip(tokens.view(-1, 1, 1), positions[:, None], strict=True):
                self._step(self._model, token, **self._cache, position_ids=position)

        return self._seconds(run) / len(tokens)

    def continue_text(self, prompt: Int64[Tensor, " length"], count: int) -> tuple[Int64[Tensor, " count"], float]:
        """Continues a prompt by a number of likeliest tokens; the model reads the prompt uncompiled.

        Returns:
            The new token ids, and seconds per token, without the prompt's time.
        """
        self.cache.reset()
        tokens = [self._read(prompt)[:, -1:].argmax(-1)]

        def run() -> None:
            for position in self._positions[len(prompt) : len(prompt) + count - 1, None]:
                logits = self._step(self._model, tokens[-1], **self._cache, position_ids=position)
                tokens.append(logits.argmax(-1))

        taken = self._seconds(run)
        return torch.cat(tokens, 1)[0], taken / (count - 1)

    @torch.no_grad()
    def _seconds(self, steps: Callable[[], None]) -> float:
        with inductor_config.patch(self._frozen):
            return seconds(steps, self._device)

    @torch.no_grad()
    def _read(self, prompt: Int64[Tensor, " length"]) -> Float[Tensor, "1 length vocabulary"]:
        positions = self._positions[: len(prompt)].T
        return call_model(self._model, prompt[None], **self._cache, position_ids=positions)


def call_model(
    model: Callable[..., Any], tokens: Int64[Tensor, "batch tokens"], **rest: Any
) -> Float[Tensor, "batch tokens vocabulary"]:
    """Logits; every decoder compiles a copy of this function."""
    logits: Tensor = model(tokens, **rest).logits
    return logits


def cache_argument(model: Any) -> str:
    """Name of the argument, and of the output's field, for the key-value cache of a model, compiled or not.

    transformers 5.24 renamed ``past_key_values`` to ``cache``.

    Raises:
        BenchError: the model's ``forward`` takes neither.
    """
    model = uncompiled(model)
    parameters = inspect.signature(model.forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    raise BenchError(f"{type(model).__name__}.forward takes no key-value cache: decoding step by step needs one")


def sample_tokens(model: Any, count: int, length: int, *, trained: bool) -> Int64[Tensor, "count length"]:
    """Sequences of tokens: random, or generated by a trained model."""
    shape = count, 1 if trained else length
    tokens = torch.randint(model.config.vocab_size, shape, dtype=torch.int64, device=model.device)
    if not trained:
        return tokens
    new = length - 1
    text: Tensor = model.generate(tokens, do_sample=True, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    return text
