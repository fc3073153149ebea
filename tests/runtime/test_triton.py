"""The Triton kernels against the eager reference in float64: on a GPU, or in Triton's interpreter.

``TRITON_INTERPRET=1 pytest tests/runtime/test_triton.py`` interprets; test_triton_without_gpu.py does so in a process of
its own, since Triton must know before it is first imported.
"""

import math
import os
from collections.abc import Callable, Iterator

import pytest
import torch
from builders.activations import ELU, LECUN_TANH, RELU6
from builders.correction import FLOATS, NOTHING, arguments, assert_right, every_k, exact, mapped
from builders.profile import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS, Activation
from tardis_fx.runtime import ops as _registered  # noqa: F401
from tardis_fx.runtime.correction import MOST_TOKENS, Correction
from tardis_fx.runtime.packing import GROUP_SIZES

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Fewer programs than outliers, so that each takes several, and so that the interpreter is done some day."""
    triton_op = pytest.importorskip("tardis_fx.runtime.cuda.op")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_op, "GATHERING", 3)
        patch.setattr(triton_op, "SHARES", 2)
        patch.setattr(triton_op, "SEGMENT", 16)
        for kernel in (triton_op.predict, triton_op.activate, triton_op.accumulate, triton_op.multiply):
            patch.setattr(kernel, "configs", kernel.configs[:1])  # else most of the time on a GPU is spent on tuning
        yield


def run(op: Correction) -> Tensor:
    """The kernels and never the reference, on memory full of NaN."""
    from tardis_fx.runtime.cuda import op as triton_op

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned)
        patch.setattr(torch.ops.tardis, "correct", None)  # which takes what the kernels do not
        return triton_op.correct(*mapped(lambda tensor: tensor.to(DEVICE), op)).cpu()


def poisoned(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of old."""
    return torch.full(shape, math.nan if dtype.is_floating_point else 2**30 + 1, dtype=dtype, device=device)


def agree(op: Correction) -> None:
    """A code is read as a fraction of 256, which costs float32 eight of its bits."""
    assert_right(run(op), op, exact(op), coded=2e-3)


