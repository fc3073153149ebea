"""Quality of a rewritten language model on a text, compared with the dense model."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from tardis_fx.observation.batches import Batch
from tardis_fx.plan import Plan
from tardis_fx.statistics.divergence import kl_divergence

#: Targets of positions that do not count at all, and of those without a next token, where only the logits count.
PADDING, UNPREDICTED = -1, -100
#: Number of tokens whose logits a head computes at a time.
BLOCK = 128


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
        self.dense, _ = _qualities(zip(_next_tokens(windows), self._logits, self._logits, strict=True))

    @torch.no_grad()
    def quality(self, run: Callable[..., Any]) -> Quality:
        """Quality of a rewritten form; losses are computed in float32 from logits in the model's dtype."""
        logits = _logits(run, self._windows)
        return _qualities(zip(_next_tokens(self._windows), self._logits, logits, strict=True))[1]


class HeadReference:
    """Batches and the dense model's outputs on them, from which a head makes the logits of a few tokens at a time.

    Logits over a large vocabulary would not fit in memory.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        targets: Sequence[Int64[Tensor, "_ _"]],
        outputs: Callable[[Callable[..., Any], Any], Float[Tensor, "batch length d"]],
        head: nn.Module,
    ) -> None:
        """Runs the dense model, in eval mode, on the batches.

        Args:
            model: the dense model.
            batches: inputs of the model.
            targets: [batch, length], the next token at each position of each batch, or ``PADDING``, or ``UNPREDICTED``.
            outputs: computes outputs of a form of the model for a batch.
            head: computes logits from outputs.
        """
        self._batches, self._outputs, self._head = batches, outputs, head
        self._real = [batch != PADDING for batch in targets]
        self._targets = [batch[real] for batch, real in zip(targets, self._real, strict=True)]
        self._dense = list(self._run(model))
        self.dense, _ = _qualities(self._blocks(self._dense))

    @torch.no_grad()
    def quality(self, run: Callable[..., Any]) -> Quality:
        """Quality of a rewritten form; losses are computed in float32 from logits in the model's dtype."""
        return _qualities(self._blocks(self._run(run)))[1]

    def _run(self, run: Callable[..., Any]) -> Iterator[Float[Tensor, "tokens d"]]:
        """Outputs of each batch at the positions that are not padding."""
        for batch, real in zip(self._batches, self._real, strict=True):
            yield self._outputs(run, batch)[real]

    def _blocks(self, outputs: Iterable[Float[Tensor, "_ d"]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in zip(self._targets, self._dense, outputs, strict=True):
            for targets, dense, rewritten in zip(*(tensor.split(BLOCK) for tensor in batch), strict=True):
                yield targets, self._head(dense), self._head(rewritten)


@torch.no_grad()
def compare_once(
    dense: Callable[..., Any], rewritten: Callable[..., Any], windows: Int64[Tensor, "windows length"]
) -> tuple[Quality, Quality]:
    """Quality of the dense model and of one rewritten form, with the logits of eight windows in memory at a time."""
    return _qualities(zip(_next_tokens(windows), _logits(dense, windows), _logits(rewritten, windows), strict=True))


def _next_tokens(windows: Int64[Tensor, "windows length"]) -> Iterable[Int64[Tensor, "_ length"]]:
    batches: Iterable[Int64[Tensor, "_ length"]] = F.pad(windows[:, 1:], (0, 1), value=UNPREDICTED).split(8)
    return batches


def _logits(
    run: Callable[..., Any], windows: Int64[Tensor, "windows length"]
) -> Iterable[Float[Tensor, "_ length vocabulary"]]:
    return (run(batch, use_cache=False).logits for batch in windows.split(8))


def _qualities(blocks: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Quality, Quality]:
    """Quality of the dense and of the rewritten model, from blocks of targets, dense logits and rewritten logits."""
    dense_loss = loss = kl = same = 0.0
    predicted = count = 0
    for targets, before, after in blocks:
        dense_loss += _loss(before, targets)
        loss += _loss(after, targets)
        kl += float(kl_divergence(after, before).sum())
        same += float((after.argmax(-1) == before.argmax(-1)).sum())
        predicted += int((targets != UNPREDICTED).sum())
        count += targets.numel()
    dense_loss, loss = dense_loss / predicted, loss / predicted
    return (
        Quality(math.exp(dense_loss), 0.0, 1.0, 0.0),
        Quality(math.exp(loss), math.expm1(loss - dense_loss), same / count, max(0.0, kl / count)),
    )


def _loss(logits: Float[Tensor, "*tokens vocabulary"], targets: Int64[Tensor, "*tokens"]) -> float:
    """Sum of the losses of the predicted tokens."""
    losses = F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=UNPREDICTED, reduction="sum"
    )
    return float(losses)


def rewrite_every_token(model: nn.Module, plan: Plan) -> Callable[..., Any]:
    """A model with every token on the rewritten path, run eagerly; resets earlier compilations."""
    torch.compiler.reset()  # otherwise Dynamo would count plans as recompilations of one model
    options: dict[str, Any] = {"plan": plan, "prefill": "rewritten", "select": "always", "inner": "eager"}
    return torch.compile(model, backend="tardis", options=options)
