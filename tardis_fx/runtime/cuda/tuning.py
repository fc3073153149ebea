# mypy: ignore-errors
"""Search spaces of Triton's autotuner, and whether kernels run in Triton's interpreter."""

import os

import triton

#: Whether kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def space(*configs):
    """Autotuner configurations of (sizes, warps); the interpreter takes the last one, which has the fewest steps."""
    return [triton.Config(sizes, num_warps=warps) for sizes, warps in (configs[-1:] if INTERPRETED else configs)]
