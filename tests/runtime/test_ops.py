import pytest
import torch
from builders.correction import arguments, every_k, mapped
from builders.ffns import oracle
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from tardis_fx.passes.guarded_fold import GuardedFold
from tardis_fx.runtime import reference, rotation, tables
from tardis_fx.runtime.correction import Correction
from tardis_fx.runtime.tables import join

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def drawn(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (5,), k: int = 1, *, bias: bool = True,
    quantised: bool = False,
) -> Correction:  # fmt: skip
    """A small call; ``quantised``, with the fold and the rows in 8 bits."""
    bits = 8 if quantised else 16
    return arguments(
        k=k, shape=shape, d=16, d_out=12, h=32, always=4, dtype=dtype, bits=8, bias=bias, fold_bits=bits, row_bits=bits
    )


@every_dtype
@pytest.mark.parametrize("shape", [(5,), (1,), (40,), (0,), (2, 3), ()], ids=str)
def test_the_op_keeps_the_rules_of_torch_library(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
    for k, bias, quantised in ((1, True, False), (2, False, False), (1, True, True), (2, True, False)):
        op = drawn(dtype, shape, k, bias=bias, quantised=quantised)
        passed = opcheck(torch.ops.tardis.correct.default, tuple(op), test_utils=utils)
        assert set(passed.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("bits", "dtype"), [(1, torch.float32), (3, torch.bfloat16), (8, torch.float16)], ids=str)
def test_dequantising_rows_keeps_the_rules_of_torch_library(bits: int, dtype: torch.dtype) -> None:
    rows = join(torch.randint(0, 2**bits, (5, 70), dtype=torch.uint8), torch.rand(5).half(), bits)
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
    op = torch.ops.tardis.dequantise_rows.default
    assert set(opcheck(op, (rows, bits, 70, dtype), test_utils=utils).values()) == {"SUCCESS"}
    assert torch.equal(op(rows, bits, 70, dtype), tables.weights(rows, bits, 70, dtype))


@every_dtype
@pytest.mark.parametrize("back", [False, True])
def test_a_rotation_keeps_the_rules_of_torch_library_and_adds_in_float32(dtype: torch.dtype, back: bool) -> None:
    signs, op = rotation.random_signs(200, 0), torch.ops.tardis.rotate.default
    rotate = rotation.rotate_back if back else rotation.rotate
    for shape in ((2, 3), (0,), ()):
        x = torch.randn(*shape, 200).to(dtype)
        assert torch.equal(op(x, signs, back), rotate(x.float(), signs).to(dtype))
        if dtype == torch.float32:
            assert set(opcheck(op, (x.requires_grad_(), signs, back)).values()) == {"SUCCESS"}
    loud = torch.full((200,), 2000.0).to(dtype)
    assert torch.isfinite(op(loud, torch.ones_like(signs), back)).all(), "sums of 128 times as much"


def test_gradients_are_rotated_back() -> None:
    x, signs = torch.randn(3, 200, dtype=torch.float64, requires_grad=True), rotation.random_signs(200, 0)
    for back in (False, True):
        assert torch.autograd.gradcheck(lambda x, back=back: torch.ops.tardis.rotate(x, signs, back), x)


@every_k
@every_dtype
@pytest.mark.parametrize("shape", [(5,), (0,), (2, 3), (2, 0), (), (40,)], ids=str)
@pytest.mark.parametrize("quantised", [False, True])
def test_the_fake_implementation_agrees_with_the_real_one(
    dtype: torch.dtype, shape: tuple[int, ...], quantised: bool, k: int
) -> None:
    op = drawn(dtype, shape, k, quantised=quantised)
    real = torch.ops.tardis.correct(*op)
    with FakeTensorMode() as mode:
        fake = torch.ops.tardis.correct(*mapped(mode.from_tensor, op))
    for result in (real, fake):
        assert (result.shape, result.dtype, result.device) == ((*shape, 12), dtype, torch.device("cpu"))
        assert result.stride() == real.stride()


def test_the_fake_implementation_agrees_on_strides_of_an_input_that_is_not_contiguous() -> None:
    op = drawn(shape=(2, 3))
    op = op._replace(folded=op.folded.transpose(0, 1), x=op.x.transpose(0, 1))
    real = torch.ops.tardis.correct(*op)
    with FakeTensorMode() as mode:
        fake = torch.ops.tardis.correct(*mapped(mode.from_tensor, op))
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())


@every_k
@every_dtype
@pytest.mark.parametrize("quantised", [False, True])
def test_the_op_is_the_reference(dtype: torch.dtype, quantised: bool, k: int) -> None:
    for shape in [(5,), (40,), (2, 3), ()]:
        op = drawn(dtype, shape, k, quantised=quantised)
        tolerance = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
        torch.testing.assert_close(torch.ops.tardis.correct(*op), reference.correct(op), rtol=tolerance, atol=tolerance)


@every_k
def test_the_op_changes_none_of_its_inputs(k: int) -> None:
    op = drawn(k=k)
    copies = mapped(Tensor.clone, op)
    result = torch.ops.tardis.correct(*op)
    pairs = zip(op.tensors, copies.tensors, strict=True)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    assert result.data_ptr() not in {tensor.data_ptr() for tensor in op.tensors}


@every_k
def test_what_stands_behind_the_listed_neurons_is_not_read(k: int) -> None:
    op = drawn(k=k)
    expected = torch.ops.tardis.correct(*op)
    listed, guarded = op.counts.tolist()
    for name in ("neurons", "codes", "scale", "zero", "guard", "biases", "surrogate"):
        tensor = getattr(op, name).clone()
        tensor[guarded if name in ("codes", "scale", "zero", "guard") else listed :] = (
            torch.nan if tensor.is_floating_point() else 77
        )
        op = op._replace(**{name: tensor})
    torch.testing.assert_close(torch.ops.tardis.correct(*op), expected)
    torch.testing.assert_close(reference.correct(op), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("guarded", [0, 20])
def test_the_reference_takes_any_split_of_classes(guarded: int) -> None:
    o = oracle(16, 32, 40, d_out=12)
    plan = o.plan(range(guarded), range(guarded, 26))
    rewrite = GuardedFold()
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
    c = GuardedFold().constants(o.plan(range(32), []), o.weights)
    codes, scale, zero = (c[name][:, 0] for name in ("codes", "scale", "zero"))
    assert torch.equal(reference.estimate(o.x, codes, scale, zero, 8), o.x @ o.weights.up.T)
