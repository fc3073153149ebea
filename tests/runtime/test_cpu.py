"""The CPU kernel against the eager reference in float64."""

import math
import subprocess
import sys
from unittest import mock

import pytest
import torch
from builders.correction import FLOATS, Arguments, arguments, assert_agree, assert_right, changed, exact
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import reference
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.packing import GROUP_SIZES, low_bits
from tardis_fx.runtime.reference import dequantise, rows_of


def run(op: Arguments, *, threads: int = 2) -> Tensor:
    """The kernel and never the reference."""
    with (
        mock.patch.object(torch, "get_num_threads", return_value=threads),
        mock.patch.object(reference, "correct", side_effect=AssertionError("the reference was called")),
    ):
        return cpu.correct(**op)  # type: ignore[arg-type]


def agree(op: Arguments, out: Tensor) -> None:
    """To the rounding of x in products with codes, 2^-13 of its block's largest."""
    assert_right(out, op, exact(op), coded=4e-3)


@pytest.fixture(scope="module")
def kernel() -> None:
    if cpu_build.load() is None:
        pytest.skip("no C++ compiler")


@st.composite
def ops(draw: st.DrawFn) -> Arguments:
    h = draw(st.sampled_from([1, 2, 40, 400]))
    return arguments(
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


@pytest.mark.usefixtures("kernel")
@given(op=ops(), threads=st.integers(1, 4))
def test_the_kernel_agrees_with_the_reference(op: Arguments, threads: int) -> None:
    agree(op, run(op, threads=threads))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_width_of_fold_and_rows_agrees(bits: int, dtype: torch.dtype) -> None:
    for op in (
        arguments(shape=(6,), fold_bits=bits, row_bits=9 - bits, dtype=dtype),
        arguments(shape=(5,), fold_bits=16, row_bits=bits, group_size=128, outliers=0.5, dtype=dtype),
        arguments(shape=(3,), fold_bits=bits, group_size=128, outliers=0, dtype=dtype),
    ):
        agree(op, run(op))


@given(op=ops())
def test_rows_nested_in_the_predictor_give_what_whole_rows_of_the_same_values_give(op: Arguments) -> None:
    if op["row_bits"] == 16:
        return
    nested = exact(op)
    row_bits, bits, d, d_out = (int(n) for n in (op["row_bits"], op["bits"], op["x"].shape[-1], op["folded"].shape[-1]))
    listed = op["neurons"][: int(op["counts"][0])].long()
    w1 = rows_of(op["w1"], low_bits(bits, row_bits), d, torch.float64)
    w1[listed] += dequantise(*(op[n][: len(listed)] for n in ("codes", "scale", "zero")), bits, d, torch.float64)
    whole = changed(op, w1=w1, w2t=rows_of(op["w2t"], row_bits, d_out, torch.float64)) | {"row_bits": 16}
    torch.testing.assert_close(exact(whole), nested, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_width_and_dtype_agrees(bits: int, dtype: torch.dtype) -> None:
    op = arguments(shape=(6,), bits=bits, dtype=dtype)
    assert_agree(run(op), exact(op))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_agrees(activation: str) -> None:
    op = arguments(shape=(3,), activation=activation, outliers=1)
    assert_agree(run(op), exact(op))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_with_no_outliers_the_folded_output_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    op = arguments(shape=(5,), outliers=0, dtype=dtype)
    assert torch.equal(run(op), op["folded"])  # type: ignore[arg-type]


@pytest.mark.usefixtures("kernel")
def test_with_an_empty_list_the_folded_output_comes_back() -> None:
    op = changed(arguments(shape=(5,)), counts=torch.tensor([0, 0]))
    assert torch.equal(run(op), op["folded"])  # type: ignore[arg-type]


@pytest.mark.usefixtures("kernel")
def test_outliers_of_one_thread_are_shared_among_all() -> None:
    op = arguments(shape=(3,), outliers=0)
    lower = op["lower"]
    assert isinstance(lower, Tensor)
    lower[200:] = math.inf
    assert_agree(run(op, threads=3), exact(op))


@pytest.mark.usefixtures("kernel")
def test_no_tokens_give_no_output() -> None:
    out = cpu.correct(**arguments(shape=(2, 0)))  # type: ignore[arg-type]
    assert out.shape == (2, 0, 130)


@pytest.mark.usefixtures("kernel")
def test_strided_arguments_are_read_where_they_lie() -> None:
    op = arguments(shape=(3,))
    strided = {
        name: torch.stack([value, value], -1)[..., 0] if isinstance(value, Tensor) else value
        for name, value in op.items()
    }
    padded = {
        name: torch.nn.functional.pad(value, (0, 5))[:, :-5]
        for name, value in op.items()
        if name in ("w1", "w2t") and isinstance(value, Tensor)
    }
    assert torch.equal(run(strided), run(op))
    assert torch.equal(run(changed(op, **padded)), run(op))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("always", [0, 50])
def test_a_nan_estimate_is_no_outlier_and_a_nan_stays_with_its_token(always: int) -> None:
    op = arguments(shape=(6,), always=always)
    x = op["x"]
    assert isinstance(x, Tensor)
    x[2, 7] = torch.nan
    out = run(op)
    assert_agree(out, exact(op))
    assert out[2].isnan().all() == (always > 0)
    assert out[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.usefixtures("kernel")
def test_memory_of_old_reaches_no_output() -> None:
    op = arguments(shape=(6,))
    x, deterministic = op["x"], torch.are_deterministic_algorithms_enabled()
    assert isinstance(x, Tensor)
    run(changed(op, x=torch.full_like(x, torch.nan)))
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        out = run(op)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    assert_agree(out, exact(op))


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(arguments(shape=(cpu.DECODE_TOKENS + 1,)), id="many tokens"),
        pytest.param(arguments(dtype=torch.float64), id="float64"),
        pytest.param(changed(arguments(dtype=torch.float16), b1=torch.zeros(400)), id="mixed dtypes"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_the_reference(op: Arguments) -> None:
    with mock.patch.object(cpu_build, "load", side_effect=AssertionError("the kernel was asked for")):
        assert_agree(cpu.correct(**op), exact(op))  # type: ignore[arg-type]


@pytest.mark.usefixtures("kernel")
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
