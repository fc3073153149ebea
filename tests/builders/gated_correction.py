"""Arguments of the correction op of gated sites, and what the reference makes of them in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from builders.correction import FLOATS, Arguments
from tardis_fx.runtime import reference_gated
from tardis_fx.runtime.packing import group_count, join, low_bits, pack


def arguments(
    *,
    shape: tuple[int, ...] = (1,),
    d: int = 200,
    d_out: int = 130,
    h: int = 300,
    always: int = 0,
    outliers: float | None = None,
    dtype: torch.dtype = torch.float32,
    bits: int = 2,
    activation: str = "silu",
    bias: bool = True,
    fold_bits: int = 16,
    row_bits: int = 16,
    group_size: int = 64,
    fold: bool = False,
    seed: int = 0,
) -> Arguments:
    """The arguments of the op, with thresholds that lie where rounding cannot decide.

    A third of the neurons is on no list, ``always`` of the others are corrected always (with rows of codes, by a
    threshold that all exceed), and the capacity exceeds the list by three entries of nonsense. ``outliers`` of 0 or 1
    moves all thresholds out of reach. A folded weight that is no codes is given only with ``fold``.
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
    codes, scale, zero = (t.unflatten(0, (capacity, 2)) for t in coded(2 * capacity, d, bits, d))
    scale[guarded:] = torch.nan
    x, guard, surrogate = normal(*shape, d).to(dtype), normal(capacity, 4), normal(capacity, 3)
    biases = normal(capacity, 2) / 2 if bias else None
    both = reference_gated.estimates(
        x.reshape(-1, d).double(), *(t[:guarded] for t in (codes, scale.double(), zero)),
        None if biases is None else biases[:guarded], bits,
    )  # fmt: skip
    scores = reference_gated.beyond(both, guard[:guarded, :3], activation).abs()
    guard[:guarded, 3] = _thresholds(scores, outliers, random)
    rows = {"gate": normal(h, d) / d**0.5, "up": normal(h, d) / d**0.5, "w2t": normal(h, d_out) / h**0.5}
    rows = {name: weight.to(dtype) for name, weight in rows.items()}
    if row_bits < 16:
        guard[listed - min(always, listed) : listed, 3] = -math.inf
        low = low_bits(bits, row_bits)
        rows = {name: join(*coded(h, d, low, d)) for name in ("gate", "up")}
        rows["w2t"] = join(*coded(h, d_out, row_bits, h))
        for weight in rows.values():
            weight[torch.ones(h, dtype=torch.bool).index_fill(0, neurons[:listed].long(), False)] = 255  # NaN
    whole = (normal(d_out, d) / d**0.5).to(dtype) if fold else None
    weight = join(*coded(d_out, d, fold_bits, d)) if fold_bits < 16 else whole
    return {
        "folded": normal(*(shape if weight is None else ()), d_out).to(dtype),
        "x": x,
        **rows,
        "counts": torch.tensor([listed, guarded]),
        "neurons": neurons,
        "codes": codes,
        "scale": scale,
        "zero": zero,
        "biases": biases,
        "guard": guard,
        "surrogate": surrogate,
        "bits": bits,
        "activation": activation,
        "fold": weight,
        "fold_bits": fold_bits,
        "row_bits": row_bits,
    }


def _thresholds(scores: Tensor, outliers: float | None, random: torch.Generator) -> Tensor:
    """[guarded]: in the middle of the widest gap of every neuron's scores, [tokens, guarded], or beyond all."""
    if not scores.numel() or outliers in (0, 1):
        return torch.full((scores.shape[1],), -math.inf if outliers else math.inf)
    below, above = torch.zeros_like(scores[0]), 2 * scores.amax(0) + 1
    ordered = torch.stack([below, *scores.sort(0).values])
    gaps = ordered.diff(dim=0) / above
    widest, where = gaps.max(0)
    middle = (ordered.gather(0, where[None]) + ordered.gather(0, where[None] + 1))[0] / 2
    out_of_reach = (widest < 0.02) | (torch.rand(len(below), generator=random) < 0.3)
    return torch.where(out_of_reach, above, middle).float()


def exact(op: Arguments) -> Tensor:
    """The reference, in float64."""
    op = {
        name: value.double() if isinstance(value, Tensor) and value.dtype in FLOATS else value
        for name, value in op.items()
    }
    expected: Tensor = reference_gated.correct(**op)  # type: ignore[arg-type]
    return expected
