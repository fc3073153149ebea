"""Arguments of the correction op, and what the reference makes of them in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tardis_fx.runtime import reference
from tardis_fx.runtime.correction import Correction, guard_width
from tardis_fx.runtime.packing import BLOCK, block_count, group_count, join, low_bits, pack, spread

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
#: Projections of a neuron: of a plain and of a gated FFN.
every_k = pytest.mark.parametrize("k", [1, 2])


def arguments(
    *,
    k: int = 1,
    shape: tuple[int, ...] = (1,),
    d: int = 200,
    d_out: int = 130,
    h: int = 400,
    always: int = 0,
    outliers: float = 0.1,
    dtype: torch.dtype = torch.float32,
    bits: int = 2,
    activation: str = "gelu",
    bias: bool = True,
    fold_bits: int = 16,
    row_bits: int = 16,
    group_size: int = 64,
    fold: bool = False,
    seed: int = 0,
) -> Correction:
    """A call of the op whose guard lies where rounding cannot decide.

    The bounds of one estimate leave about the share of ``outliers`` outside; thresholds of scores are drawn, and only 0
    or 1 moves all of them out of reach. A third of the neurons is on no list, ``always`` of the others are corrected
    always (with rows of codes, by a guard that nothing meets), and the capacity exceeds the list by three entries of
    nonsense. Rows of codes of neurons that are on no list hold nonsense, too. A folded weight that is no codes is given
    only with ``fold``.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    def coded(rows: int, columns: int, bits: int, fan_in: int) -> tuple[Tensor, Tensor, Tensor]:
        size = (rows, group_count(columns, group_size))
        scale = (normal(*size).abs() + 1) * 2 / fan_in**0.5 / (2**bits - 1)
        zero = torch.randint(0, 2**bits, size, generator=random).to(torch.uint8)
        codes = torch.randint(0, 2**bits, (rows, columns), generator=random).to(torch.uint8)
        return pack(codes, bits), scale.half(), zero

    listed = math.ceil(h * 2 / 3)
    guarded, capacity = max(listed - always, 0) if row_bits == 16 else listed, listed + 3
    neurons = torch.full((capacity,), 2**30, dtype=torch.int32)
    neurons[:listed] = torch.randperm(h, generator=random)[:listed]
    codes, scale, zero = (t.unflatten(0, (capacity, k)) for t in coded(k * capacity, d, bits, d))
    scale[guarded:] = torch.nan
    x, surrogate = normal(*shape, d).to(dtype), normal(capacity, k + 1)
    biases = (normal(capacity, k) / 2).to(reference.compute_dtype(dtype))
    projections = [(normal(h, d) / d**0.5).to(dtype) for _ in range(k)]
    columns = (normal(h, d_out) / h**0.5).to(dtype)
    whole = (normal(d_out, d) / d**0.5).to(dtype) if fold else None
    weight = join(*coded(d_out, d, fold_bits, d)) if fold_bits < 16 else whole
    if row_bits < 16:
        projections = [join(*coded(h, d, low_bits(bits, row_bits), d)) for _ in range(k)]
        columns = join(*coded(h, d_out, row_bits, h))
        for rows in (*projections, columns):
            rows[torch.ones(h, dtype=torch.bool).index_fill(0, neurons[:listed].long(), False)] = 255  # NaN
    call = Correction(
        folded=normal(*(shape if weight is None else ()), d_out).to(dtype), x=x, projections=projections,
        columns=columns, counts=torch.tensor([listed, guarded]), neurons=neurons, codes=codes, scale=scale, zero=zero,
        biases=biases if bias else None, guard=torch.full((capacity, guard_width(k)), torch.nan), surrogate=surrogate,
        bits=bits, activation=activation, fold=weight, fold_bits=fold_bits, row_bits=row_bits,
    )  # fmt: skip
    (bounds if k == 1 else thresholds)(call, outliers, random)
    if row_bits < 16:
        call.guard[listed - min(always, listed) : listed] = NOTHING[k]
    return call


#: A guard that no estimate and no score meets.
NOTHING = {1: torch.tensor([math.inf, -math.inf]), 2: torch.tensor([0, 0, 0, -math.inf])}


