"""``tardis::coded_linear`` against a dense layer in float64, and what it refuses, counts and touches."""

from collections.abc import Callable

import pytest
import torch
from builders.correction import FLOATS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tardis_fx import PlanMismatchError, count_touched
from tardis_fx.quantisation import code_rows
from tardis_fx.runtime import coded_linear, flops, ops, tables  # noqa: F401 - registers the op and its formula
from tardis_fx.runtime.coded_linear import CodedLinear
from tardis_fx.runtime.rotation import multiplications, random_signs, rotate_back


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
    output: Tensor = torch.ops.tardis.coded_linear(*call)
    return output


def traced(call: CodedLinear) -> Tensor:
    with FakeTensorMode() as mode:
        return run(CodedLinear(*(mode.from_tensor(f) if isinstance(f, Tensor) else f for f in call)))  # type: ignore[arg-type]


everywhere = pytest.mark.parametrize("implementation", [run, traced])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (1,), (0,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_op_keeps_the_rules_of_torch_library(dtype: torch.dtype, shape: tuple[int, ...], bias: bool) -> None:
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
    some = call(shape, dtype=dtype, bias=bias)
    passed = opcheck(torch.ops.tardis.coded_linear.default, tuple(some), test_utils=utils)
    assert set(passed.values()) == {"SUCCESS"}


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
    step = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(output.double(), expected, rtol=4 * step, atol=8 * d * torch.finfo(torch.float32).eps)


def test_rows_that_are_dequantised_apart_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    some = call(d_out=40)
    whole = run(some)
    monkeypatch.setattr(coded_linear, "TOGETHER", 7)
    torch.testing.assert_close(run(some), whole)


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


@everywhere
@pytest.mark.parametrize("name", WRONG)
def test_a_call_that_does_not_fit_is_refused_by_name(implementation: Callable[..., Tensor], name: str) -> None:
    change, argument = WRONG[name]
    if name == "another device" and implementation is run:
        pytest.skip("the dispatcher sends it to the device named")
    with pytest.raises(PlanMismatchError, match=argument):
        implementation(change(call()))


def test_every_byte_of_the_layer_counts_for_every_token() -> None:
    some = call((2, 3))
    assert some.bias is not None
    with count_touched() as touched:
        run(some)
        run(some)
    assert (touched.sites, touched.tokens, touched.outlier_rate) == (1, 12, 0)
    assert touched.per_token == some.rows.nbytes + some.signs.nbytes + some.bias.nbytes


def test_flops_are_those_of_the_product_and_the_rotation() -> None:
    with FlopCounterMode(display=False) as counter:
        run(call((2, 3)))
    assert counter.get_total_flops() == 2 * 6 * (70 * 40 + multiplications(70))
