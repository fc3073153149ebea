"""Inputs near the largest numbers, the smallest, infinities and NaN give what the reference gives.

The law, element by element of the output: where the reference in float64 has NaN or an infinity, the kernel has the same;
where it has a finite number, the kernel's is as near as ever. It holds for finite weights, wherever the absolute values
of the finite terms of each sum and product on the way add up to less than the largest float32; a weight in codes counts
as its scale times 2^bits. Beyond, float32 overflows in one order of a sum and not in another, for the reference as for
the kernel.
"""

import math

import pytest
import torch
from builders.correction import FLOATS, arguments, exact
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime.correction import Correction
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.packing import GROUP_SIZES, low_bits, split, spread


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    if cpu_build.load() is None:
        pytest.skip("no C++ compiler")


#: Largest absolute values of tokens.
SIZES = [0.0, 1e-45, 1e-38, 1e-30, 1.0, 1e18, 1e19, 1e30, 1e34, 1e36, 3.4e38]
SPECIAL = [math.inf, -math.inf, math.nan]


@st.composite
def calls(draw: st.DrawFn) -> Correction:
    dtype, k = draw(st.sampled_from(FLOATS)), draw(st.sampled_from([1, 2]))
    tokens = draw(st.integers(1, 16))
    d = draw(st.sampled_from([1, 2, 33, 64, 65, 130, 200]))
    bits = st.sampled_from([16, *range(1, 9)])
    op = arguments(
        k=k, shape=(tokens,), d=d, d_out=draw(st.sampled_from([1, 17, 64])), h=draw(st.sampled_from([1, 2, 40])),
        always=draw(st.sampled_from([0, 1, 40])), outliers=draw(st.sampled_from([0, 1])), dtype=dtype,
        bits=draw(st.integers(1, 8)), bias=draw(st.booleans()), activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        fold_bits=draw(bits), row_bits=draw(bits), group_size=draw(st.sampled_from(GROUP_SIZES)), fold=True,
        seed=draw(st.integers(0, 2**32)),
    )  # fmt: skip
    x = op.x.float()
    x /= x.abs().amax(1, keepdim=True).clamp(min=1e-3)
    most = min(torch.finfo(dtype).max, 3.4e38 if k == 1 else 1e18)
    for token in range(tokens):
        x[token] *= min(draw(st.sampled_from(SIZES)), most)
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
            x[token, draw(st.integers(0, d - 1))] = value
    op = op._replace(x=x.to(dtype))
    if op.row_bits == op.fold_bits == 16 and draw(st.booleans()):  # sums of x overflow, products do not
        for tensor in (*op.projections, op.scale, op.fold):
            assert tensor is not None
            tensor *= 2.0**-10
    return op


def matrices(op: Correction) -> tuple[list[Tensor], Tensor, Tensor]:
    """Bounds, in float64, on what x is multiplied with (predictor and row as one), on the fold, and on the columns."""
    assert op.fold is not None
    d, d_out, listed = op.x.shape[-1], op.folded.shape[-1], int(op.counts[0])
    rows, scale = op.neurons[:listed].long(), op.scale[:listed].double().nan_to_num() * 2**op.bits
    low = 16 if op.row_bits == 16 else low_bits(op.bits, op.row_bits)
    factors = [largest(p[rows], low, d) + spread(scale[:, i], d) for i, p in enumerate(op.projections)]
    return factors, largest(op.fold, op.fold_bits, d), largest(op.columns[rows], op.row_bits, d_out)


def largest(weight: Tensor, bits: int, columns: int) -> Tensor:
    """At most the absolute values of a matrix; of codes, of the scale times the code, and times the zero point."""
    if bits == 16:
        return weight.double().abs()
    return spread(split(weight, bits, columns)[1].double(), columns) * 2**bits  # type: ignore[no-any-return]


def bound(op: Correction, x: Tensor) -> Tensor:
    """[tokens, d_out]: at most what the absolute values of the terms of each output, and on the way to it, add up to.

    Args:
        op: the call.
        x: [tokens, d], float64: the absolute values of the inputs.
    """
    listed, k = int(op.counts[0]), len(op.projections)
    factors, fold, columns = matrices(op)
    biases = torch.zeros(listed, k) if op.biases is None else op.biases[:listed].double().abs()
    z = [x @ factor.T + bias + 1 for factor, bias in zip(factors, biases.T, strict=True)]
    affine = op.surrogate[:listed].abs() + (0 if k == 1 else op.guard[:listed, : k + 1].abs())
    responses = z[0].square() if op.activation == "relu2" else z[0]
    for other in z[1:]:
        responses = responses * other
    residuals = responses + sum(a * p for a, p in zip(affine.T, z, strict=False)) + affine[:, -1]
    sums: Tensor = residuals @ columns + x @ fold.T + op.folded.double().abs()
    return torch.maximum(sums, residuals.amax(1, keepdim=True))


@given(op=calls())
def test_the_kernel_gives_what_the_reference_gives(op: Correction) -> None:
    out, wanted = cpu.correct(op).double(), exact(op)
    x, dtype = op.x.double().abs(), op.x.dtype
    x = torch.where(x.isfinite(), x, 0)
    within = bound(op, x) < torch.finfo(torch.float32).max / 4
    error = 2.0**-11 * bound(op, x.amax(1, keepdim=True).expand(x.shape)) + 1e-30
    decided = (wanted.abs() - torch.finfo(dtype).max).abs() > error + wanted.abs() / 64  # else rounding decides
    expected = wanted.to(dtype).double()
    finite = expected.isfinite()
    same = torch.where(
        finite,
        (out - wanted).abs() <= error + torch.finfo(dtype).eps * wanted.abs(),
        (out == expected) | (out.isnan() & expected.isnan()),
    )
    wrong = within & ~same & (decided | ~wanted.isfinite())
    assert not wrong.any(), (out[wrong], wanted[wrong], error[wrong])