def estimates(call: Correction) -> list[Tensor]:
    """Of the guarded neurons, in float64."""
    return reference.estimates(doubled(call), call.x.reshape(-1, call.x.shape[-1]).double(), int(call.counts[1]))


def bounds(call: Correction, outliers: float, random: torch.Generator) -> None:
    """Sets lower and upper bounds to which no estimate comes so close that rounding could decide."""
    (z_hat,), guarded = estimates(call), int(call.counts[1])
    lower, upper = call.guard[:guarded].unbind(1)
    lower[:], upper[:] = -math.inf, math.inf
    if z_hat.numel() and outliers:
        lower[:], upper[:] = z_hat.quantile(outliers / 2).float(), z_hat.quantile(1 - outliers / 2).float()
    if outliers == 1:
        call.guard[:guarded] = math.inf
    near = margin(call.x.reshape(-1, call.x.shape[-1]).double(), call.scale[:guarded, 0].double(), call.bits)
    for _ in range(100):
        low, high = (z_hat - lower).abs() <= near, (z_hat - upper).abs() <= near
        if not (low.any() or high.any()):
            return
        lower -= torch.where(low, near, 0).sum(0).float()
        upper += torch.where(high, near, 0).sum(0).float()
    raise AssertionError("no place for the bounds")


def thresholds(call: Correction, outliers: float, random: torch.Generator) -> None:
    """Draws planes, and sets thresholds in the middle of the widest gap of every neuron's scores, or beyond all."""
    guarded, width = int(call.counts[1]), call.guard.shape[1]
    call.guard[:guarded] = torch.randn(guarded, width, generator=random)
    z = reference.biased(estimates(call), call.biases, guarded)
    scores = reference.surrogate_error(z, call.guard[:guarded, :-1], reference.response(z, call.activation)).abs()
    if not scores.numel() or outliers in (0, 1):
        call.guard[:guarded, -1] = -math.inf if outliers else math.inf
        return
    below, above = torch.zeros_like(scores[0]), 2 * scores.amax(0) + 1
    ordered = torch.stack([below, *scores.sort(0).values])
    gaps = ordered.diff(dim=0) / above
    widest, where = gaps.max(0)
    middle = (ordered.gather(0, where[None]) + ordered.gather(0, where[None] + 1))[0] / 2
    out_of_reach = (widest < 0.02) | (torch.rand(len(below), generator=random) < 0.3)
    call.guard[:guarded, -1] = torch.where(out_of_reach, above, middle).float()


def margin(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """[tokens, guarded]: what an estimate may err by in float32 and with x rounded to 2^-13 of its block's largest."""
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x.abs(), (0, -columns % BLOCK)).view(len(x), block_count(columns), BLOCK)
    error: Tensor = padded.amax(-1) * BLOCK * 2**-13 + padded.sum(-1) * 2**-20
    largest: Tensor = error @ (spread(scale, columns)[:, ::BLOCK] * 2**bits).T
    return largest


def mapped(change: Callable[[Tensor], Tensor], call: Correction) -> Correction:
    """A call with each of its tensors changed."""
    changed: Correction = tree_map_only(Tensor, change, call)
    return changed


def doubled(call: Correction) -> Correction:
    """In float64."""
    return mapped(lambda tensor: tensor.double() if tensor.dtype in FLOATS else tensor, call)


def exact(call: Correction) -> Tensor:
    """The reference, in float64."""
    return reference.correct(doubled(call))


def assert_agree(out: Tensor, expected: Tensor, *, atol: float = 2e-4) -> None:
    assert out.shape == expected.shape
    rounding = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=0.51 * rounding, atol=atol, equal_nan=True)


def assert_right(out: Tensor, call: Correction, expected: Tensor, *, coded: float) -> None:
    """A kernel's output: off by at most ``coded`` of the largest where x meets codes, else by rounding in float32."""
    largest = expected.abs().nan_to_num().max().item() if expected.numel() else 0
    whole = call.fold_bits == call.row_bits == 16
    assert_agree(out, expected, atol=(2e-4 if whole else coded) * max(1.0, largest))
