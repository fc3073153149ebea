"""Inputs near the largest numbers, the smallest, infinities and NaN give what the reference gives.

The law, element by element of the output: where the reference in float64 has NaN or an infinity, the kernel has the same;
where it has a finite number, the kernel's is as near as ever. It holds for finite weights, wherever the absolute values
of the finite terms of each sum and product on the way add up to less than the largest float32; a weight in codes counts
as its scale times 2^bits. Beyond, float32 overflows in one order of a sum and not in another, for the reference as for
the kernel.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from builders import correction, gated_correction
from builders.correction import FLOATS, Arguments
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime.cpu import build as cpu_build
from tardis_fx.runtime.cpu import gated as cpu_gated
from tardis_fx.runtime.cpu import op as cpu
from tardis_fx.runtime.packing import GROUP_SIZES, low_bits, split, spread

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module", autouse=True)
def kernel() -> None:
    if cpu_build.load() is None:
        pytest.skip("no C++ compiler")


#: Largest absolute values of tokens.
SIZES = [0.0, 1e-45, 1e-38, 1e-30, 1.0, 1e18, 1e19, 1e30, 1e34, 1e36, 3.4e38]
SPECIAL = [math.inf, -math.inf, math.nan]


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, Arguments]:
    kind = draw(st.sampled_from(["plain", "gated"]))
    make: Callable[..., Arguments] = {"plain": correction.arguments, "gated": gated_correction.arguments}[kind]
    dtype = draw(st.sampled_from(FLOATS))
    tokens = draw(st.integers(1, 16))
    d = draw(st.sampled_from([1, 2, 33, 64, 65, 130, 200]))
    bits = st.sampled_from([16, *range(1, 9)])
    op = make(
        shape=(tokens,), d=d, d_out=draw(st.sampled_from([1, 17, 64])), h=draw(st.sampled_from([1, 2, 40])),
        always=draw(st.sampled_from([0, 1, 40])), outliers=draw(st.sampled_from([0, 1])), dtype=dtype,
        bits=draw(st.integers(1, 8)), bias=draw(st.booleans()), activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        fold_bits=draw(bits), row_bits=draw(bits), group_size=draw(st.sampled_from(GROUP_SIZES)), fold=True,
        seed=draw(st.integers(0, 2**32)),
    )  # fmt: skip
    x = op["x"].float()  # type: ignore[union-attr]
    x /= x.abs().amax(1, keepdim=True).clamp(min=1e-3)
    most = min(torch.finfo(dtype).max, 1e18 if kind == "gated" else 3.4e38)
    for token in range(tokens):
        x[token] *= min(draw(st.sampled_from(SIZES)), most)
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=2)):
            x[token, draw(st.integers(0, d - 1))] = value
    op["x"] = x.to(dtype)
    if op["row_bits"] == op["fold_bits"] == 16 and draw(st.booleans()):  # sums of x overflow, products do not
        for name in {"w1", "gate", "up", "fold", "scale"} & op.keys():
            op[name] = op[name] * 2.0**-10  # type: ignore[operator]
    return kind, op


def matrices(kind: str, op: Arguments) -> tuple[list[Tensor], Tensor, Tensor]:
    """Bounds, in float64, on what x is multiplied with (predictor and row as one), on the fold, and on W2."""
    get: Any = op
    d, d_out, listed, row_bits = get["x"].shape[-1], get["folded"].shape[-1], int(get["counts"][0]), get["row_bits"]
    rows, names = get["neurons"][:listed].long(), ["w1"] if kind == "plain" else ["gate", "up"]
    scale = get["scale"][:listed].view(listed, len(names), -1).double().nan_to_num() * 2 ** get["bits"]
    low = 16 if row_bits == 16 else low_bits(get["bits"], row_bits)
    factors = [largest(get[name][rows], low, d) + spread(scale[:, i], d) for i, name in enumerate(names)]
    return factors, largest(get["fold"], get["fold_bits"], d), largest(get["w2t"][rows], row_bits, d_out)


def largest(weight: Tensor, bits: int, columns: int) -> Tensor:
    """At most the absolute values of a matrix; of codes, of the scale times the code, and times the zero point."""
    if bits == 16:
        return weight.double().abs()
    return spread(split(weight, bits, columns)[1].double(), columns) * 2**bits


def bound(kind: str, op: Arguments, x: Tensor) -> Tensor:
    """[tokens, d_out]: at most what the absolute values of the terms of each output, and on the way to it, add up to.

    Args:
        kind: plain or gated.
        op: the call.
        x: [tokens, d], float64: the absolute values of the inputs.
    """
    get: Any = op
    listed = int(get["counts"][0])
    factors, fold, w2t = matrices(kind, op)

    def activated(z: Tensor) -> Tensor:
        return z.square() if get["activation"] == "relu2" else z

    if kind == "plain":
        bias = 0 if get["b1"] is None else get["b1"][get["neurons"][:listed].long()].double().abs()
        z = x @ factors[0].T + bias + 1
        residuals = activated(z) + get["slope"][:listed].abs() * z + get["intercept"][:listed].abs()
    else:
        biases = torch.zeros(listed, 2) if get["biases"] is None else get["biases"][:listed].double().abs()
        g, u = (x @ factor.T + bias + 1 for factor, bias in zip(factors, biases.T, strict=True))
        planes = get["guard"][:listed, :3].abs() + get["surrogate"][:listed].abs()
        residuals = activated(g) * u + planes[:, 0] * g + planes[:, 1] * u + planes[:, 2]
    sums: Tensor = residuals @ w2t + x @ fold.T + get["folded"].double().abs()
    return torch.maximum(sums, residuals.amax(1, keepdim=True))


@given(call=calls())
def test_the_kernel_gives_what_the_reference_gives(call: tuple[str, Arguments]) -> None:
    kind, op = call
    out = (cpu if kind == "plain" else cpu_gated).correct(**op).double()  # type: ignore[arg-type]
    exact = (correction if kind == "plain" else gated_correction).exact(op)
    x, dtype = op["x"].double().abs(), op["x"].dtype  # type: ignore[union-attr]
    x = torch.where(x.isfinite(), x, 0)
    within = bound(kind, op, x) < torch.finfo(torch.float32).max / 4
    error = 2.0**-11 * bound(kind, op, x.amax(1, keepdim=True).expand(x.shape)) + 1e-30
    decided = (exact.abs() - torch.finfo(dtype).max).abs() > error + exact.abs() / 64  # else rounding decides
    expected = exact.to(dtype).double()
    finite = expected.isfinite()
    same = torch.where(
        finite,
        (out - exact).abs() <= error + torch.finfo(dtype).eps * exact.abs(),
        (out == expected) | (out.isnan() & expected.isnan()),
    )
    wrong = within & ~same & (decided | ~exact.isfinite())
    assert not wrong.any(), (out[wrong], exact[wrong], error[wrong])
