"""Bytes that calls of ``tardis::coded_ffn`` touch, against the sizes of their tensors."""

import pytest
from builders.coded import arguments, calls, levels, run
from builders.correction import every_k
from hypothesis import given
from torch import Tensor

from tardis_fx import count_touched
from tardis_fx.runtime.coded import CodedFFN

every_half = pytest.mark.parametrize("some", [False, True])


def counted(call: CodedFFN) -> float:
    with count_touched() as touched:
        run(call)
    assert touched.sites == 1
    return touched.per_token


def row(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor[0].nbytes


def fixed(call: CodedFFN) -> int:
    """Bytes that every token touches."""
    of_neuron = row(call.norms) + row(call.biases) + row(call.surrogate) + row(call.projections[0])
    tensors = (call.fold, call.bias, call.signs, call.out_signs, call.noise, call.thresholds)
    return int(call.listed) * of_neuron + sum(tensor.nbytes for tensor in tensors if tensor is not None)


@every_k
@every_half
def test_reading_everything_touches_all_that_is_listed(k: int, some: bool) -> None:
    call = arguments(k=k, shape=(3,), bias=some, fold=some, thresholds="all")
    listed = [*call.projections[1:], *call.refinements, call.columns, call.column_refinements]
    assert counted(call) == fixed(call) + 40 * sum(map(row, listed))


@every_k
@every_half
def test_reading_nothing_touches_first_projections_and_constants(k: int, some: bool) -> None:
    call = arguments(k=k, shape=(3,), bias=some, fold=some, thresholds="none")
    assert counted(call) == fixed(call)


@given(call=calls())
def test_each_part_counts_where_it_is_read(call: CodedFFN) -> None:
    up, value, low, column = levels(call)
    parts = [
        *[(up, matrix) for matrix in call.projections[1:]], *[(low, matrix) for matrix in call.refinements],
        (value, call.columns), (column, call.column_refinements),
    ]  # fmt: skip
    expected = sum(int(read.sum()) * row(matrix) for read, matrix in parts) / len(up)
    assert counted(call) == pytest.approx(fixed(call) + expected, rel=1e-12)


def test_the_outlier_rate_is_the_share_of_columns_that_are_read() -> None:
    call = arguments(k=2, shape=(4,), listed=40, activation="silu")
    with count_touched() as touched:
        run(call)
    assert touched.outlier_rate == levels(call).value.sum() / (4 * 43) > 0
