"""What the demo measures: quality on held-out text, and decoding speed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812

from tardis_fx.measure.decoding import cache_argument

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from tardis_fx.demo.model import DemoModel


@dataclass(frozen=True)
class Quality:
    """Quality of a model on a text.

    Attributes:
        perplexity: exponential of the mean loss per token.
        agreement: share of positions whose likeliest next token is the dense model's.
    """

    perplexity: float
    agreement: float


@torch.no_grad()
def logits(model: Callable[..., Any], windows: Tensor) -> Tensor:
    """Logits of every position, [windows, context, vocabulary], eight windows at a time."""
    return torch.cat([model(batch, use_cache=False).logits for batch in windows.split(8)])


def quality(found: Tensor, dense: Tensor, windows: Tensor) -> Quality:
    """Compares logits with the text and with the dense model's logits.

    Args:
        found: [windows, context, vocabulary].
        dense: of the same shape.
        windows: token ids, [windows, context].
    """
    loss = F.cross_entropy(found[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return Quality(float(loss.exp()), float((found.argmax(-1) == dense.argmax(-1)).double().mean()))


class Decoder:
    """Greedy decoding with a static cache: the prompt by the plain model, each step by a compiled one."""

    def __init__(self, demo: DemoModel, step: Callable[..., Any]) -> None:
        """Prepares a decoder.

        Args:
            demo: the plain model.
            step: what runs a step: the model, compiled.
        """
        self._demo, self._step = demo, step

    @torch.no_grad()
    def __call__(self, prompt: Tensor, tokens: int) -> tuple[Tensor, float]:
        """Continues a prompt.

        Args:
            prompt: token ids, [length].
            tokens: how many to add.

        Returns:
            The new token ids, [tokens], and seconds per token, the prompt's time not counted.
        """
        from transformers import StaticCache

        cache = StaticCache(config=self._demo.model.config, max_cache_len=self._demo.context)
        kept = {cache_argument(self._demo.model): cache}
        position = torch.arange(len(prompt), dtype=torch.int64, device="cpu")[None]
        token = self._demo.model(prompt[None], **kept, position_ids=position).logits[:, -1:].argmax(-1)
        found = [token]
        started = time.perf_counter()
        for i in range(len(prompt), len(prompt) + tokens - 1):
            position = torch.tensor([[i]], dtype=torch.int64, device="cpu")
            token = self._step(token, **kept, position_ids=position).logits.argmax(-1)
            found.append(token)
        return torch.cat(found, 1)[0], (time.perf_counter() - started) / (tokens - 1)
