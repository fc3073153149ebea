from dataclasses import replace

import pytest
import torch
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.runtime.rotation import BLOCK, random_signs, rotate, rotate_back
from tardis_fx.testing.ffn import ACTIVATIONS

many = settings(max_examples=examples(50))
columns = st.one_of(st.integers(0, 300), st.sampled_from([0, 1, 2, 127, 128, 129, 255, 256, 257, 640]))
shapes = st.sampled_from([(), (0,), (1,), (5,), (2, 3)])
dtypes = st.sampled_from([torch.float32, torch.float64])
seeds = st.integers(0, 2**16)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix, orthonormal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), matrix)
    return matrix.mul(size**-0.5)


@many
@given(columns, seeds)
def test_a_rotation_is_the_signs_then_blocks_of_hadamard_matrices(d: int, seed: int) -> None:
    sizes = [BLOCK] * (d // BLOCK) + [2**k for k in range(6, -1, -1) if d % BLOCK >> k & 1]
    signs = random_signs(d, seed)
    matrix = torch.block_diag(*map(hadamard, sizes)) if sizes else torch.zeros(0, 0, dtype=torch.float64)
    x = normal(3, d, seed=seed)
    torch.testing.assert_close(rotate(x, signs), (x * signs) @ matrix)


@many
@given(shapes, columns, dtypes, seeds)
def test_a_rotation_keeps_norms_and_is_undone_to_rounding(
    shape: tuple[int, ...], d: int, dtype: torch.dtype, seed: int
) -> None:
    x, signs = normal(*shape, d, seed=seed, dtype=dtype), random_signs(d, seed)
    rotated = rotate(x, signs)
    assert (rotated.shape, rotated.dtype) == (x.shape, dtype)
    rounding = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=rounding, atol=rounding)
    for undone in (rotate_back(rotated, signs), rotate(rotate_back(x, signs), signs)):
        torch.testing.assert_close(undone, x, rtol=0, atol=rounding)


@given(columns, seeds)
def test_signs_are_the_same_for_the_same_seed_and_others_for_another(d: int, seed: int) -> None:
    signs = random_signs(d, seed)
    assert (signs.dtype, signs.shape) == (torch.int8, (d,))
    assert torch.all(signs.abs() == 1)
    assert torch.equal(signs, random_signs(d, seed))
    if d > 64:
        assert not torch.equal(signs, random_signs(d, seed + 1))


@pytest.mark.parametrize("column", [0, 1, 200, 639])
def test_one_large_column_becomes_a_block_of_equal_ones(column: int) -> None:
    x = torch.zeros(640)
    x[column] = 1000
    rotated, block = rotate(x, random_signs(640, 0)).abs(), column // BLOCK
    torch.testing.assert_close(rotated[BLOCK * block : BLOCK * (block + 1)], torch.full((BLOCK,), 1000 * BLOCK**-0.5))
    assert rotated.count_nonzero() == BLOCK


@many
@given(
    st.sampled_from([1, 12, 130, 192]), st.sampled_from([1, 17, 136]), st.booleans(), st.booleans(),
    st.sampled_from(ACTIVATIONS), dtypes, seeds,
)  # fmt: skip
def test_the_rotated_ffn_is_the_ffn(
    d: int, d_out: int, gated: bool, biased: bool, activation: str, dtype: torch.dtype, seed: int
) -> None:
    def drawn(*shape: int, number: int) -> Tensor:
        return normal(*shape, seed=seed + number, dtype=dtype).div(shape[-1] ** 0.5)

    bias = {"up_bias": drawn(24, number=1), "down_bias": drawn(d_out, number=2)} if biased else {}
    gate = {"gate": drawn(24, d, number=3), "gate_bias": bias.get("up_bias")} if gated else {}
    missing = {"up_bias": None, "down_bias": None}
    original = SiteWeights(up=drawn(24, d, number=4), down=drawn(d_out, 24, number=5), **{**missing, **bias, **gate})
    signs, out_signs = random_signs(d, seed), random_signs(d_out, seed + 1)
    rotated = replace(
        original,
        up=rotate(original.up, signs),
        down=rotate(original.down.T, out_signs).T,
        gate=None if original.gate is None else rotate(original.gate, signs),
        down_bias=None,
    )
    x = normal(7, d, seed=seed + 6, dtype=dtype)
    output = rotate_back(dense(rotate(x, signs), matrices(rotated) | biases(rotated), activation), out_signs)
    if original.down_bias is not None:
        output = output + original.down_bias
    rounding = 1e3 * torch.finfo(dtype).eps
    expected = dense(x, matrices(original) | biases(original), activation)
    torch.testing.assert_close(output, expected, rtol=rounding, atol=rounding)
