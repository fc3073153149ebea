"""How far the output of a rewritten model is from the dense model's."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.utils import _pytree as pytree

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.batches import Batch, real_tokens

#: Positions whose probabilities are in memory together.
TOGETHER = 256


def logits_of(output: Any) -> Tensor | None:
    """The logits in a model's output, or None: an item or attribute ``logits``, or the output itself if it is a tensor.

    Logits are floating-point, [..., classes].
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) and logits.is_floating_point() and logits.dim() > 1 else None


def kl_divergence(
    rewritten: Float[Tensor, "*tokens classes"], dense: Float[Tensor, "*tokens classes"]
) -> Float[Tensor, "*tokens"]:
    """KL(dense || rewritten) of each position, in nats, computed in float32 from logits."""
    pairs = zip(*(logits.reshape(-1, logits.shape[-1]).split(TOGETHER) for logits in (rewritten, dense)), strict=True)
    return torch.cat([_kl_divergence(*pair) for pair in pairs]).view(dense.shape[:-1])


def _kl_divergence(
    rewritten: Float[Tensor, "tokens classes"], dense: Float[Tensor, "tokens classes"]
) -> Float[Tensor, " tokens"]:
    log_q, log_p = rewritten.float().log_softmax(-1), dense.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def divergence(output: Any, dense: Any, batch: Batch) -> Float[Tensor, ""]:
    """Divergence of a rewritten model's output from that of the dense model for a batch.

    For outputs with an attribute or item ``logits``, it is the Kullback-Leibler divergence of the rewritten from the
    dense distribution, in nats per position; otherwise the mean squared error of the first floating-point tensor.
    Padding does not count.

    Raises:
        CalibrationError: the output has no floating-point tensor.
    """
    logits, moved = logits_of(dense), logits_of(output)
    if logits is not None and moved is not None and not isinstance(dense, Tensor):  # alone, it may hold hidden states
        errors = kl_divergence(moved, logits)
    else:
        errors = F.mse_loss(_first(output).float(), _first(dense).float(), reduction="none")
        errors = errors.mean(-1) if errors.dim() > 1 else errors
    real = real_tokens(batch, errors.shape)
    return errors.mean() if real is None else errors[real.to(errors.device)].mean()


def _first(output: Any) -> Tensor:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf
    raise CalibrationError(f"the model returns {type(output).__name__} without any floating-point tensor to match")
