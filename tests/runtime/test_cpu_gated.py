"""The CPU kernel of gated sites against the eager reference in float64."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from builders.correction import FLOATS, Arguments, assert_right, changed
from builders.gated_correction import arguments, exact
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import reference_gated
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import gated as cpu_gated
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.packing import GROUP_SIZES, low_bits
from tardis_fx.runtime.reference import dequantise, rows_of


def run(op: Arguments, *, threads: int = 2) -> Tensor:
    """The kernel and never the reference."""
    with (
        mock.patch.object(torch, "get_num_threads", return_value=threads),
        mock.patch.object(reference_gated, "correct", side_effect=AssertionError("the reference was called")),
    ):
        return cpu_gated.correct(**op)  # type: ignore[arg-type]


def agree(op: Arguments, out: Tensor) -> None:
    """To the rounding of x in products with codes, 2^-13 of its block's largest."""
    assert_right(out, op, exact(op), coded=4e-3)


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    if cpu_build.load() is None:
        pytest.skip("no C++ compiler")


@st.composite
def ops(draw: st.DrawFn) -> Arguments:
    h = draw(st.sampled_from([1, 2, 40, 300]))
    return arguments(
        shape=draw(st.sampled_from([(), (1,), (1, 1), (3,), (2, 3), (2, 2, 2), (16,)])),
        d=draw(st.sampled_from([1, 2, 63, 64, 65, 128, 200, 1100])),
        d_out=draw(st.sampled_from([1, 17, 64, 130])),
        h=h,
        always=draw(st.sampled_from([0, 1, h // 3, h])),
        outliers=draw(st.sampled_from([None, None, 0, 1])),
        dtype=draw(st.sampled_from(FLOATS)),
        bits=draw(st.integers(1, 8)),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        bias=draw(st.booleans()),
        fold_bits=draw(st.sampled_from([16, 3, 4, 8])),
        row_bits=draw(st.sampled_from([16, 3, 4, 8])),
        group_size=draw(st.sampled_from(GROUP_SIZES)),
        fold=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


@given(op=ops(), threads=st.integers(1, 4))
def test_the_kernel_agrees_with_the_reference(op: Arguments, threads: int) -> None:
    agree(op, run(op, threads=threads))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_width_and_dtype_agrees(bits: int, dtype: torch.dtype) -> None:
    for op in (
        arguments(shape=(6,), bits=bits, dtype=dtype),
        arguments(shape=(5,), fold_bits=bits, row_bits=9 - bits, group_size=128, always=20, dtype=dtype),
    ):
        agree(op, run(op))


@given(op=ops())
def test_rows_nested_in_the_predictors_give_what_whole_rows_of_the_same_values_give(op: Arguments) -> None:
    if op["row_bits"] == 16:
        return
    row_bits, bits, d, d_out = (int(n) for n in (op["row_bits"], op["bits"], op["x"].shape[-1], op["folded"].shape[-1]))
    listed = op["neurons"][: int(op["counts"][0])].long()
    whole = {"w2t": rows_of(op["w2t"], row_bits, d_out, torch.float64), "row_bits": 16}
    for half, name in enumerate(("gate", "up")):
        whole[name] = rows_of(op[name], low_bits(bits, row_bits), d, torch.float64)
        codes = (op[n][: len(listed), half] for n in ("codes", "scale", "zero"))
        whole[name][listed] += dequantise(*codes, bits, d, torch.float64)
    torch.testing.assert_close(exact(op | whole), exact(op), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_with_no_outliers_the_folded_output_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    op = arguments(shape=(5,), outliers=0, dtype=dtype)
    assert torch.equal(run(op), op["folded"])  # type: ignore[arg-type]


@pytest.mark.parametrize("row_bits", [16, 4])
def test_strided_arguments_are_read_where_they_lie(row_bits: int) -> None:
    op = arguments(shape=(3,), row_bits=row_bits)
    strided = {
        name: torch.stack([value, value], -1)[..., 0] if isinstance(value, Tensor) else value
        for name, value in op.items()
    }
    padded = {name: torch.nn.functional.pad(op[name], (0, 5))[:, :-5] for name in ("gate", "up", "w2t")}  # type: ignore[arg-type]
    assert torch.equal(run(strided), run(op))
    assert torch.equal(run(changed(op, **padded)), run(op))


@pytest.mark.parametrize("always", [0, 50])
def test_a_nan_score_is_no_outlier_and_a_nan_stays_with_its_token(always: int) -> None:
    op = arguments(shape=(6,), always=always)
    op["x"][2, 7] = torch.nan  # type: ignore[index]
    out = run(op)
    agree(op, out)
    assert out[2].isnan().all() == (always > 0)
    assert out[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(arguments(shape=(cpu.DECODE_TOKENS + 1,)), id="many tokens"),
        pytest.param(arguments(dtype=torch.float64), id="float64"),
        pytest.param(changed(arguments(dtype=torch.float16), gate=torch.zeros(300, 200)), id="mixed dtypes"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_the_reference(op: Arguments) -> None:
    with mock.patch.object(cpu_build, "load", side_effect=AssertionError("the kernel was asked for")):
        assert torch.equal(cpu_gated.correct(**op), reference_gated.correct(**op))  # type: ignore[arg-type]
