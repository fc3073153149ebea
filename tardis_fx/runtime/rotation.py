"""Rotations by random signs and Hadamard matrices, which spread large weights and activations over many columns.

The signs come first; then each block of columns is multiplied by an orthonormal Hadamard matrix, ``log2(128)``
additions for each number. Blocks have 128 columns; the columns that are left form blocks of falling powers of two
(QuIP#, arXiv 2402.04396, and QuaRot, arXiv 2404.00456, rotate likewise).
"""

from collections.abc import Iterator
from functools import cache

import torch
from jaxtyping import Float, Float32, Float64, Int8
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


def rotate_in_order(x: Float32[Tensor, "rows d"], signs: Int8[Tensor, " d"]) -> Float32[Tensor, "rows d"]:
    """Rotates vectors with additions in the order of the C++, so that both give the same bits."""
    x, blocks = x * signs.to(x.dtype), []
    for start, count, size in _blocks(x.shape[-1]):
        block = x[:, start : start + count * size]
        half = 1
        while half < size:
            low, high = block.unflatten(1, (-1, 2, half)).unbind(2)
            block = torch.stack([low + high, low - high], 2).flatten(1)
            half *= 2
        blocks.append(block * size**-0.5)
    return torch.cat(blocks, 1) if blocks else x


def multiplications(d: int) -> int:
    """Number of multiplications of a rotation of ``d`` columns."""
    return sum(count * size**2 for _, count, size in _blocks(d))


def _transform(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """Multiplies every block by its Hadamard matrix, which is its own inverse."""
    blocks = []
    for start, count, size in _blocks(x.shape[-1]):
        columns = x[..., start : start + count * size].unflatten(-1, (count, size))
        blocks.append((columns @ _hadamard(size).to(x.device, x.dtype)).flatten(-2))
    return torch.cat(blocks, -1) if blocks else x


@cache
def _hadamard(size: int) -> Float64[Tensor, "{size} {size}"]:
    """The orthonormal Hadamard matrix of a power of two, by Sylvester's construction."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    scaled: Tensor = matrix * size**-0.5
    return scaled


def _blocks(d: int) -> Iterator[tuple[int, int, int]]:
    """Start, number and size of blocks of one size."""
    start, size = 0, BLOCK
    while start < d:
        if count := (d - start) // size:
            yield start, count, size
            start += count * size
        size //= 2
