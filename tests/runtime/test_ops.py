from __future__ import annotations

from typing import Any

import pytest
import torch
from builders.ffns import oracle
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from tardis_fx.passes.partial_linear import _PER_NEURON, PartialLinear
from tardis_fx.quantisation import quantise
from tardis_fx.runtime import reference
from tardis_fx.runtime.packing import low_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def arguments(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (5,), *, bias: bool = True, quantised: bool = False
) -> tuple[Any, ...]:
    """Of the op, as the pass gives them; ``quantised``, with the fold and the rows in 8 bits."""
    o = oracle(16, 32, 40, d_out=12, bias=bias).to(dtype)
    plan = o.plan(range(26), []) if quantised else o.plan(range(20), range(20, 26))
    c = PartialLinear().constants(plan, o.weights)
    x = o.x[: torch.Size(shape).numel()].view(*shape, 16)
    folded = torch.nn.functional.linear(x, c["folded_weight"], c["folded_bias"])
    rest = (c["counts"], *(c[name] for name in _PER_NEURON), 8, o.activation)
    if not quantised:
        return (folded, x, c["up"], c.get("up_bias"), c["w2t"], *rest)
    fold, w2t = (quantise(m, None, 8, 64).rows for m in (c["folded_weight"], o.weights.down.T))
    w1 = quantise(torch.zeros(32, 16), None, low_bits(8, 8), 64).rows
    return (c["folded_bias"], x, w1, c.get("up_bias"), w2t, *rest, fold, 8, 8)


@every_dtype
@pytest.mark.parametrize("shape", [(5,), (1,), (40,), (0,), (2, 3), ()], ids=str)
def test_the_op_keeps_the_rules_of_torch_library(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
    for bias, quantised in ((True, False), (False, False), (True, True)):
        args = arguments(dtype, shape, bias=bias, quantised=quantised)
        passed = opcheck(torch.ops.tardis.correct.default, args, test_utils=utils)
        assert set(passed.values()) == {"SUCCESS"}


@every_dtype
@pytest.mark.parametrize("shape", [(5,), (0,), (2, 3), (2, 0), (), (40,)], ids=str)
@pytest.mark.parametrize("quantised", [False, True])
def test_the_fake_implementation_agrees_with_the_real_one(
    dtype: torch.dtype, shape: tuple[int, ...], quantised: bool
) -> None:
    args = arguments(dtype, shape, quantised=quantised)
    real = torch.ops.tardis.correct(*args)
    with FakeTensorMode() as mode:
        fake = torch.ops.tardis.correct(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    for result in (real, fake):
        assert (result.shape, result.dtype, result.device) == ((*shape, 12), dtype, torch.device("cpu"))
        assert result.stride() == real.stride()


def test_the_fake_implementation_agrees_on_strides_of_an_input_that_is_not_contiguous() -> None:
    args = list(arguments(shape=(2, 3)))
    args[0], args[1] = args[0].transpose(0, 1), args[1].transpose(0, 1)
    real = torch.ops.tardis.correct(*args)
    with FakeTensorMode() as mode:
        fake = torch.ops.tardis.correct(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())


@every_dtype
@pytest.mark.parametrize("quantised", [False, True])
def test_the_op_is_the_reference(dtype: torch.dtype, quantised: bool) -> None:
    for shape in [(5,), (40,), (2, 3), ()]:
        args = arguments(dtype, shape, quantised=quantised)
        tolerance = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(
            torch.ops.tardis.correct(*args), reference.correct(*args), rtol=tolerance, atol=tolerance
        )


def test_the_op_changes_none_of_its_inputs() -> None:
    args = arguments()
    copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
    result = torch.ops.tardis.correct(*args)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(args, copies, strict=True))
    assert result.data_ptr() not in {a.data_ptr() for a in args if isinstance(a, Tensor)}


def test_what_stands_behind_the_listed_neurons_is_not_read() -> None:
    args = list(arguments())
    expected = torch.ops.tardis.correct(*args)
    listed, guarded = args[5].tolist()
    for i in range(6, 14):
        used = (
            listed if i in (6, 12, 13) else guarded
        )  # number, slope and intercept of all; predictor and bounds of guarded
        args[i] = args[i].clone()
        args[i][used:] = torch.nan if args[i].is_floating_point() else 77
    torch.testing.assert_close(torch.ops.tardis.correct(*args), expected)
    torch.testing.assert_close(reference.correct(*args), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guarded", [0, 20])
def test_the_reference_takes_any_split_of_classes(guarded: int) -> None:
    o = oracle(16, 32, 40, d_out=12)
    plan = o.plan(range(guarded), range(guarded, 26))
    rewrite = PartialLinear()
    c = rewrite.constants(plan, o.weights)
    whole = rewrite.forward(o.x, c, plan)
    torch.testing.assert_close(
        torch.cat([rewrite.forward(x, c, plan) for x in o.x.split(8)]), whole, rtol=1e-3, atol=1e-3
    )


def test_compute_dtype_is_never_narrower_than_float32() -> None:
    assert [reference.compute_dtype(dtype) for dtype in (*DTYPES, torch.float64)] == [torch.float32] * 3 + [
        torch.float64
    ]


def test_estimates_are_products_with_the_dequantised_weights() -> None:
    o = oracle(70, 32, 8, d_out=12)
    c = PartialLinear().constants(o.plan(range(32), []), o.weights)
    estimate = reference.estimate(o.x, c["codes"], c["scale"], c["zero"], 8)
    assert torch.equal(estimate, o.x @ o.weights.up.T)
