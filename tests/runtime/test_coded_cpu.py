"""The CPU kernel of ``tardis::coded_ffn`` against the eager reference in float64."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from builders import coded
from builders.coded import HUGE, arguments, calls, every_scale, exact, levels, mapped, scaled, settle
from builders.correction import FLOATS, assert_agree, every_k
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.errors import ConfigError
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import coded_reference, tables
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import coded_layout
from tardis_fx.runtime.rotation import _blocks

few = calls()


def run(call: CodedFFN, *, threads: int = 2) -> Tensor:
    """The kernel and never the reference."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with mock.patch.object(coded_reference, "evaluate", side_effect=AssertionError("the reference was called")):
            return coded.run(call)
    finally:
        torch.set_num_threads(before)


def agree(call: CodedFFN, output: Tensor) -> None:
    """To the rounding of values that are multiplied with columns, 2^-15 of the largest of 128."""
    expected = exact(call)
    assert_agree(output, expected, atol=2e-4 * max(1.0, expected.abs().nan_to_num().max().item()))


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    if cpu_build.load() is None:
        pytest.skip("no C++ compiler")


@given(call=few, threads=st.integers(1, 4))
def test_the_kernel_agrees_with_the_reference(call: CodedFFN, threads: int) -> None:
    agree(call, run(call, threads=threads))


@every_k
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("thresholds", ["mixed", "all"])
def test_every_width_and_dtype_agrees(bits: int, dtype: torch.dtype, k: int, thresholds: str) -> None:
    widths = (bits, 9 - bits, bits, 9 - bits, bits)
    call = arguments(k=k, shape=(6,), dtype=dtype, widths=widths, activation="silu", thresholds=thresholds)
    call.noise[:] = 0.1 * 200**0.5  # no step is lost in rounding
    settle(call)
    agree(call, run(call))


@every_k
@every_scale
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_agrees(activation: str, k: int, relative: bool) -> None:
    call = arguments(k=k, shape=(9,), activation=activation, relative=relative)
    agree(call, run(call))


@every_k
@pytest.mark.parametrize("exponent", [-9, 3])
def test_relative_thresholds_make_the_output_of_a_relu_ffn_scale_with_its_input(exponent: int, k: int) -> None:
    call = arguments(k=k, shape=(9,), activation="relu", bias=False, fold=False, relative=True)
    call.bias[:] = 0
    assert levels(call).row.any()
    assert torch.equal(run(scaled(call, 2.0**exponent)), run(call) * 2.0 ** (k * exponent))


