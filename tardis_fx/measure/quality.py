"""Quality of a rewritten language model on a text, compared with the dense model."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tardis_fx.plan import Plan


@dataclass(frozen=True)
class Quality:
    """Quality of a model on a text.

    Attributes:
        perplexity: exponential of the mean loss per token.
        rise: increase of the perplexity relative to the dense model.
        agreement: share of positions with the same likeliest next token as the dense model.
        kl: KL(dense || rewritten), in nats per token.
    """

    perplexity: float
    rise: float
    agreement: float
    kl: float


class DenseReference:
    """A text and the dense model's logits on it, for comparison with rewritten forms of the model."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, windows: Int64[Tensor, "windows length"]) -> None:
        """Runs the dense model, in eval mode, on the text: eight windows at a time."""
        self._batches = windows.split(8)
        self._logits = list(self._run(model))
        self._loss = self._sums(self._logits)[0]
        self.dense = Quality(math.exp(self._loss), 0.0, 1.0, 0.0)

    @torch.no_grad()
    def quality(self, run: Callable[..., Any]) -> Quality:
        """Quality of a rewritten form; losses are computed in float32 from logits in the model's dtype."""
        loss, kl, agreement = self._sums(self._run(run))
        return Quality(math.exp(loss), math.expm1(loss - self._loss), agreement, kl)

    def _run(self, run: Callable[..., Any]) -> Iterable[Float[Tensor, "batch length vocabulary"]]:
        return (run(batch, use_cache=False).logits for batch in self._batches)

    def _sums(self, logits: Iterable[Float[Tensor, "batch length vocabulary"]]) -> tuple[float, float, float]:
        """Mean loss, mean KL divergence, and agreement."""
        loss = kl = same = 0.0
        for tokens, rewritten, dense in zip(self._batches, logits, self._logits, strict=True):
            log_q, log_p = rewritten.float().log_softmax(-1), dense.float().log_softmax(-1)
            loss += float(F.nll_loss(log_q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))
            kl += float(F.kl_div(log_q, log_p, reduction="sum", log_target=True))
            same += float((rewritten.argmax(-1) == dense.argmax(-1)).sum())
        count = sum(tokens.numel() for tokens in self._batches)
        predicted = count - sum(len(tokens) for tokens in self._batches)
        return loss / predicted, kl / count, same / count


def rewrite_every_token(model: nn.Module, plan: Plan) -> Callable[..., Any]:
    """A model with every token on the rewritten path, run eagerly; resets earlier compilations."""
    torch.compiler.reset()  # otherwise Dynamo would count plans as recompilations of one model
    options: dict[str, Any] = {"plan": plan, "prefill": "rewritten", "inner": "eager"}
    return torch.compile(model, backend="tardis", options=options)
