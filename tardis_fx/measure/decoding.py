"""Decoding step by step, as it is timed."""

from __future__ import annotations

import inspect
import time
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor import config as inductor_config

from tardis_fx.errors import BenchError
from tardis_fx.measure.machine import wait
from tardis_fx.observation.batches import uncompiled
from tardis_fx.observation.capture import own_code

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Decoder:
    """Steps of one token each from an empty static cache; the tokens are given, so that all contenders do one job.

    Freezing is no option of ``torch.compile``: Dynamo reads the setting, too, and at every compilation.
    """

    def __init__(self, model: Any, tokens: Tensor, context: int, freezing: bool = False, **options: Any) -> None:
        from transformers import StaticCache

        self._frozen: dict[str, Any] = {"freezing": True} if freezing else {}
        self._step: Callable[..., Any] = torch.compile(own_code(call_model), fullgraph=True, **options)
        self._model, self._tokens = model, tokens
        self.cache = StaticCache(config=model.config, max_cache_len=context)
        self._cache = {cache_argument(model): self.cache}
        self._positions = torch.arange(len(tokens), dtype=torch.int64, device=tokens.device).view(-1, 1, 1)
        if tokens.is_cuda:  # memory of the cache that is there before a graph is compiled may be part of a CUDA graph
            with torch.no_grad():
                call_model(model, tokens[:1, None], **self._cache, position_ids=self._positions[0])

    @torch.no_grad()
    def __call__(self) -> float:
        """Seconds a step."""
        with inductor_config.patch(self._frozen):
            return self._seconds()

    def _seconds(self) -> float:
        self.cache.reset()
        steps = list(zip(self._tokens.view(-1, 1, 1), self._positions, strict=True))
        wait(self._tokens.device)
        started = time.perf_counter()
        for token, position in steps:
            self._step(self._model, token, **self._cache, position_ids=position)
        wait(self._tokens.device)
        return (time.perf_counter() - started) / len(steps)


def call_model(model: Callable[..., Any], tokens: Tensor, **rest: Any) -> Any:
    """Logits, [batch, tokens, vocabulary]; every decoder compiles a copy of this function."""
    return model(tokens, **rest).logits


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


def texts(model: Any, count: int, length: int, own: bool) -> Tensor:
    """Sequences of tokens, [count, length]: any, or what a trained model says by itself."""
    first = torch.randint(
        model.config.vocab_size, (count, 1 if own else length), dtype=torch.int64, device=model.device
    )
    if not own:
        return first
    new = length - 1
    found: Tensor = model.generate(first, do_sample=True, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
    return found
