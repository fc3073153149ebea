import pytest
import torch
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.runtime.tables import PEAKS, join, levels, row_bytes, scales, weights

every_width = pytest.mark.parametrize("bits", range(1, 9))
many = settings(max_examples=examples(100))
columns_of_interest = st.one_of(st.integers(1, 200), st.sampled_from([1, 63, 64, 65, 127, 128, 129, 193]))

#: A Gaussian variable on a fine grid.
GRID = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
DENSITY = torch.softmax(-(GRID**2) / 2, 0)
FAR = GRID[-1:]


def squared_error(table: Tensor) -> float:
    """Mean squared error of a Gaussian variable that is rounded to a table."""
    return float(DENSITY @ (GRID - table[torch.bucketize(GRID, (table[1:] + table[:-1]) / 2)]).square())


@every_width
def test_levels_rise_symmetrically_in_multiples_of_what_a_kernel_looks_up(bits: int) -> None:
    table = levels(bits)
    assert (table.dtype, len(table)) == (torch.float32, 2**bits)
    assert torch.all(table.diff() > 0)
    assert torch.equal(table, -table.flip(0))
    multiples = table * (256 if bits == 8 else 128)
    assert torch.equal(multiples, multiples.round())
    assert table.abs().max() < 1


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_up_to_4_bits_are_those_of_lloyd_and_max_to_rounding(bits: int) -> None:
    table, gaussian = torch.linspace(-1, 1, 2**bits, dtype=torch.float64), torch.distributions.Normal(0.0, 1.0)
    for _ in range(1000):  # each level moves to the mean of the values that it is nearest to
        edges = torch.cat([-FAR, (table[1:] + table[:-1]) / 2, FAR])
        table = -gaussian.log_prob(edges).exp().diff() / gaussian.cdf(edges).diff()
    exact = table / table.max() * 127
    assert torch.all((levels(bits) * 128 - exact).abs() < 0.6), exact.tolist()
    assert squared_error(PEAKS[bits] * levels(bits).double()) < 1.005 * squared_error(table)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_levels_from_5_bits_on_are_equally_spaced(bits: int) -> None:
    assert levels(bits).diff().unique().tolist() == [2 / 2**bits]


@every_width
def test_the_peak_is_the_scale_with_the_least_squared_error(bits: int) -> None:
    table = levels(bits).double()
    best = min(squared_error(PEAKS[bits] * factor / 100 * table) for factor in range(80, 121))
    assert squared_error(PEAKS[bits] * table) <= 1.002 * best


@many
@given(st.integers(1, 8), st.integers(0, 5), columns_of_interest, st.integers(0, 2**16))
def test_rows_hold_codes_and_scales(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator).to(torch.uint8)
    scale = torch.randn(rows, generator=generator).half()
    joined = join(codes, scale, bits)
    assert (joined.dtype, joined.shape) == (torch.uint8, (rows, row_bytes(columns, bits)))
    assert torch.equal(scales(joined), scale)
    expected = levels(bits)[codes.int()] * scale.float()[:, None]
    assert torch.equal(weights(joined, bits, columns), expected)
    padded = torch.cat([joined, torch.full((rows, 3), 255, dtype=torch.uint8)], 1)[:, :-3]
    assert torch.equal(weights(padded, bits, columns), expected), "rows of a wider matrix"


@every_width
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_levels_are_exact_in_every_dtype(bits: int, dtype: torch.dtype) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    matrix = weights(join(codes, torch.ones(1).half(), bits), bits, 2**bits, dtype)
    assert matrix.dtype == dtype
    assert torch.equal(matrix[0].float(), levels(bits))
