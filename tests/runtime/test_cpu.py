"""The CPU kernel against the eager reference in float64."""

import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch
from builders.correction import FLOATS, NOTHING, arguments, assert_right, every_k, exact, mapped
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import reference
from tardis_fx.runtime.correction import MOST_TOKENS, Correction
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.packing import GROUP_SIZES, low_bits
from tardis_fx.runtime.reference import dequantise, rows_of


def run(op: Correction, *, threads: int = 2) -> Tensor:
    """The kernel and never the reference."""
    with (
        mock.patch.object(torch, "get_num_threads", return_value=threads),
        mock.patch.object(reference, "correct", side_effect=AssertionError("the reference was called")),
    ):
        return cpu.correct(op)


def agree(op: Correction, out: Tensor) -> None:
    """To the rounding of x in products with codes, 2^-13 of its block's largest."""
    assert_right(out, op, exact(op), coded=4e-3)


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    if cpu_build.load() is None:
        pytest.skip("no C++ compiler")


@st.composite
def ops(draw: st.DrawFn) -> Correction:
    h = draw(st.sampled_from([1, 2, 40, 400]))
    return arguments(
        k=draw(st.sampled_from([1, 2])),
        shape=draw(st.sampled_from([(), (1,), (1, 1), (3,), (2, 3), (2, 2, 2), (16,)])),
        d=draw(st.sampled_from([1, 2, 15, 63, 64, 65, 96, 127, 128, 160, 192, 200, 256, 300, 1100])),
        d_out=draw(st.sampled_from([1, 2, 17, 64, 96, 130, 192])),
        h=h,
        always=draw(st.sampled_from([0, 1, h // 3, h])),
        outliers=draw(st.sampled_from([0, 0.05, 0.5, 1])),
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
def test_the_kernel_agrees_with_the_reference(op: Correction, threads: int) -> None:
    agree(op, run(op, threads=threads))


@every_k
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_width_of_fold_and_rows_agrees(bits: int, dtype: torch.dtype, k: int) -> None:
    for op in (
        arguments(k=k, shape=(6,), fold_bits=bits, row_bits=9 - bits, dtype=dtype),
        arguments(k=k, shape=(5,), fold_bits=16, row_bits=bits, group_size=128, outliers=0.5, always=20, dtype=dtype),
        arguments(k=k, shape=(3,), fold_bits=bits, group_size=128, outliers=0, dtype=dtype),
    ):
        agree(op, run(op))


@given(op=ops())
def test_rows_nested_in_the_predictor_give_what_whole_rows_of_the_same_values_give(op: Correction) -> None:
    if op.row_bits == 16:
        return
    d, d_out, listed = op.x.shape[-1], op.folded.shape[-1], int(op.counts[0])
    projections = [rows_of(p, low_bits(op.bits, op.row_bits), d, torch.float64) for p in op.projections]
    for i, projection in enumerate(projections):
        codes, scale, zero = (tensor[:listed, i] for tensor in (op.codes, op.scale, op.zero))
        projection[op.neurons[:listed].long()] += dequantise(codes, scale, zero, op.bits, d, torch.float64)
    columns = rows_of(op.columns, op.row_bits, d_out, torch.float64)
    whole = op._replace(projections=projections, columns=columns, row_bits=16)
    torch.testing.assert_close(exact(whole), exact(op), rtol=1e-9, atol=1e-9)


@every_k
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_width_and_dtype_agrees(bits: int, dtype: torch.dtype, k: int) -> None:
    op = arguments(k=k, shape=(6,), bits=bits, dtype=dtype)
    agree(op, run(op))


@every_k
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_agrees(activation: str, k: int) -> None:
    op = arguments(k=k, shape=(3,), activation=activation, outliers=1)
    agree(op, run(op))


@every_k
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_with_no_outliers_the_folded_output_comes_back_bit_for_bit(dtype: torch.dtype, k: int) -> None:
    op = arguments(k=k, shape=(5,), outliers=0, dtype=dtype)
    assert torch.equal(run(op), op.folded)


@every_k
def test_with_an_empty_list_the_folded_output_comes_back(k: int) -> None:
    op = arguments(k=k, shape=(5,))._replace(counts=torch.tensor([0, 0]))
    assert torch.equal(run(op), op.folded)


@every_k
def test_outliers_of_one_thread_are_shared_among_all(k: int) -> None:
    op = arguments(k=k, shape=(3,), outliers=0)
    op.guard[200:] = NOTHING[k]
    agree(op, run(op, threads=3))


@every_k
def test_no_tokens_give_no_output(k: int) -> None:
    assert cpu.correct(arguments(k=k, shape=(2, 0))).shape == (2, 0, 130)


@every_k
@pytest.mark.parametrize("row_bits", [16, 4])
def test_strided_arguments_are_read_where_they_lie(row_bits: int, k: int) -> None:
    op = arguments(k=k, shape=(3,), row_bits=row_bits)
    strided = mapped(lambda tensor: torch.stack([tensor, tensor], -1)[..., 0], op)
    *projections, columns = [F.pad(matrix, (0, 5))[:, :-5] for matrix in (*op.projections, op.columns)]
    assert torch.equal(run(strided), run(op))
    assert torch.equal(run(op._replace(projections=projections, columns=columns)), run(op))


@every_k
@pytest.mark.parametrize("always", [0, 50])
def test_a_nan_estimate_is_no_outlier_and_a_nan_stays_with_its_token(always: int, k: int) -> None:
    op = arguments(k=k, shape=(6,), always=always)
    op.x[2, 7] = torch.nan
    out = run(op)
    agree(op, out)
    assert out[2].isnan().all() == (always > 0)
    assert out[[0, 1, 3, 4, 5]].isfinite().all()


@every_k
def test_memory_of_old_reaches_no_output(k: int) -> None:
    op, deterministic = arguments(k=k, shape=(6,)), torch.are_deterministic_algorithms_enabled()
    run(op._replace(x=torch.full_like(op.x, torch.nan)))
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        out = run(op)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    agree(op, out)


@every_k
@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"shape": (MOST_TOKENS + 1,)}, id="many tokens"),
        pytest.param({"dtype": torch.float64}, id="float64"),
        pytest.param({"dtype": torch.float16}, id="mixed dtypes"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_the_reference(changed: dict[str, Any], k: int) -> None:
    op = arguments(k=k, **changed)
    if op.x.dtype == torch.float16:
        op.projections[-1] = op.projections[-1].float()
    with mock.patch.object(cpu_build, "load", side_effect=AssertionError("the kernel was asked for")):
        assert torch.equal(cpu.correct(op), reference.correct(op))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_kernel_shares_the_openmp_runtime_of_pytorch() -> None:
    """In a process of its own, since scikit-learn brings a runtime and transformers may import it."""
    code = """
import torch
from tardis_fx.runtime.cpu import build as cpu_build
assert cpu_build.load() is not None
torch.ones(1000, 1000).sum()
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "1\n"
