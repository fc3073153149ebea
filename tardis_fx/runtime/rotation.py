"""Rotations by random signs and Hadamard matrices, which spread large weights and activations over many columns.

The signs come first; then each block of columns is multiplied by an orthonormal Hadamard matrix, ``log2(128)``
additions for each number. Blocks have 128 columns; the columns that are left form blocks of falling powers of two
(QuIP#, arXiv 2402.04396, and QuaRot, arXiv 2404.00456, rotate likewise).
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int8
from torch import Tensor

#: Columns of a block.
BLOCK = 128


def random_signs(d: int, seed: int) -> Int8[Tensor, " {d}"]:
    """Random signs for ``d`` columns, the same for the same seed."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return 1 - 2 * torch.randint(0, 2, (d,), generator=generator, dtype=torch.int8, device="cpu")


def rotate(x: Float[Tensor, "*rows d"], signs: Int8[Tensor, " d"]) -> Float[Tensor, "*rows d"]:
    """Rotates vectors: the signs, then the Hadamard matrices."""
    return _transform(x * signs.to(x.dtype))


def rotate_back(x: Float[Tensor, "*rows d"], signs: Int8[Tensor, " d"]) -> Float[Tensor, "*rows d"]:
    """The inverse of :func:`rotate`."""
    return _transform(x) * signs.to(x.dtype)


def _transform(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """Multiplies every block by its Hadamard matrix, which is its own inverse."""
    blocks = []
    for start, size in _blocks(x.shape[-1]):
        block = x[..., start : start + size]
        half = 1
        while half < size:
            pairs = block.reshape(*x.shape[:-1], size // (2 * half), 2, half)
            low, high = pairs.unbind(-2)
            block = torch.stack([low + high, low - high], -2).reshape(*x.shape[:-1], size)
            half *= 2
        blocks.append(block * size**-0.5)
    return torch.cat(blocks, -1) if blocks else x


def _blocks(d: int) -> Iterator[tuple[int, int]]:
    """Start and size of every block."""
    start = 0
    while start < d:
        size = min(BLOCK, 1 << (d - start).bit_length() - 1)
        yield start, size
        start += size
