import pytest
import torch
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.runtime.packing import (
    BLOCK,
    GROUP_SIZES,
    block_count,
    group_count,
    group_width,
    groups_of_row,
    join,
    pack,
    packed_bytes,
    row_bytes,
    split,
    spread,
    unpack,
)

many = settings(max_examples=examples(100))
every_width = pytest.mark.parametrize("bits", range(1, 9))
columns_of_interest = st.one_of(st.integers(1, 200), st.sampled_from([1, 63, 64, 65, 127, 128, 129, 192, 193]))


def codes_of(rows: int, columns: int, bits: int, seed: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@many
@given(st.integers(1, 8), st.integers(0, 5), columns_of_interest, st.integers(0, 2**16))
def test_unpacking_inverts_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = codes_of(rows, columns, bits, seed)
    unpacked = unpack(pack(codes, bits), bits, columns)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)


@many
@given(st.integers(1, 8), st.integers(1, 5), columns_of_interest, st.integers(0, 2**16))
def test_a_row_takes_8_bytes_per_bit_and_block(bits: int, rows: int, columns: int, seed: int) -> None:
    packed = pack(codes_of(rows, columns, bits, seed), bits)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (rows, packed_bytes(columns, bits)) == (rows, 8 * bits * block_count(columns))
    assert block_count(columns) == (columns + 63) // 64


@many
@given(st.integers(2, 8), st.integers(1, 5), columns_of_interest, st.integers(0, 2**16))
def test_the_first_planes_are_the_codes_high_bits(bits: int, rows: int, columns: int, seed: int) -> None:
    """Of every block the first planes are a packed code of fewer bits, by the evenly many highest."""
    codes = codes_of(rows, columns, bits, seed)
    blocks = pack(codes, bits).view(rows, block_count(columns), -1)
    for high in range(2, bits + 1, 2):
        first = blocks[:, :, : high * BLOCK // 8].reshape(rows, -1)
        assert torch.equal(unpack(first, high, columns), codes >> (bits - high))


@many
@given(st.integers(1, 8), columns_of_interest, st.integers(0, 2**16))
def test_rows_and_blocks_are_packed_one_by_one(bits: int, columns: int, seed: int) -> None:
    codes = codes_of(3, columns, bits, seed)
    packed = pack(codes, bits)
    assert torch.equal(torch.cat([pack(row[None], bits) for row in codes]), packed)
    assert torch.equal(torch.cat([pack(block, bits) for block in codes.split(BLOCK, dim=1)], dim=1), packed)


@every_width
def test_padding_is_zero(bits: int) -> None:
    codes = torch.full((2, 70), 2**bits - 1, dtype=torch.uint8)
    padded = unpack(pack(codes, bits), bits, 2 * BLOCK)
    assert torch.equal(padded[:, :70], codes)
    assert not padded[:, 70:].any()


@every_width
def test_packing_reads_the_codes_whatever_their_strides(bits: int) -> None:
    codes = codes_of(70, 5, bits, 0)
    assert torch.equal(pack(codes.T, bits), pack(codes.T.contiguous(), bits))


@pytest.mark.parametrize(
    ("column", "byte", "shift"), [(0, 0, 0), (1, 1, 0), (15, 15, 0), (16, 0, 2), (33, 1, 4), (63, 15, 6)]
)
def test_a_plane_of_two_bits_holds_columns_16_apart_in_one_byte(column: int, byte: int, shift: int) -> None:
    codes = torch.zeros(1, BLOCK, dtype=torch.uint8)
    codes[0, column] = 3
    packed = pack(codes, 2)
    assert packed[0, byte] == 3 << shift
    assert packed.count_nonzero() == 1


@pytest.mark.parametrize("column", [0, 7, 8, 63])
def test_the_plane_of_one_bit_holds_eight_neighbours_in_one_byte(column: int) -> None:
    codes = torch.zeros(1, BLOCK, dtype=torch.uint8)
    codes[0, column] = 1
    for bits in (1, 3, 5, 7):
        last = pack(codes, bits)[0, -8:]
        assert last[column // 8] == 1 << column % 8
        assert last.count_nonzero() == 1


@many
@given(st.integers(0, 6), columns_of_interest, st.integers(1, 8), st.sampled_from(GROUP_SIZES), st.integers(0, 2**16))
def test_a_row_of_bytes_holds_codes_scales_and_zero_points(
    rows: int, columns: int, bits: int, group_size: int, seed: int
) -> None:
    codes, groups = pack(codes_of(rows, columns, bits, seed), bits), group_count(columns, group_size)
    zero = codes_of(rows, groups, bits, seed + 1)
    scale = torch.randn(rows, groups, generator=torch.Generator().manual_seed(seed)).half()
    joined = join(codes, scale, zero)
    assert joined.shape == (rows, row_bytes(columns, bits, group_size))
    assert groups_of_row(joined.shape[1], bits, columns) == groups
    assert all(torch.equal(a, b) for a, b in zip(split(joined, bits, columns), (codes, scale, zero), strict=True))


@many
@given(columns_of_interest, st.sampled_from(GROUP_SIZES))
def test_how_many_columns_share_a_scale_follows_from_the_number_of_scales(columns: int, group_size: int) -> None:
    groups = group_count(columns, group_size)
    column = torch.arange(columns)
    assert torch.equal(spread(torch.arange(groups)[None], columns)[0], column // group_size)
    assert torch.equal(column // group_width(columns, groups), column // group_size)
