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
from tardis_fx.statistics.divergence import kl_divergence


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
        self._windows = windows
        self._logits = list(_logits(model, windows))
        self.dense, _ = _qualities(windows, self._logits, self._logits)

    @torch.no_grad()
    def quality(self, run: Callable[..., Any]) -> Quality:
        """Quality of a rewritten form; losses are computed in float32 from logits in the model's dtype."""
        return _qualities(self._windows, self._logits, _logits(run, self._windows))[1]


@torch.no_grad()
def compare_once(
    dense: Callable[..., Any], rewritten: Callable[..., Any], windows: Int64[Tensor, "windows length"]
) -> tuple[Quality, Quality]:
    """Quality of the dense model and of one rewritten form, with the logits of eight windows in memory at a time."""
    return _qualities(windows, _logits(dense, windows), _logits(rewritten, windows))


def _logits(
    run: Callable[..., Any], windows: Int64[Tensor, "windows length"]
) -> Iterable[Float[Tensor, "_ length vocabulary"]]:
    return (run(batch, use_cache=False).logits for batch in windows.split(8))


def _qualities(
    windows: Int64[Tensor, "windows length"],
    dense: Iterable[Float[Tensor, "_ length vocabulary"]],
    rewritten: Iterable[Float[Tensor, "_ length vocabulary"]],
) -> tuple[Quality, Quality]:
    """Quality of the dense and of the rewritten model from the logits of their batches."""
    dense_loss = loss = kl = same = 0.0
    for tokens, before, after in zip(windows.split(8), dense, rewritten, strict=True):
        dense_loss += _loss(before, tokens)
        loss += _loss(after, tokens)
        kl += float(kl_divergence(after, before).sum())
        same += float((after.argmax(-1) == before.argmax(-1)).sum())
    predicted, count = windows[:, 1:].numel(), windows.numel()
    dense_loss, loss = dense_loss / predicted, loss / predicted
    return (
        Quality(math.exp(dense_loss), 0.0, 1.0, 0.0),
        Quality(math.exp(loss), math.expm1(loss - dense_loss), same / count, max(0.0, kl / count)),
    )


def _loss(logits: Float[Tensor, "batch length vocabulary"], tokens: Int64[Tensor, "batch length"]) -> float:
    """Sum of the losses of the next tokens."""
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum"))


def rewrite_every_token(model: nn.Module, plan: Plan) -> Callable[..., Any]:
    """A model with every token on the rewritten path, run eagerly; resets earlier compilations."""
    torch.compiler.reset()  # otherwise Dynamo would count plans as recompilations of one model
    options: dict[str, Any] = {"plan": plan, "prefill": "rewritten", "inner": "eager"}
    return torch.compile(model, backend="tardis", options=options)
