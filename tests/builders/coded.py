"""Calls of ``tardis::coded_ffn`` in which rounding decides nothing, and what the reference makes of them in float64."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from builders.correction import FLOATS
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import coded_reference, tables
from tardis_fx.runtime.coded import CodedFFN, precision_width
from tardis_fx.runtime.packing import BLOCK, block_count
from tardis_fx.runtime.reference import compute_dtype, response
from tardis_fx.runtime.rotation import random_signs, rotate

#: A factor that exceeds every quantity but 0.
HUGE = torch.finfo(torch.bfloat16).max
#: How the factors of neurons are chosen: all 0, all huge, or each anew.
FACTORS = ("none", "all", "mixed")


def arguments(
    *,
    k: int = 1,
    shape: tuple[int, ...] = (1,),
    d: int = 200,
    d_out: int = 130,
    listed: int = 40,
    spare: int = 3,
    dtype: torch.dtype = torch.float32,
    widths: tuple[int, int, int, int, int] = (2, 3, 4, 2, 4),
    activation: str = "gelu",
    bias: bool = True,
    fold: bool = True,
    factors: str = "mixed",
    x: Tensor | None = None,
    seed: int = 0,
) -> CodedFFN:
    """A call whose factors lie where rounding cannot decide.

    ``widths`` are the bits of projections, refinements, columns, column refinements and fold. The capacity exceeds the
    list by ``spare`` entries of nonsense. Noises are about the size of the refinements' products, and some are 0.
    """
    random = torch.Generator().manual_seed(seed)
    capacity = listed + spare

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    def coded(rows: int, columns: int, bits: int, size: float) -> Tensor:
        codes = torch.randint(0, 2**bits, (rows, columns), generator=random).to(torch.uint8)
        return tables.join(codes, (size * (normal(rows).abs() + 1)).half(), bits)

    def nonsense(rows: Tensor) -> Tensor:
        rows[listed:] = 255 if rows.dtype is torch.uint8 else torch.nan
        return rows

    bits, low_bits, column_bits, column_low_bits, fold_bits = widths
    x = normal(*shape, d).to(dtype) if x is None else x
    projections = [nonsense(coded(capacity, d, bits, d**-0.5)) for _ in range(k)]
    refinements = [nonsense(coded(capacity, d, low_bits, d**-0.5 / 2**bits)) for _ in range(k)]
    columns = nonsense(coded(capacity, d_out, column_bits, (listed + 1) ** -0.5))
    column_refinements = nonsense(coded(capacity, d_out, column_low_bits, (listed + 1) ** -0.5 / 2**column_bits))
    call = CodedFFN(
        x=x, bias=normal(d_out).to(dtype), signs=random_signs(d, seed), out_signs=random_signs(d_out, seed + 1),
        listed=torch.tensor([listed]), projections=projections, refinements=refinements, columns=columns,
        column_refinements=column_refinements,
        biases=nonsense((normal(capacity, k) / 2).to(compute_dtype(dtype))) if bias else None,
        precision=nonsense((normal(capacity, precision_width(k)).exp() / 2**bits).bfloat16()),
        surrogate=nonsense((normal(capacity, k + 1) / 2).bfloat16()) if fold else None,
        fold=coded(d_out, d, fold_bits, d**-0.5) if fold else None,
        bits=bits, low_bits=low_bits, column_bits=column_bits, column_low_bits=column_low_bits, fold_bits=fold_bits,
        activation=activation,
    )  # fmt: skip
    call.precision[:listed, :k] *= torch.rand(listed, k, generator=random) < 0.8
    if factors == "mixed":
        mix_factors(call, random)
    else:
        call.precision[:listed, k:] = {"none": 0.0, "all": HUGE}[factors]
    return call


@st.composite
def calls(draw: st.DrawFn, *, most_tokens: int = 20) -> CodedFFN:
    """Random calls of up to ``most_tokens`` tokens."""
    tokens = draw(st.integers(1, most_tokens))
    return arguments(
        k=draw(st.sampled_from([1, 2])),
        shape=draw(st.sampled_from([(tokens,), (1, tokens), ()])),
        d=draw(st.sampled_from([1, 2, 15, 63, 64, 65, 96, 127, 128, 160, 192, 200, 256, 300, 1100])),
        d_out=draw(st.sampled_from([1, 2, 17, 64, 96, 128, 130, 192])),
        listed=draw(st.sampled_from([0, 1, 2, 40, 150])),
        dtype=draw(st.sampled_from(FLOATS)),
        widths=draw(st.tuples(*[st.integers(1, 8)] * 5)),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        bias=draw(st.booleans()),
        fold=draw(st.booleans()),
        factors=draw(st.sampled_from(["none", "mixed", "mixed", "mixed"])),
        seed=draw(st.integers(0, 2**32)),
    )


def mix_factors(call: CodedFFN, random: torch.Generator) -> None:
    """Makes a third of the factors 0, a third huge, and lets the others tell some tokens from others.

    A factor becomes 0 if the kernel's rounding could decide with it.
    """
    k, listed = len(call.projections), int(call.listed)
    for column, bounds in enumerate(quantities(call), k):
        least, most = bounds
        middle = ((least + most) / 2).nan_to_num(1, 1, 1).clamp(1e-20, 1e20).sort(0).values
        rank = int(torch.randint(0, len(middle), (), generator=random))
        between = middle[rank : rank + 2].log().mean(0).neg().exp()
        choice = torch.randint(0, 3, (listed,), generator=random)
        factors = torch.where(choice == 0, between, torch.where(choice == 1, HUGE, 0.0)).bfloat16()
        decided = ~(least * factors.double() <= 1) == ~(most * factors.double() <= 1)
        call.precision[:listed, column] = torch.where(decided.all(0), factors, 0)


class Bounds(NamedTuple):
    """The least and the most, [tokens, listed], that a quantity may be in a kernel."""

    least: Tensor
    most: Tensor


def quantities(call: CodedFFN) -> list[Bounds]:
    """What the factors of neurons are multiplied with, in their order: of the gate, of value, row and column.

    Estimates may be off by :func:`margin`, and sums of the responses and the surrogates by rounding in float32.
    """
    call, k, listed = doubled(call), len(call.projections), int(call.listed)
    x = rotate(call.x.reshape(-1, call.x.shape[-1]), call.signs)
    z = coded_reference.estimates(call, x)
    noise = call.precision[:listed, :k].double().unbind(1)
    surrogate = None if call.surrogate is None else call.surrogate[:listed].double()
    off = [margin(x, rows[:listed], call.bits) for rows in call.projections]
    corners = []
    for steps in itertools.product((-1, 0, 1), repeat=k):
        moved = [p + step * error for p, step, error in zip(z, steps, off, strict=True)]
        value = coded_reference.values(moved, surrogate, call.activation).abs()
        change = coded_reference.doubt(moved, noise, surrogate, call.activation)
        gates = [response(moved[:1], call.activation).abs()] * (k - 1)
        corners.append([*gates, torch.hypot(value, change), change, value])
    size = response(z, call.activation).abs() + 1
    for slope, p in zip(surrogate.T if surrogate is not None else (), z, strict=False):
        size = size + (slope * p).abs()
    return [_bounds(torch.stack(column), 1e-5 * size) for column in zip(*corners, strict=True)]


def _bounds(corners: Tensor, rounding: Tensor) -> Bounds:
    """Bounds of a quantity, which has a value at each corner; one that is 0 at all of them is 0 in a kernel."""
    least, most = corners.amin(0), corners.amax(0)
    return Bounds((least - rounding).clamp(min=0), torch.where(most == 0, 0, most + rounding))


def margin(x: Tensor, rows: Tensor, bits: int) -> Tensor:
    """[tokens, rows]: what products may err by in float32, with x rounded to 2^-13 of its block's largest."""
    columns = x.shape[-1]
    weights = tables.weights(rows, bits, columns, torch.float64).abs()
    padded = torch.nn.functional.pad(x.abs(), (0, -columns % BLOCK)).view(len(x), block_count(columns), BLOCK)
    rounded = padded.amax(-1, keepdim=True).expand(padded.shape).reshape(len(x), -1)[:, :columns]
    error: Tensor = (2.0**-13 * rounded + 2.0**-20 * x.abs()) @ weights.T
    return error.where(error.isfinite(), 0)


def mapped(change: Callable[[Tensor], Tensor], call: CodedFFN) -> CodedFFN:
    """A call with each of its tensors changed."""
    changed: CodedFFN = tree_map_only(Tensor, change, call)
    return changed


def doubled(call: CodedFFN) -> CodedFFN:
    """In float64."""
    biases = None if call.biases is None else call.biases.double()
    return call._replace(x=call.x.double(), bias=call.bias.double(), biases=biases)


def exact(call: CodedFFN) -> Tensor:
    """The reference, in float64."""
    return coded_reference.coded_ffn(doubled(call))


def levels(call: CodedFFN) -> coded_reference.Levels:
    """Which parts of the listed neurons are read, in float64."""
    return coded_reference.parts_read(doubled(call))
