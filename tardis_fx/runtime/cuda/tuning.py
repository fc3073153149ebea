# mypy: ignore-errors
"""Whether Triton interprets, and the spaces that its autotuner searches."""

import os

import triton

#: Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def space(*configs):
    """Configurations of (sizes, warps); the interpreter, which cannot time them, takes the last: the fewest steps."""
    return [triton.Config(sizes, num_warps=warps) for sizes, warps in (configs[-1:] if INTERPRETED else configs)]
