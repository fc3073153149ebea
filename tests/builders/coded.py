"""Calls of ``tardis::coded_ffn`` in which rounding decides nothing, and what the reference makes of them in float64."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from builders.correction import FLOATS
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime import coded_reference, tables
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.cpu import build
from tardis_fx.runtime.cpu.coded_layout import prepare
from tardis_fx.runtime.reference import response
from tardis_fx.runtime.rotation import random_signs

#: A threshold that no contribution of ordinary tokens exceeds.
HUGE = torch.finfo(torch.float32).max

every_scale = pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])


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
    thresholds: str = "mixed",
    relative: bool = False,
    x: Tensor | None = None,
    seed: int = 0,
) -> CodedFFN:
    """A call in which rounding decides nothing.

    ``thresholds`` are those that read everything (``"all"``), almost nothing (``"none"``: what is infinite or NaN, or
    larger than 0 while the scale is 0), or a share of each part (``"mixed"``). ``widths`` are the bits of projections,
    refinements, columns, column refinements and fold. The capacity exceeds the list by ``spare`` entries of nonsense.
    Noises are about the size of the refinements' products.
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
        biases=nonsense((normal(capacity, k) / 2).to(dtype)) if bias else None,
        norms=nonsense(normal(capacity, k).exp().bfloat16()),
        noise=normal(k).exp() * d**0.5 / 2**bits,
        thresholds=torch.full((k + 2,), -torch.inf if thresholds == "all" else HUGE),
        surrogate=nonsense((normal(capacity, k + 1) / 2).bfloat16()) if fold else None,
        fold=coded(d_out, d, fold_bits, d**-0.5) if fold else None,
        bits=bits, low_bits=low_bits, column_bits=column_bits, column_low_bits=column_low_bits, fold_bits=fold_bits,
        activation=activation, relative=relative,
    )  # fmt: skip
    if thresholds == "mixed":
        draw_thresholds(call, random)
    settle(call)
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
        thresholds=draw(st.sampled_from(["none", "mixed", "mixed", "mixed"])),
        relative=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def draw_thresholds(call: CodedFFN, random: torch.Generator) -> None:
    """Draws each threshold near or below a contribution to a token, so that some parts are read and some are not."""
    contributions, scale = bounds(call, quantities(call))
    for part, contribution in enumerate(contributions):
        share = contribution.most / scale.most
        share = share[share.isfinite() & (share > 0)]
        if len(share):
            near = share[torch.randint(0, len(share), (), generator=random)].log()
            call.thresholds[part] = (near - 1 + torch.randn((), generator=random) / 2).exp().clamp(1e-20, 1e20)


def settle(call: CodedFFN) -> None:
    """Makes norms 0 until rounding in a kernel decides nowhere."""
    k, listed, drawn = len(call.projections), int(call.listed), quantities(call)
    columns = [*range(k - 1), *[k - 1] * 3]  # of the norms, by part
    settled = False
    while not settled:
        settled = True
        contributions, scale = bounds(call, drawn)
        for column, contribution, threshold in zip(columns, contributions, call.thresholds.double(), strict=True):
            surely = exceeds(contribution.least, threshold * scale.most)
            perhaps = exceeds(contribution.most, threshold * scale.least)
            factor = call.norms[:listed, column]
            unsettled = (surely != perhaps).any(0) & (factor != 0)
            factor[unsettled] = 0
            settled = settled and not unsettled.any()


def exceeds(contribution: Tensor, limit: Tensor) -> Tensor:
    """Whether a part is read."""
    return ~((contribution <= limit) & (contribution < torch.inf))


class Quantity(NamedTuple):
    """What a norm is multiplied with: its values, [corners, tokens, listed], the first one exact, and their rounding."""

    corners: Tensor
    rounding: Tensor


class Quantities(NamedTuple):
    """The quantities in contributions; with k = 1, only the scale depends on the first response."""

    first: Quantity
    total: Quantity
    change: Quantity
    value: Quantity