@every_k
def test_absolute_thresholds_give_neurons_that_do_not_depend_on_each_other(k: int) -> None:
    call = arguments(k=k, shape=(9,), activation="silu", listed=64, fold=False)
    call.bias[:] = 0
    last = mapped(lambda tensor: tensor[32:] if len(tensor) == 67 else tensor, call)
    halves = [run(half._replace(listed=torch.tensor([32]))) for half in (call, last)]
    torch.testing.assert_close(halves[0] + halves[1], run(call), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", cpu_build.capabilities())
@given(call=few)
def test_every_instruction_set_of_this_processor_agrees(name: str, call: CodedFFN) -> None:
    with instructions(name):
        agree(call, run(call))


@contextmanager
def instructions(name: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, TARDIS_FX_CPU_CAPABILITY=name):
        library = cpu_build.load()
        assert library is not None
        cpu_build._registered(library)
        yield
    best = cpu_build.load()
    assert best is not None
    cpu_build._registered(best)


def test_another_instruction_set_than_the_processor_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARDIS_FX_CPU_CAPABILITY", "avx1024")
    with pytest.raises(ConfigError, match=r"'avx1024', but this processor has .*portable"):
        cpu_build.load()


@given(call=few, threads=st.integers(1, 3))
def test_the_same_number_of_threads_gives_the_same_bits(call: CodedFFN, threads: int) -> None:
    assert torch.equal(run(call, threads=threads), run(call, threads=threads))


@every_k
@every_scale
def test_the_number_of_threads_changes_rounding_alone(k: int, relative: bool) -> None:
    call = arguments(k=k, shape=(3,), d=1024, d_out=256, listed=300, relative=relative, thresholds="all")
    one, two = (run(call, threads=threads) for threads in (1, 2))
    agree(call, two)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


@every_k
def test_no_tokens_give_no_output(k: int) -> None:
    assert run(arguments(k=k, shape=(2, 0), thresholds="all")).shape == (2, 0, 130)


@every_k
def test_a_strided_input_gives_the_same_bits(k: int) -> None:
    call = arguments(k=k, shape=(3, 2), activation="silu", thresholds="all")
    for strided in (torch.stack([call.x, call.x], -1)[..., 0], call.x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not strided.is_contiguous()
        assert torch.equal(run(call._replace(x=strided)), run(call))


@every_k
@every_scale
@pytest.mark.parametrize(("thresholds", "fold"), [("none", False), ("none", True), ("mixed", False), ("all", True)])
def test_a_nan_makes_the_output_of_its_token_nan_and_of_no_other(
    k: int, relative: bool, thresholds: str, fold: bool
) -> None:
    call = arguments(k=k, shape=(6,), thresholds=thresholds, relative=relative, fold=fold, activation="silu")
    call.x[2, 7] = torch.nan
    output = run(call)
    agree(call, output)
    assert output[2].isnan().all()
    assert output[[0, 1, 3, 4, 5]].isfinite().all()


@every_k
@every_scale
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize(("of", "value"), [("norms", torch.inf), ("norms", torch.nan), ("thresholds", torch.nan)])
def test_infinite_and_nan_norms_and_nan_thresholds_read_everything(
    k: int, relative: bool, activation: str, of: str, value: float
) -> None:
    call = arguments(k=k, shape=(6,), activation=activation, relative=relative)
    if of == "norms":
        call.norms[:40] = value
    else:
        call.thresholds[:] = value
    assert all(read.all() for read in levels(call)), "even where the gate is 0"
    agree(call, run(call))


@every_k
@every_scale
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_noise_of_0_gives_no_doubt(activation: str, k: int, relative: bool) -> None:
    call = arguments(k=k, shape=(8,), listed=200, activation=activation, relative=relative)
    call.noise[:] = 0
    call.thresholds[:] = 0
    assert levels(call).value.any()
    assert not levels(call).row.any()
    output = run(call)
    call.thresholds[-2] = HUGE  # reads no refinement of a projection
    assert torch.equal(run(call), output)


@every_k
@every_scale
def test_memory_of_old_reaches_no_output(k: int, relative: bool) -> None:
    call, deterministic = arguments(k=k, shape=(6,), relative=relative), torch.are_deterministic_algorithms_enabled()
    run(call._replace(x=torch.full_like(call.x, torch.nan)))
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        output = run(call)
    finally:
        torch.use_deterministic_algorithms(deterministic)
    agree(call, output)


@every_k
@every_scale
@pytest.mark.parametrize("changed", [{"shape": (33,)}, {"shape": (3, 40)}, {"dtype": torch.float64}], ids=str)
def test_many_tokens_and_double_precision_agree(changed: dict[str, Any], k: int, relative: bool) -> None:
    call = arguments(k=k, relative=relative, **changed)
    agree(call, run(call))


#: Numbers of a header behind the magic, and what the kernel must refuse.
NUMBERS: dict[str, Sequence[int]] = {
    "k": (-1, 0, 3, 2**40), "d": (-1, 0, 199, 2**40), "d_out": (-1, 129), "capacity": (-1, 0, 39, 2**60),
    "listed": (-1, 44), "activation": (-1, 1000), "relative": (-1, 2), "biased": (-1, 0, 2), "dtype": (-1, 1, 4),
    **dict.fromkeys(("bits", "low_bits", "column_bits", "column_low_bits", "fold_bits"), (-1, 9, 2**40)),
}  # fmt: skip


@every_k
@pytest.mark.parametrize("name", NUMBERS)
def test_the_kernel_refuses_a_damaged_header(k: int, name: str) -> None:
    call = arguments(k=k)
    at = 1 + coded_layout._NUMBERS.index(name)
    for value in NUMBERS[name]:
        site = coded_layout.prepare(call)
        site.view(torch.int64)[at] = value
        with pytest.raises(RuntimeError, match="prepared site"):
            torch.ops.tardis.coded_ffn(call.x, site, 130)


@every_k
def test_the_kernel_refuses_what_is_no_prepared_site_of_the_input(k: int) -> None:
    call = arguments(k=k)
    site = coded_layout.prepare(call)
    wrong = [
        site[:-64],
        site[:100],
        torch.cat([site, site]),
        site[None],
        site.view(torch.int64),
        site.flip(0),
        site[:0],
    ]
    for other in wrong:
        with pytest.raises(RuntimeError, match="prepared site"):
            torch.ops.tardis.coded_ffn(call.x, other, 130)
    for x, d_out in ((call.x, 129), (call.x[:, 1:], 130), (call.x.half(), 130), (call.x.long(), 130)):
        with pytest.raises(RuntimeError, match="prepared site"):
            torch.ops.tardis.coded_ffn(x, site, d_out)


@given(call=calls())
def test_codes_are_placed_alike_with_and_without_a_compiler(call: CodedFFN) -> None:
    with mock.patch.object(coded_layout, "_placed", return_value=None):
        expected = coded_layout.prepare(call)
    assert torch.equal(coded_layout.prepare(call), expected)


@given(call=calls())
def test_a_prepared_site_restores_its_call(call: CodedFFN) -> None:
    restored, listed = coded_layout.restore(call.x, coded_layout.prepare(call)), int(call.listed)
    for name, value in call._asdict().items():
        for old, new in zip(
            *(v if isinstance(v, list) else [v] for v in (value, getattr(restored, name))), strict=True
        ):
            if not isinstance(old, Tensor):
                assert old == new or (name == "fold_bits" and call.fold is None)
            elif len(old) == len(call.columns) and name not in ("bias", "signs", "out_signs", "fold", "x"):
                assert torch.equal(old[:listed], new[:listed])
            else:
                assert torch.equal(old, new)


#: Largest absolute values of tokens.
SIZES = [0.0, 1e-45, 1e-38, 1e-30, 1.0, 1e18, 1e19, 1e30, 1e34, 1e36, 3.4e38]
SPECIAL = [math.inf, -math.inf, math.nan]


@st.composite
def extremes(draw: st.DrawFn) -> CodedFFN:
    dtype, k, tokens = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([1, 2])), draw(st.integers(1, 16))
    d, seed = draw(st.sampled_from([1, 2, 33, 64, 65, 130, 200])), draw(st.integers(0, 2**32))
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed))
    x /= x.abs().amax(1, keepdim=True).clamp(min=1e-3)
    for token in range(tokens):
        x[token] *= min(draw(st.sampled_from(SIZES)), torch.finfo(dtype).max, 3.4e38 if k == 1 else 1e18)
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
            x[token, draw(st.integers(0, d - 1))] = value
    return arguments(
        k=k, x=x.to(dtype), d=d, d_out=draw(st.sampled_from([1, 17, 64, 130])), listed=draw(st.sampled_from([0, 1, 40])),
        dtype=dtype, widths=draw(st.tuples(*[st.integers(1, 8)] * 5)), fold=draw(st.booleans()),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))), bias=draw(st.booleans()),
        thresholds=draw(st.sampled_from(["none", "mixed"])), relative=draw(st.booleans()), seed=seed,
    )  # fmt: skip