@st.composite
def ops(draw: st.DrawFn) -> Correction:
    h = draw(st.sampled_from([1, 2, 30]))
    return arguments(
        k=draw(st.sampled_from([1, 2])),
        shape=draw(st.sampled_from([(), (1,), (1, 1), (2,), (3,), (2, 3)])),
        d=draw(st.sampled_from([1, 15, 63, 64, 65, 96, 128, 200])),
        d_out=draw(st.sampled_from([1, 2, 17, 64, 130, 192])),
        h=h,
        always=draw(st.sampled_from([0, 1, h // 3, h])),
        outliers=draw(st.sampled_from([0, 0.05, 0.5, 1])),
        dtype=draw(st.sampled_from(FLOATS)),
        bits=draw(st.integers(1, 8)),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        bias=draw(st.booleans()),
        fold_bits=draw(st.sampled_from([16, 16, 4, 8])),
        row_bits=draw(st.sampled_from([16, 16, 3, 4, 8])),
        group_size=draw(st.sampled_from(GROUP_SIZES)),
        fold=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


@settings(max_examples=examples(10))
@given(op=ops())
def test_the_kernels_agree_with_the_reference(op: Correction) -> None:
    agree(op)


@every_k
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_width_and_dtype_agrees(bits: int, dtype: torch.dtype, k: int) -> None:
    agree(arguments(k=k, shape=(2,), d=130, h=30, bits=bits, dtype=dtype))


@every_k
@pytest.mark.parametrize(("bits", "group_size"), [(3, 64), (4, 128), (8, 128)])
def test_every_width_of_fold_and_rows_agrees(bits: int, group_size: int, k: int) -> None:
    op = arguments(
        k=k, h=20, d=130, d_out=70, always=3, fold_bits=bits, row_bits=bits, group_size=group_size,
        dtype=torch.bfloat16,
    )  # fmt: skip
    agree(op)


@every_k
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_agrees(activation: str, k: int) -> None:
    agree(arguments(k=k, h=20, d=20, d_out=5, activation=activation, outliers=1))


def computed(activation: Activation, z: Tensor, function: object = None) -> Tensor:
    """The activation by Triton, in float64."""
    from builders.elementwise import elementwise

    from tardis_fx.runtime.cuda import activations as triton_activations

    function, moved = function or triton_activations.activation, z.float().to(DEVICE)
    out = torch.full_like(moved, 7.0)
    elementwise[(1,)](moved, out, len(z), FUNCTION=function, NAME=activation.name, SIZE=1 << (len(z) - 1).bit_length())
    return out.cpu().double()


def assert_computed(activation: Activation, computed: Callable[[Tensor], Tensor]) -> None:
    """Digits of small results and of a result for a large argument are kept; those lost to cancellation are few."""
    sides = torch.cat([torch.logspace(-37, 38, 400, dtype=torch.float64), torch.linspace(0.01, 12, 600).double()])
    z = torch.cat([-sides, torch.zeros(1).double(), sides]).float().double()
    expected = activation.eager(z)
    expected = expected.where(expected.abs() < torch.finfo(torch.float32).max, expected.sign() * math.inf)
    tolerance = 2e-6 * expected.abs() + 2e-7 * z.abs().clamp(max=16)
    error = (computed(z) - expected).abs()
    wrong = ~((error <= tolerance) | (computed(z) == expected))
    assert not wrong.any(), (z[wrong], computed(z)[wrong], expected[wrong])
    ends = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    limits = activation.eager(ends)  # NaN where torch multiplies infinity by 0
    assert torch.isclose(computed(ends), limits, rtol=1e-6, atol=0, equal_nan=True).all()
    assert computed(torch.tensor([math.nan])).isnan().all()


overflowing = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # of numpy, in the interpreter


@overflowing
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=lambda a: a.name)
def test_every_formula_agrees_with_the_eager_function_everywhere(activation: Activation) -> None:
    assert_computed(activation, lambda z: computed(activation, z))


@overflowing
@pytest.mark.parametrize("activation", [ELU, RELU6, LECUN_TANH], ids=lambda a: a.name)
def test_a_formula_generated_for_a_new_activation_agrees(activation: Activation) -> None:
    from tardis_fx.runtime.cuda.activations import generate

    function = generate([ACTIVATIONS["silu"], activation])
    assert_computed(activation, lambda z: computed(activation, z, function))


@every_k
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_with_no_outliers_the_folded_output_comes_back_bit_for_bit(dtype: torch.dtype, k: int) -> None:
    op = arguments(k=k, shape=(3,), d=70, h=60, outliers=0, dtype=dtype)
    assert torch.equal(run(op), op.folded)


@every_k
def test_with_an_empty_list_the_folded_output_comes_back(k: int) -> None:
    op = arguments(k=k, shape=(5,), h=60)._replace(counts=torch.tensor([0, 0]))
    assert torch.equal(run(op), op.folded)


@every_k
@pytest.mark.parametrize("always", [0, 200])
def test_every_neuron_may_be_an_outlier_of_every_token(always: int, k: int) -> None:
    agree(arguments(k=k, shape=(3,), d=70, h=30, always=always, outliers=1))


@every_k
def test_as_many_tokens_as_are_taken_agree(k: int) -> None:
    agree(arguments(k=k, shape=(MOST_TOKENS,), d=70, h=12, d_out=70, outliers=0.3))


@every_k
def test_outliers_may_all_lie_together_at_the_end(k: int) -> None:
    op = arguments(k=k, shape=(2,), d=70, h=90, outliers=0)
    op.guard[55:] = NOTHING[k]
    agree(op)


@every_k
def test_strided_arguments_give_the_same(k: int) -> None:
    op = arguments(k=k, shape=(2,), d=70, h=30)
    assert torch.equal(run(mapped(lambda tensor: torch.stack([tensor, tensor], -1)[..., 0], op)), run(op))


@every_k
@pytest.mark.parametrize("always", [0, 5])
def test_a_nan_estimate_is_no_outlier_and_a_nan_stays_with_its_token(always: int, k: int) -> None:
    op = arguments(k=k, shape=(6,), d=70, h=20, always=always)
    op.x[2, 7] = torch.nan
    out = run(op)
    assert_right(out, op, exact(op), coded=2e-3)
    assert out[2].isnan().all() == (always > 0)
    assert out[[0, 1, 3, 4, 5]].isfinite().all()


@every_k
def test_results_repeat_bit_for_bit(k: int) -> None:
    op = arguments(k=k, shape=(2,), d=70, h=20, d_out=70, outliers=0.5)
    assert torch.equal(run(op), run(op))