def quantities(call: CodedFFN) -> Quantities:
    """The quantities in the contributions of a call.

    Estimates may be off by :func:`margin`, and sums of responses and surrogates by rounding in float32.
    """
    call, k, listed = doubled(call), len(call.projections), int(call.listed)
    x = coded_reference._rotated(call)
    z = coded_reference.estimates(call, x)
    noise = coded_reference.noises(call, torch.float64)
    surrogate = None if call.surrogate is None else call.surrogate[:listed].double()
    off = [margin(x, rows[:listed], call.bits) for rows in call.projections]
    corners = []
    for steps in itertools.product((0, -1, 1), repeat=k):
        moved = [p + step * error for p, step, error in zip(z, steps, off, strict=True)]
        value = coded_reference.values(moved, surrogate, call.activation)
        change = coded_reference.doubt(moved, value, noise, surrogate, call.activation)
        corners.append([response(moved[:1], call.activation).abs(), torch.hypot(value, change), change, value.abs()])
    first = corners[0][0] + z[0].abs().clamp(max=100)  # beyond, activations are 0 or no smaller than z
    size = first * math.prod(p.abs() for p in z[1:]) + corners[0][2]
    if surrogate is not None:
        size = size + surrogate[:, -1].abs() + sum((s * p).abs() for s, p in zip(surrogate.T, z, strict=False))
    columns = [torch.stack(column) for column in zip(*corners, strict=True)]
    sizes = [first, size, size, size]
    return Quantities(*(Quantity(column, 1e-5 * of) for column, of in zip(columns, sizes, strict=True)))


class Bounds(NamedTuple):
    """The least and the most that something may be in a kernel: [tokens, listed], or [tokens, 1]."""

    least: Tensor
    most: Tensor


def bounds(call: CodedFFN, drawn: Quantities) -> tuple[list[Bounds], Bounds]:
    """The contributions of parts, in the order of thresholds, and the scales of tokens."""
    k = len(call.projections)
    factors = call.norms[: int(call.listed)].double().unbind(1)
    first = _bounds(drawn.first, factors[0])
    scale = Bounds(*(end.square().sum(1, keepdim=True).sqrt() for end in first))
    if not call.relative:
        scale = Bounds(torch.ones_like(scale.least), torch.ones_like(scale.most))
    others = [_bounds(quantity, factors[-1]) for quantity in (drawn.total, drawn.change, drawn.value)]
    return [*[first] * (k - 1), *others], scale


def _bounds(quantity: Quantity, factor: Tensor) -> Bounds:
    """Bounds of a quantity times a factor.

    Between corners, it may exceed the values there by half of their spread, as where its sign changes. What is 0 at all
    corners is 0 in a kernel, and what is infinite or NaN is that in a kernel.
    """
    corners, rounding = quantity
    exact, least, most = corners[0] * factor, corners.amin(0), corners.amax(0)
    beyond = (most - least) / 2 + rounding
    least, most = least - beyond, most + beyond
    same = (corners == 0).all(0) | (factor == 0) | ~exact.isfinite()
    return Bounds(torch.where(same, exact, least.clamp(min=0) * factor), torch.where(same, exact, most * factor))


def margin(x: Tensor, rows: Tensor, bits: int) -> Tensor:
    """[tokens, rows]: what products may err by in float32."""
    error: Tensor = 2.0**-20 * x.abs() @ tables.weights(rows, bits, x.shape[-1], torch.float64).abs().T
    return error.where(error.isfinite(), 0)


def scaled(call: CodedFFN, factor: float) -> CodedFFN:
    """A call with the input multiplied by a factor, and with what grows with the input: noises, and the gated norm."""
    k = len(call.projections)
    norms = call.norms.clone()
    norms[:, : k - 1] *= factor
    return call._replace(x=call.x * factor, norms=norms, noise=call.noise * factor)


def mapped(change: Callable[[Tensor], Tensor], call: CodedFFN) -> CodedFFN:
    """A call with each of its tensors changed."""
    changed: CodedFFN = tree_map_only(Tensor, change, call)
    return changed


def doubled(call: CodedFFN) -> CodedFFN:
    """In float64."""
    biases = None if call.biases is None else call.biases.double()
    return call._replace(x=call.x.double(), bias=call.bias.double(), biases=biases)


def run(call: CodedFFN) -> Tensor:
    """The op, with its kernel if there is a compiler."""
    build.load()
    output: Tensor = torch.ops.tardis.coded_ffn(call.x, prepare(call), len(call.bias))
    return output


def exact(call: CodedFFN) -> Tensor:
    """The reference, in float64."""
    return coded_reference.coded_ffn(doubled(call))


def levels(call: CodedFFN) -> coded_reference.Levels:
    """Which parts of the listed neurons are read, in float64."""
    return coded_reference.parts_read(doubled(call))