def spread_over_blocks(x: Tensor) -> Tensor:
    """At most the absolute values on the way to a rotation."""
    spread = [
        x[:, start : start + count * size].unflatten(1, (count, size)).sum(2, keepdim=True).expand(-1, -1, size)
        for start, count, size in _blocks(x.shape[1])
    ]
    return torch.cat([sums.flatten(1) for sums in spread], 1)


def bound(call: CodedFFN) -> Tensor:
    """[tokens, d_out]: at most what the absolute values of the finite terms on the way to each output add up to."""
    k, listed, d, d_out = len(call.projections), int(call.listed), call.x.shape[1], len(call.bias)

    def weights(rows: Tensor, bits: int, columns: int) -> Tensor:
        return tables.weights(rows[:listed], bits, columns, torch.float64).abs()

    x = spread_over_blocks(torch.where(call.x.isfinite(), call.x.double().abs(), 0))
    biases = torch.zeros(listed, k) if call.biases is None else call.biases[:listed].abs()
    z = [
        x @ (weights(base, call.bits, d) + weights(low, call.low_bits, d)).T + bias + noise + 1
        for base, low, bias, noise in zip(
            call.projections, call.refinements, biases.T, coded_reference.noises(call, torch.float64), strict=True
        )
    ]
    values = math.prod(z[1:], start=z[0].square() if call.activation == "relu2" else z[0])
    if call.surrogate is not None:
        *slopes, intercept = call.surrogate[:listed].double().abs().T
        values = values + sum(slope * p for slope, p in zip(slopes, z, strict=True)) + intercept
    columns = weights(call.columns, call.column_bits, d_out)
    columns = columns + weights(call.column_refinements, call.column_low_bits, d_out)
    sums = values @ columns
    if call.fold is not None:
        sums = sums + x @ tables.weights(call.fold, call.fold_bits, d, torch.float64).abs().T
    sums = spread_over_blocks(sums) + call.bias.double().abs()
    return torch.maximum(sums, values.amax(1, keepdim=True)) if listed else sums


@given(call=extremes())
def test_extreme_inputs_give_what_the_reference_gives(call: CodedFFN) -> None:
    """NaN and infinity alike, and finite numbers as near as ever, where float32 overflows in no order of the sums."""
    output, wanted, most = run(call).double(), exact(call), bound(call)
    dtype, error = call.x.dtype, 2.0**-11 * most + 1e-30
    within = most < torch.finfo(torch.float32).max / 4
    decided = (wanted.abs() - torch.finfo(dtype).max).abs() > error + wanted.abs() / 64  # else rounding decides
    expected = wanted.to(dtype).double()
    same = torch.where(
        expected.isfinite(),
        (output - wanted).abs() <= error + torch.finfo(dtype).eps * wanted.abs(),
        (output == expected) | (output.isnan() & expected.isnan()),
    )
    wrong = within & ~same & (decided | ~wanted.isfinite())
    assert not wrong.any(), (output[wrong], wanted[wrong], error[wrong])
