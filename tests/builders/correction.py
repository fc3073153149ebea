"""Arguments of the correction op, and what the reference makes of them in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tardis_fx.runtime import reference
from tardis_fx.runtime.packing import BLOCK, block_count, group_count, join, low_bits, pack, spread

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
Arguments = dict[str, Tensor | int | str | None]


def arguments(
    *,
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
) -> Arguments:
    """The arguments of the op, with bounds that leave about the given share of the estimates outside.

    Rows of codes of neurons that are on no list hold nonsense. A third of the neurons is on no list, ``always`` of the
    others are corrected always (with rows of codes, by bounds that nothing meets), and the capacity exceeds the list by
    three entries of nonsense. A folded weight that is no codes is given only with ``fold``.
    """
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    listed = math.ceil(h * 2 / 3)
    guarded = max(listed - always, 0) if row_bits == 16 else listed
    capacity = listed + 3
    x, w1 = normal(*shape, d).to(dtype), (normal(h, d) / d**0.5).to(dtype)
    neurons = torch.full((capacity,), 2**30, dtype=torch.int32)
    neurons[:listed] = torch.randperm(h, generator=random)[:listed]
    top = 2**bits - 1
    scale = torch.full((capacity, group_count(d, group_size)), torch.nan, dtype=torch.float16)
    scale[:guarded] = (normal(guarded, group_count(d, group_size)).abs() + 1) * 2 / (d**0.5 * top)
    zero = torch.randint(0, top + 1, (capacity, group_count(d, group_size)), generator=random).to(torch.uint8)
    codes = pack(torch.randint(0, top + 1, (capacity, d), generator=random).to(torch.uint8), bits)
    lower, upper = bounds(x.reshape(-1, d), codes[:guarded], scale[:guarded], zero[:guarded], bits, outliers, capacity)
    w2t = (normal(h, d_out) / h**0.5).to(dtype)

    def coded(rows: int, columns: int, bits: int, fan_in: int) -> Tensor:
        size = (rows, group_count(columns, group_size))
        scale = (normal(*size).abs() + 1) / fan_in**0.5 / 2 ** (bits - 1)
        zero = torch.randint(0, 2**bits, size, generator=random).to(torch.uint8)
        codes = torch.randint(0, 2**bits, (rows, columns), generator=random).to(torch.uint8)
        return join(pack(codes, bits), scale.half(), zero)

    if row_bits < 16:
        always = min(always, listed)
        lower[listed - always : listed], upper[listed - always : listed] = math.inf, -math.inf
        w1, w2t = coded(h, d, low_bits(bits, row_bits), d), coded(h, d_out, row_bits, h)
        for rows in (w1, w2t):
            rows[torch.ones(h, dtype=torch.bool).index_fill(0, neurons[:listed].long(), False)] = 255  # NaN
    whole = (normal(d_out, d) / d**0.5).to(dtype) if fold else None
    weight = coded(d_out, d, fold_bits, d) if fold_bits < 16 else whole
    return {
        "folded": normal(*(shape if weight is None else ()), d_out).to(dtype),
        "x": x,
        "w1": w1,
        "b1": (normal(h) / 2).to(dtype) if bias else None,
        "w2t": w2t,
        "counts": torch.tensor([listed, guarded]),
        "neurons": neurons,
        "codes": codes,
        "scale": scale,
        "zero": zero,
        "lower": lower,
        "upper": upper,
        "slope": normal(capacity),
        "intercept": normal(capacity),
        "bits": bits,
        "activation": activation,
        "fold": weight,
        "fold_bits": fold_bits,
        "row_bits": row_bits,
    }


def changed(op: Arguments, **values: Tensor) -> Arguments:
    return {**op, **values}


def bounds(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, outliers: float, capacity: int
) -> tuple[Tensor, Tensor]:
    """[capacity] twice: lower and upper bounds to which no estimate comes so close that rounding could decide."""
    x, scale, zero = x.double(), scale.double(), zero.double()
    z_hat = reference.estimate(x, codes, scale, zero, bits)
    lower = torch.full((capacity,), torch.nan)
    upper = torch.full((capacity,), torch.nan)
    lower[: len(codes)], upper[: len(codes)] = -math.inf, math.inf
    if z_hat.numel() and outliers:
        lower[: len(codes)] = z_hat.quantile(outliers / 2).float()
        upper[: len(codes)] = z_hat.quantile(1 - outliers / 2).float()
    if outliers == 1:
        lower[: len(codes)] = upper[: len(codes)] = math.inf
    near = margin(x, scale, zero, bits)
    for _ in range(100):
        low = (z_hat - lower[: len(codes)]).abs() <= near
        high = (z_hat - upper[: len(codes)]).abs() <= near
        if not (low.any() or high.any()):
            return lower, upper
        lower[: len(codes)] -= torch.where(low, near, 0).sum(0).float()
        upper[: len(codes)] += torch.where(high, near, 0).sum(0).float()
    raise AssertionError("no place for the bounds")


def margin(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """[tokens, guarded]: what an estimate may err by in float32 and with x rounded to 2^-13 of its block's largest."""
    columns = x.shape[-1]
    padded = torch.nn.functional.pad(x.abs(), (0, -columns % BLOCK)).view(len(x), block_count(columns), BLOCK)
    error: Tensor = padded.amax(-1) * BLOCK * 2**-13 + padded.sum(-1) * 2**-20
    largest: Tensor = error @ (spread(scale, columns)[:, ::BLOCK] * 2**bits).T
    return largest


def exact(op: Arguments) -> Tensor:
    """The reference, in float64."""
    op = {
        name: value.double() if isinstance(value, Tensor) and value.dtype in FLOATS else value
        for name, value in op.items()
    }
    expected: Tensor = reference.correct(**op)  # type: ignore[arg-type]
    return expected


def assert_agree(out: Tensor, expected: Tensor, *, atol: float = 2e-4) -> None:
    assert out.shape == expected.shape
    rounding = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=0.51 * rounding, atol=atol, equal_nan=True)


def assert_right(out: Tensor, op: Arguments, expected: Tensor, *, coded: float) -> None:
    """A kernel's output: off by at most ``coded`` of the largest where x meets codes, else by rounding in float32."""
    largest = expected.abs().nan_to_num().max().item() if expected.numel() else 0
    whole = op["fold_bits"] == op["row_bits"] == 16
    assert_agree(out, expected, atol=(2e-4 if whole else coded) * max(1.0, largest))
