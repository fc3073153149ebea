"""``tardis::coded_linear`` against a dense layer in float64, and what it refuses, counts and touches."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from builders.correction import FLOATS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tardis_fx import PlanMismatchError, count_touched
from tardis_fx.quantisation import code_rows
from tardis_fx.runtime import coded_linear, flops, ops, tables  # noqa: F401 - registers the op and its formula
from tardis_fx.runtime.coded_linear import CodedLinear
from tardis_fx.runtime.cpu import build
from tardis_fx.runtime.cpu.coded_layout import prepare_linear, restore_linear
from tardis_fx.runtime.rotation import random_signs, rotate_back


def call(
    shape: tuple[int, ...] = (3,),
    d: int = 70,
    d_out: int = 40,
    bits: int = 4,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> CodedLinear:
    """A call with random tensors."""
    generator = torch.Generator().manual_seed(seed)
    rows = code_rows(torch.randn(d_out, d, generator=generator), None, bits).rows
    x = torch.randn(*shape, d, generator=generator).to(dtype)
    added = torch.randn(d_out, generator=generator).to(x.dtype) if bias else None
    return CodedLinear(x, rows, random_signs(d, seed), added, bits)


def run(call: CodedLinear) -> Tensor:
    """The op, with its kernel if there is a compiler."""
    build.load()
    output: Tensor = torch.ops.tardis.coded_linear(call.x, prepare_linear(call), len(call.rows))
    return output


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (1,), (0,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_op_keeps_the_rules_of_torch_library(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
    some = call(shape, dtype=dtype, bias=bias)
    arguments = (some.x, prepare_linear(some), 40)
    passed = opcheck(torch.ops.tardis.coded_linear.default, arguments, test_utils=utils)
    assert set(passed.values()) == {"SUCCESS"}


@given(
    tokens=st.integers(1, 40),
    d=st.sampled_from([1, 2, 33, 64, 65, 128, 130, 700]),
    d_out=st.integers(1, 70),
    bits=st.integers(1, 8),
    bias=st.booleans(),
    dtype=st.sampled_from([*FLOATS, torch.float64]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_the_kernel_agrees_with_the_reference(
    tokens: int, d: int, d_out: int, bits: int, bias: bool, dtype: torch.dtype, threads: int, seed: int
) -> None:
    some, before = call((tokens,), d, d_out, bits, bias=bias, dtype=dtype, seed=seed), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.object(coded_linear, "coded_linear", side_effect=AssertionError("the reference was called")):
            output = run(some)
    finally:
        torch.set_num_threads(before)
    added = None if some.bias is None else some.bias.double()
    expected = coded_linear.coded_linear(some._replace(x=some.x.double(), bias=added))
    size = expected.abs().max().item() + 1
    torch.testing.assert_close(output.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-6 * size)


@given(bits=st.integers(1, 8), bias=st.booleans(), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 99))
def test_a_prepared_layer_restores_its_call(bits: int, bias: bool, dtype: torch.dtype, seed: int) -> None:
    some = call((3,), 130, 40, bits, bias=bias, dtype=dtype, seed=seed)
    restored = restore_linear(some.x, prepare_linear(some))
    for old, new in zip(some, restored, strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) and isinstance(new, Tensor) else old == new


@pytest.mark.parametrize("size", [-64, 64])
def test_the_kernel_refuses_what_is_no_prepared_layer_of_the_input(size: int) -> None:
    some = call()
    run(some)
    layer = prepare_linear(some)
    other = layer[:size] if size < 0 else torch.cat([layer, layer[:size]])
    damaged = layer.clone()
    damaged.view(torch.int64)[3] = 9  # bits
    for wrong, x, d_out in (
        (other, some.x, 40),
        (damaged, some.x, 40),
        (layer, some.x[:, 1:], 40),
        (layer, some.x, 41),
    ):
        with pytest.raises(RuntimeError, match="prepared site"):
            torch.ops.tardis.coded_linear(x, wrong, d_out)


@given(
    d=st.integers(1, 200),
    d_out=st.integers(1, 9),
    bits=st.integers(1, 8),
    bias=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 99),
)
def test_the_op_is_a_dense_layer_of_the_dequantised_weight_rotated_back(
    d: int, d_out: int, bits: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    some = call((3,), d, d_out, bits, bias=bias, dtype=dtype, seed=seed)
    weight = rotate_back(tables.weights(some.rows, bits, d, torch.float64), some.signs)
    expected = F.linear(some.x.double(), weight, None if some.bias is None else some.bias.double())
    output = run(some)
    assert output.dtype is dtype
    rounding = 2.0**-15 if bits == 8 else 2.0**-7
    most = rounding * (some.x.double().abs().sum(1, keepdim=True) * weight.abs().amax(1)).amax() + 1e-5
    torch.testing.assert_close(output.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=float(most))


def test_rows_that_are_dequantised_apart_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    some = call(d_out=40)
    whole = coded_linear.coded_linear(some)
    monkeypatch.setattr(coded_linear, "TOGETHER", 7)
    torch.testing.assert_close(coded_linear.coded_linear(some), whole)


#: What is wrong with a call, and the argument that the error names.
WRONG: dict[str, tuple[Callable[[CodedLinear], CodedLinear], str]] = {
    "bits of a double": (lambda c: c._replace(bits=9), "bits"),
    "no bits": (lambda c: c._replace(bits=0), "bits"),
    "rows of other bits": (lambda c: c._replace(bits=8), "rows"),
    "short rows": (lambda c: c._replace(rows=c.rows[:, 1:]), "rows"),
    "one row": (lambda c: c._replace(rows=c.rows[0]), "axes"),
    "rows of another type": (lambda c: c._replace(rows=c.rows.char()), "rows"),
    "few signs": (lambda c: c._replace(signs=c.signs[1:]), "signs"),
    "a short bias": (lambda c: c._replace(bias=torch.zeros(39)), "bias"),
    "a bias of another type": (lambda c: c._replace(bias=torch.zeros(40, dtype=torch.float64)), "bias"),
    "integers": (lambda c: c._replace(x=c.x.int()), "x of"),
    "no axis": (lambda c: c._replace(x=c.x[0, 0]), "axes"),
    "another device": (lambda c: c._replace(signs=c.signs.to("meta")), "signs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_does_not_fit_is_refused_by_name(name: str) -> None:
    change, argument = WRONG[name]
    with pytest.raises(PlanMismatchError, match=argument):
        prepare_linear(change(call()))


def test_every_byte_of_the_layer_counts_for_every_token() -> None:
    some = call((2, 3))
    assert some.bias is not None
    layer = prepare_linear(some)
    with count_touched() as touched:
        for _ in range(2):
            torch.ops.tardis.coded_linear(some.x, layer, 40)
    assert (touched.sites, touched.tokens, touched.outlier_rate) == (1, 12, 0)
    assert touched.per_token == some.rows.nbytes + some.signs.nbytes + some.bias.nbytes


def test_flops_are_those_of_the_product() -> None:
    with FlopCounterMode(display=False) as counter:
        run(call((2, 3)))
    assert counter.get_total_flops() == 2 * 6 * 70 * 40
