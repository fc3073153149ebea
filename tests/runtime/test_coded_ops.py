"""The reference of ``tardis::coded_ffn``, and what the op refuses."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import scipy.linalg
import torch
from builders.coded import arguments, calls, doubled, every_scale, exact, levels, run, scaled
from builders.correction import FLOATS, every_k
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from tardis_fx.errors import PlanMismatchError
from tardis_fx.runtime import coded_reference, ops, tables
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.cpu.coded_layout import prepare
from tardis_fx.runtime.reference import response

every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def traced(call: CodedFFN) -> Tensor:
    site = prepare(call)
    with FakeTensorMode() as mode:
        x, site = mode.from_tensor(call.x), mode.from_tensor(site)
        output: Tensor = torch.ops.tardis.coded_ffn(x, site, len(call.bias))
        return output


def without_kernel(call: CodedFFN) -> Tensor:
    return ops._coded_ffn(call.x, prepare(call), len(call.bias))


everywhere = pytest.mark.parametrize("implementation", [run, traced, without_kernel])


def small(k: int = 1, shape: tuple[int, ...] = (3,), **options: Any) -> CodedFFN:
    return arguments(k=k, shape=shape, d=70, d_out=40, listed=20, **options)


def rotation(signs: Tensor) -> Tensor:
    """The matrix by which a row is multiplied to rotate it."""
    d = len(signs)
    binary = [1 << i for i in reversed(range((d % 128).bit_length())) if d % 128 >> i & 1]
    blocks = [scipy.linalg.hadamard(size) * size**-0.5 for size in [128] * (d // 128) + binary]
    return signs.double()[:, None] * torch.from_numpy(scipy.linalg.block_diag(*blocks))


def dense(call: CodedFFN) -> Tensor:
    """The FFN of base codes plus refinements, with matrices that are rotated in float64."""
    call, listed = doubled(call), int(call.listed)
    d, d_out = call.x.shape[-1], len(call.bias)

    def matrix(base: Tensor, bits: int, low: Tensor, low_bits: int, columns: int) -> Tensor:
        high = tables.weights(base[:listed], bits, columns, torch.float64)
        return high + tables.weights(low[:listed], low_bits, columns, torch.float64)

    projections = [
        matrix(base, call.bits, low, call.low_bits, d)
        for base, low in zip(call.projections, call.refinements, strict=True)
    ]
    x = coded_reference.rounded(call.x.reshape(-1, d).float(), call.signs, wide=call.wide).double()
    down = matrix(call.columns, call.column_bits, call.column_refinements, call.column_low_bits, d_out)
    biases = torch.zeros(listed, len(projections)) if call.biases is None else call.biases[:listed]
    z = [x @ matrix.T + bias for matrix, bias in zip(projections, biases.T, strict=True)]
    values = response(z, call.activation)
    if call.surrogate is not None:
        *slopes, intercept = call.surrogate[:listed].double().T
        for slope, p in zip(slopes, z, strict=True):
            values = values - slope * p
        values = values - intercept
    return (values @ down @ rotation(call.out_signs).T + call.bias + folded(call)).view(*call.x.shape[:-1], d_out)


def folded(call: CodedFFN) -> Tensor:
    """[tokens, d_out]: what the fold gives, with a matrix that is rotated back in float64."""
    if call.fold is None:
        return torch.zeros(len(call.bias), dtype=torch.float64)
    d = call.x.shape[-1]
    x = coded_reference.rounded(call.x.reshape(-1, d).float(), call.signs, wide=call.wide).double()
    return x @ (rotation(call.out_signs) @ tables.weights(call.fold, call.fold_bits, d, torch.float64)).T


@every_dtype
@pytest.mark.parametrize("shape", [(5,), (1,), (40,), (0,), (2, 3), ()], ids=str)
def test_the_op_keeps_the_rules_of_torch_library(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    utils = ["test_schema", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
    for k, some in ((1, True), (2, False)):
        call = small(k, shape, dtype=dtype, bias=some, fold=some, thresholds="all")
        passed = opcheck(torch.ops.tardis.coded_ffn.default, (call.x, prepare(call), 40), test_utils=utils)
        assert set(passed.values()) == {"SUCCESS"}


@every_k
@every_dtype
@pytest.mark.parametrize("shape", [(5,), (0,), (2, 3), (2, 0), (), (40,)], ids=str)
def test_the_fake_implementation_agrees_with_the_real_one(dtype: torch.dtype, shape: tuple[int, ...], k: int) -> None:
    call = small(k, shape, dtype=dtype, thresholds="all")
    real, fake = run(call), traced(call)
    for output in (real, fake):
        assert (output.shape, output.dtype, output.device) == ((*shape, 40), dtype, torch.device("cpu"))
        assert output.stride() == real.stride()


@given(call=calls())
def test_reading_everything_gives_the_dense_ffn_of_the_refined_weights(call: CodedFFN) -> None:
    call.thresholds[:] = -torch.inf
    assert all(read.all() for read in levels(call))
    torch.testing.assert_close(exact(call), dense(call), rtol=1e-9, atol=1e-9)


@given(call=calls())
def test_reading_nothing_gives_the_bias_and_the_fold(call: CodedFFN) -> None:
    call.norms[:] = 0
    call.thresholds[:] = 0
    assert not any(read.any() for read in levels(call))
    expected = (call.bias + folded(call)).expand(exact(call).reshape(-1, len(call.bias)).shape)
    torch.testing.assert_close(exact(call).reshape(expected.shape), expected, rtol=1e-9, atol=1e-9)


@given(call=calls(), wide=st.booleans())
def test_tokens_are_rotated_and_rounded_to_a_share_of_the_largest_of_128_columns(call: CodedFFN, wide: bool) -> None:
    most = 32258 if wide else 127
    x = call.x.reshape(-1, call.x.shape[-1]).float()
    rounded, exact = coded_reference.rounded(x, call.signs, wide=wide).double(), x.double() @ rotation(call.signs)
    for of_group, wanted in zip(rounded.split(128, 1), exact.split(128, 1), strict=True):
        unit = wanted.abs().amax(1, keepdim=True) / most
        assert ((of_group - wanted).abs() <= 0.52 * unit).all()
        numbers = of_group / of_group.abs().amax(1, keepdim=True).clamp(min=1e-30) * most
        torch.testing.assert_close(numbers, numbers.round(), rtol=0, atol=1e-4 if not wide else 2e-2)


@given(call=calls(), part=st.integers(0, 3), factor=st.floats(0, 1))
def test_a_part_is_read_only_with_those_before_it_and_a_smaller_threshold_reads_no_less(
    call: CodedFFN, part: int, factor: float
) -> None:
    before = levels(call)
    assert not (before.value & ~before.up).any()
    assert not ((before.row | before.column) & ~before.value).any()
    call.thresholds[min(part, len(call.thresholds) - 1)] *= factor
    for less, more in zip(before, levels(call), strict=True):
        assert not (less & ~more).any()


@every_k
@every_scale
def test_calls_are_drawn_in_which_each_part_is_read_for_some_tokens_alone(k: int, relative: bool) -> None:
    for read in levels(arguments(k=k, shape=(9,), activation="silu", relative=relative)):
        assert (read.any(0) & ~read.all(0)).any()


@given(call=calls(), listed=st.integers(0, 150))
def test_the_levels_of_a_neuron_depend_on_others_only_through_the_scale(call: CodedFFN, listed: int) -> None:
    fewer = min(listed, int(call.listed))
    alone = levels(call._replace(listed=torch.tensor([fewer])))
    for read, together in zip(alone, levels(call), strict=True):
        assert not (together[:, :fewer] & ~read).any(), "a larger scale reads no more"
        assert call.relative or torch.equal(read, together[:, :fewer])


@every_k
def test_relative_levels_depend_on_other_neurons(k: int) -> None:
    call = small(k, (9,), relative=True)
    assert not torch.equal(levels(call._replace(listed=call.listed - 15)).value, levels(call).value[:, :5])


@every_k
@pytest.mark.parametrize("exponent", [-9, 3])
def test_relative_levels_of_a_relu_ffn_do_not_depend_on_the_size_of_its_input(exponent: int, k: int) -> None:
    call = small(k, (9,), activation="relu", bias=False, fold=False, relative=True)
    other = scaled(call, 2.0**exponent)
    for read, expected in zip(levels(other), levels(call), strict=True):
        assert torch.equal(read, expected)
    absolute = (levels(c._replace(relative=False)) for c in (other, call))
    assert not all(torch.equal(read, expected) for read, expected in zip(*absolute, strict=True))


@given(call=calls())
def test_half_precision_rounds_the_reference_in_float64_once(call: CodedFFN) -> None:
    output, expected = coded_reference.coded_ffn(call), exact(call)
    largest = max(1.0, expected.abs().max().item())
    rounding = torch.finfo(call.x.dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=0.51 * rounding, atol=2e-4 * largest)


@every_k
@every_scale
@pytest.mark.parametrize(("thresholds", "fold"), [("none", False), ("none", True), ("mixed", False), ("all", True)])
def test_a_nan_makes_the_output_of_its_token_nan_and_of_no_other(
    k: int, relative: bool, thresholds: str, fold: bool
) -> None:
    call = small(k, (5,), thresholds=thresholds, relative=relative, fold=fold)
    call.x[2, 7] = torch.nan
    output = run(call)
    assert output[2].isnan().all()
    assert output[[0, 1, 3, 4]].isfinite().all()


@every_k
def test_a_nan_leaves_the_output_of_an_ffn_without_neurons_and_fold(k: int) -> None:
    call = small(k, fold=False)._replace(listed=torch.tensor([0]))
    call.x[:] = torch.nan
    assert torch.equal(run(call), call.bias.expand(3, 40))


@every_k
def test_the_op_changes_none_of_its_inputs(k: int) -> None:
    call = small(k, thresholds="all")
    x, site = call.x.clone(), prepare(call)
    output = torch.ops.tardis.coded_ffn(call.x, site, 40)
    assert torch.equal(x, call.x)
    assert torch.equal(site, prepare(call))
    assert output.data_ptr() not in (call.x.data_ptr(), site.data_ptr())


@every_k
def test_entries_after_the_listed_neurons_are_not_read(k: int) -> None:
    call = small(k, thresholds="all")
    expected = run(call)
    assert expected.isfinite().all()
    assert not torch.allclose(run(call._replace(listed=call.listed - 1)), expected)
    for name in ("columns", "column_refinements", "biases", "norms", "surrogate"):
        getattr(call, name)[20:] = 77
    for rows in (*call.projections, *call.refinements):
        rows[20:] = 77
    assert torch.equal(run(call), expected)


def replaced(call: CodedFFN, name: str, other: Any) -> CodedFFN:
    return call._replace(**{name: other})


def tensors(call: CodedFFN) -> Iterator[tuple[str, Tensor, Callable[[Tensor], CodedFFN]]]:
    """Names of all tensors of a call, and the call with another one in their place."""
    for name, value in call._asdict().items():
        if isinstance(value, Tensor):
            yield name, value, partial(replaced, call, name)
    for name in ("projections", "refinements"):
        rows = getattr(call, name)
        for i, matrix in enumerate(rows):

            def changed(other: Tensor, name: str = name, i: int = i) -> CodedFFN:
                rows = getattr(call, name)
                return replaced(call, name, [*rows[:i], other, *rows[i + 1 :]])

            yield name, matrix, changed


def misfits(tensor: Tensor) -> Iterator[Tensor]:
    """Tensors that differ from this one in dtype or shape."""
    yield tensor.to(torch.int16)
    yield tensor[None]
    yield tensor.new_zeros(())
    yield tensor[:-1]
    yield torch.cat([tensor, tensor[:1]])
    if tensor.ndim == 2:
        yield tensor[:, :-1]


@every_k
def test_a_tensor_of_another_dtype_or_shape_is_refused(k: int) -> None:
    call = small(k, ())  # of one token, because several could be any number
    for name, tensor, changed in tensors(call):
        for other in misfits(tensor):
            if name == "x" and other.is_floating_point() and other.shape[-1:] == call.x.shape:
                continue  # an axis of one token
            with pytest.raises(PlanMismatchError, match=r"of a rewritten FFN has|wrong number of axes"):
                prepare(changed(other))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation": "nothing"}, "unknown activation 'nothing'"),
        *[({name: width}, f"{name} is {width}; codes have 1 to 8 bits")
          for name in ("bits", "low_bits", "column_bits", "column_low_bits", "fold_bits") for width in (0, 9)],
        ({"fold": None}, "surrogates but no fold"),
        ({"surrogate": None}, "no surrogates"),
        ({"projections": []}, "0 projections and 2 refinements"),
        ({"refinements": []}, "2 projections and 0 refinements"),
    ],
)  # fmt: skip
def test_numbers_and_lists_that_the_op_does_not_take_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanMismatchError, match=message):
        prepare(small(2)._replace(**changed))


@pytest.mark.parametrize("listed", [-1, 24, 2**40, -(2**63)])
def test_a_list_longer_than_its_tensors_is_refused(listed: int) -> None:
    with pytest.raises(PlanMismatchError, match=f"lists {listed} neurons, with room for 23"):
        prepare(small()._replace(listed=torch.tensor([listed])))


@pytest.mark.parametrize("implementation", [torch.ops.tardis.coded_ffn, ops._coded_fake, ops._coded_ffn])
def test_bytes_that_are_no_prepared_site_of_the_input_are_refused(implementation: Callable[..., Tensor]) -> None:
    call = small()
    site = prepare(call)
    run(call)  # loads the kernel
    wrong = [(call.x, site[:8]), (call.x, site.flip(0)), (call.x[:, 1:], site), (call.x.half(), site)]
    if implementation is not ops._coded_ffn:  # whose types say so
        of_other_types = [(call.x, site.view(torch.int64)), (call.x.long(), site)]
        wrong = of_other_types if implementation is ops._coded_fake else wrong + of_other_types
    for x, site in wrong:
        with pytest.raises((PlanMismatchError, RuntimeError), match=r"prepared site|its site takes"):
            implementation(x, site, 40)


def test_a_site_on_another_device_is_refused() -> None:
    call = small()
    with pytest.raises(PlanMismatchError, match="a prepared site is on meta"):
        torch.ops.tardis.coded_ffn(call.x, prepare(call).to("meta"), 40)


def test_a_tensor_on_another_device_or_in_another_layout_is_refused() -> None:
    call = small()
    with pytest.raises(PlanMismatchError, match="on meta"):
        prepare(call._replace(fold=call.fold.to("meta")))  # type: ignore[union-attr]
    with pytest.raises(PlanMismatchError, match="sparse"):
        prepare(call._replace(columns=call.columns.to_sparse()))


@every_k
def test_doubt_is_the_root_mean_square_of_steps_up_and_down(k: int) -> None:
    z, noise = torch.randn(k, 4, 3, dtype=torch.float64), torch.rand(k, 3, dtype=torch.float64)
    slopes = torch.randn(3, k + 1, dtype=torch.float64)
    found = coded_reference.doubt([*z], coded_reference.values([*z], slopes, "identity"), [*noise], slopes, "identity")
    derivatives = [1 - slopes[:, 0]] if k == 1 else [z[1] - slopes[:, 0], z[0] - slopes[:, 1]]
    squares = sum((slope * step).square() for slope, step in zip(derivatives, noise, strict=True))
    torch.testing.assert_close(found, torch.as_tensor(squares).sqrt().expand(4, 3))
