"""Which requests of a step are rewritten, where a plan leaves prefill to the original."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def decoding(lengths: Sequence[int], limit: int) -> list[bool]:
    """Which requests take fold and correction; the others take the original FFN.

    An engine with continuous batching puts prompts and decoding requests into one step, so the rule of a whole batch,
    few tokens are rewritten and many are not, is applied to the requests that bring few, however long the prompts
    beside them are. Where they bring more than ``limit`` tokens together, reading the weights once is cheaper than
    correcting row by row, and every request takes the original.

    Args:
        lengths: tokens that each request brings to the step.
        limit: most tokens that count as decoding (:func:`tardis_fx.passes.pipeline.decode_tokens`).
    """
    few = [length <= limit for length in lengths]
    rows = sum(length for length, small in zip(lengths, few, strict=True) if small)
    return few if rows <= limit else [False] * len(few)
