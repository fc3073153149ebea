"""Reads information about vLLM's current step."""

from itertools import pairwise

from tardis_fx.errors import ServingError


def query_lengths(rows: int) -> list[int]:
    """Number of tokens of each request in this step, in the order of the rows.

    Runs without requests (vLLM's profiling and warm-up) count as one request of ``rows`` tokens.

    Raises:
        ServingError: the attention backend does not report where requests begin.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    metadata = get_forward_context().attn_metadata if is_forward_context_available() else None
    if not metadata:
        return [rows]
    starts = getattr(next(iter(metadata.values())), "query_start_loc", None) if isinstance(metadata, dict) else None
    if starts is None:
        raise ServingError(
            "vLLM's attention backend does not report which rows belong to which request: serve with "
            '"prefill": "rewritten" in --model-loader-extra-config'
        )
    return [end - start for start, end in pairwise(starts.tolist())]
