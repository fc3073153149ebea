"""Chooses the requests of a step that are rewritten if a plan leaves prefill to the original."""

from collections.abc import Sequence


def decoding(lengths: Sequence[int], limit: int) -> list[bool]:
    """Marks the requests that are rewritten; the others take the original FFN.

    An engine with continuous batching puts prompts and decoding requests into one step. So the rule for a whole batch
    (few tokens are rewritten, many are not) is applied to the requests with few tokens, regardless of the prompts in
    the same step. If these requests have more than ``limit`` tokens together, reading the weights once is cheaper than
    correcting row by row, and every request takes the original.

    Args:
        lengths: tokens of each request in the step.
        limit: maximum number of tokens of a decode step (:func:`tardis_fx.passes.pipeline.decode_tokens`).
    """
    few = [length <= limit for length in lengths]
    rows = sum(length for length, small in zip(lengths, few, strict=True) if small)
    return few if rows <= limit else [False] * len(few)
