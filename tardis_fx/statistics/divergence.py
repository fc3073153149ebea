"""The Kullback-Leibler divergence of a rewritten model's distribution over tokens from the dense one's."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


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
    log_q, log_p = rewritten.float().log_softmax(-1), dense.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
