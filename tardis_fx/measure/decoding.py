"""Decoding at batch 1, one compiled call a token, as it is timed."""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor import config as inductor_config

from tardis_fx.errors import BenchError
from tardis_fx.measure.timing import wait
from tardis_fx.observation.batches import uncompiled
from tardis_fx.observation.capture import own_code

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Decoder:
    """Decoding with a static cache, greedily or along given tokens.

    Freezing is no option of ``torch.compile``: Dynamo reads the setting, too, and at every compilation.
    """

    def __init__(self, model: Any, context: int, *, freezing: bool = False, **options: Any) -> None:
        """Makes the cache; the model is compiled at the first token.

        Args:
            model: a causal language model of transformers.
            context: tokens that the cache holds; attention reads all of it at every step.
            freezing: whether Inductor turns weights into constants that it packs.
            options: of ``torch.compile``.
        """
        from transformers import StaticCache

        self._frozen: dict[str, Any] = {"freezing": True} if freezing else {}
        self._step: Callable[..., Tensor] = torch.compile(own_code(call_model), fullgraph=True, **options)
        self._model, self._device = model, model.device
        self.cache = StaticCache(config=model.config, max_cache_len=context)
        self._cache = {cache_argument(model): self.cache}
        self._positions = torch.arange(context, dtype=torch.int64, device=self._device)[:, None]
        if self._device.type == "cuda":  # a CUDA graph may hold memory of the cache that is there before it is captured
            self._read(torch.zeros(1, dtype=torch.int64, device=self._device))

    @torch.no_grad()
    def follow(self, tokens: Tensor) -> float:
        """Seconds a step along given tokens, from an empty cache: every contender does the same work.

        Args:
            tokens: token ids, [steps].
        """
        self.cache.reset()
        with inductor_config.patch(self._frozen):
            wait(self._device)
            started = time.perf_counter()
            for token, position in zip(tokens.view(-1, 1, 1), self._positions[:, None], strict=False):
                self._step(self._model, token, **self._cache, position_ids=position)
            wait(self._device)
            return (time.perf_counter() - started) / len(tokens)

    @torch.no_grad()
    def continue_text(self, prompt: Tensor, count: int) -> tuple[Tensor, float]:
        """Continues a prompt, which the model reads uncompiled, with the likeliest tokens.

        Args:
            prompt: token ids, [length].
            count: tokens to add.

        Returns:
            The new token ids, [count], and seconds per token, without the prompt's time.
        """
        self.cache.reset()
        tokens = [self._read(prompt)[:, -1:].argmax(-1)]
        with inductor_config.patch(self._frozen):
            wait(self._device)
            started = time.perf_counter()
            for position in self._positions[len(prompt) : len(prompt) + count - 1, None]:
                step = self._step(self._model, tokens[-1], **self._cache, position_ids=position)
                tokens.append(step.argmax(-1))
            wait(self._device)
            return torch.cat(tokens, 1)[0], (time.perf_counter() - started) / (count - 1)

    @torch.no_grad()
    def _read(self, prompt: Tensor) -> Tensor:
        positions = self._positions[: len(prompt)].T
        return call_model(self._model, prompt[None], **self._cache, position_ids=positions)


def call_model(model: Callable[..., Any], tokens: Tensor, **rest: Any) -> Tensor:
    """Logits, [batch, tokens, vocabulary]; every decoder compiles a copy of this function."""
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


def sample_tokens(model: Any, count: int, length: int, *, trained: bool) -> Tensor:
    """Sequences of tokens, [count, length]: drawn at random, or written by a trained model itself."""
    first = torch.randint(
        model.config.vocab_size, (count, 1 if trained else length), dtype=torch.int64, device=model.device
    )
    if not trained:
        return first
    new = length - 1
    written: Tensor = model.generate(first, do_sample=True, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    return written
