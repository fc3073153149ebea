"""Quantises weights to a few bits, by GPTQ or rounding to nearest.

Used for the predictor, the folded weight and the rows that corrections read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float16, Float32, Float64, Int64, UInt8
from torch import Tensor

from tardis_fx.errors import CalibrationError
from tardis_fx.runtime import tables
from tardis_fx.runtime.packing import group_count, join, pack
from tardis_fx.runtime.reference import dequantise

#: Share of the mean diagonal of the Hessian that is added to it (GPTQ, section 3.3).
DAMPING = 0.01
#: Rows that are rounded before the following rows compensate for all of them at once.
BLOCK = 128
#: Scales of a row that are tried, as multiples of the best one for Gaussian weights, and then as steps from the best.
SCALES, STEPS = (0.85, 1.05, 1.3, 1.9, 3.0), (0.07, 0.035)
#: Places of the grid in which levels are looked up while scales are chosen.
GRID = 4096
#: Weights whose scales are chosen together.
CACHED = 2**18


@dataclass(frozen=True)
class Quantised:
    """A matrix with a few bits per weight, in the layout of :mod:`tardis_fx.runtime.packing`."""

    codes: UInt8[Tensor, "rows packed"]
    scale: Float16[Tensor, "rows groups"]
    zero: UInt8[Tensor, "rows groups"]
    bits: int
    columns: int

    @cached_property
    def weight(self) -> Float32[Tensor, "rows columns"]:
        """The dequantised matrix."""
        return dequantise(self.codes, self.scale, self.zero, self.bits, self.columns)

    @property
    def rows(self) -> UInt8[Tensor, "rows row_bytes"]:
        """Each row as one contiguous run of bytes."""
        return join(self.codes, self.scale, self.zero)

    def __call__(self, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        """Products with every row: for W1, estimates of the pre-activations without bias."""
        return x @ self.weight.T


def quantise(
    weight: Float[Tensor, "rows d"], gram: Float[Tensor, "d d"] | None, bits: int, group_size: int
) -> Quantised:
    """Quantises a matrix to minimise the error of its products, not of its weights: GPTQ (arXiv 2210.17323, alg. 1).

    The codes are asymmetric. Each group's scale has the least squared error among ranges clipped to between 100% and
    50%, and is rounded to float16 before the codes are computed.

    Args:
        weight: the matrix.
        gram: sum of x xᵀ over the calibration tokens; None rounds every weight to the nearest code.
        bits: 1 to 8.
        group_size: columns that share a scale and a zero point, one of :data:`tardis_fx.runtime.packing.GROUP_SIZES`.
    """
    h, d = weight.shape
    w = weight.float().clone()
    upper = None if gram is None else inverse_factor(gram).float()
    codes = torch.zeros(h, d, dtype=torch.uint8, device=w.device)
    scales = torch.zeros(h, group_count(d, group_size), dtype=torch.float16, device=w.device)
    zeros = torch.zeros_like(scales, dtype=torch.uint8)
    for group, start in enumerate(range(0, d, group_size)):
        stop = min(start + group_size, d)
        scale, zero = _range(w[:, start:stop], bits)
        scales[:, group], zeros[:, group] = scale.half(), zero.to(torch.uint8)
        if upper is None:
            codes[:, start:stop] = _nearest(w[:, start:stop], scale[:, None], zero[:, None], bits).to(torch.uint8)
            continue
        block, errors = w[:, start:stop].clone(), torch.zeros(h, stop - start, dtype=w.dtype, device=w.device)
        for i in range(stop - start):
            row = upper[start + i, start + i : stop]
            code = _nearest(block[:, i], scale, zero, bits)
            codes[:, start + i] = code.to(torch.uint8)
            errors[:, i] = (block[:, i] - (code - zero) * scale) / row[0]
            block[:, i:] -= errors[:, i : i + 1] * row
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return Quantised(pack(codes, bits), scales, zeros, bits, d)


def quantise_in_turn(
    weight: Float[Tensor, "h columns"], gram: Float[Tensor, "h h"], bits: int, group_size: int
) -> Quantised:
    """Quantises a matrix to minimise the change of ``c @ weight``: :func:`quantise` for products from the left.

    Rows are rounded in sequence, and the remaining rows compensate; the rows with the largest factors come first. The
    scales lie along the rows and are chosen beforehand.

    Args:
        weight: the matrix.
        gram: sum of cᵀ c over the factors c, [tokens, h].
        bits: 1 to 8.
        group_size: columns that share a scale and a zero point.
    """
    order = gram.diagonal().argsort(descending=True)
    w = weight.float()[order]
    upper = inverse_factor(gram[order][:, order]).float()
    scales, zeros = (
        torch.stack(t, 1) for t in zip(*(_range(part, bits) for part in w.split(group_size, 1)), strict=True)
    )
    scale, zero = (t.repeat_interleave(group_size, 1)[:, : w.shape[1]] for t in (scales, zeros))
    codes = torch.zeros_like(w)
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        errors = torch.zeros_like(w[start:stop])
        for i in range(start, stop):
            codes[i] = _nearest(w[i], scale[i], zero[i], bits)
            errors[i - start] = (w[i] - (codes[i] - zero[i]) * scale[i]) / upper[i, i]
            w[i:stop] -= torch.outer(upper[i, i:stop], errors[i - start])
        w[stop:] -= upper[start:stop, stop:].T @ errors
    back = order.argsort()
    packed = pack(codes[back].to(torch.uint8), bits)
    return Quantised(packed, scales[back].half(), zeros[back].to(torch.uint8), bits, w.shape[1])


def inverse_factor(gram: Float[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    """Upper Cholesky factor of the inverse of the damped Gram matrix."""
    return factor(torch.cholesky_inverse(factor(gram)), damping=0.0, upper=True)


def factor(gram: Float[Tensor, "d d"], *, damping: float = DAMPING, upper: bool = False) -> Float64[Tensor, "d d"]:
    """Cholesky factor of a Gram matrix, damped until it exists.

    Rounded sums and differences of sums need not be positive definite even with ``damping`` added; then the damping is
    multiplied by ten until they are. This happens with fewer tokens than columns, or with duplicate columns.

    Args:
        gram: a symmetric matrix.
        damping: share of the mean diagonal that is added first.
        upper: return the upper factor instead of the lower one.

    Raises:
        CalibrationError: an entry is NaN or infinite.
    """
    if not torch.isfinite(gram).all():
        raise CalibrationError(f"sums over the tokens overflow: a Gram matrix of {len(gram):,} columns is not finite")
    damped = gram.double()
    diagonal = damped.diagonal()
    own = diagonal.clone()
    try:
        diagonal[diagonal == 0] = 1
        mean = float(diagonal.mean())
        if mean <= 0:
            mean = float(diagonal.abs().mean())
        step = damping * mean
        while True:
            diagonal.add_(step)
            triangle: Tensor
            triangle, failed = torch.linalg.cholesky_ex(damped, upper=upper)
            if not failed:
                return triangle
            step = max(10 * step, 1e-12 * mean)
    finally:
        diagonal.copy_(own)  # the matrix may be the caller's: a copy takes much memory


def _range(block: Float[Tensor, "rows group"], bits: int) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Scale and zero point of each row of a group with the least squared error over clipped ranges."""
    levels = 2**bits - 1
    low, high = block.amin(1).clamp(max=0), block.amax(1).clamp(min=0)
    best = low.new_full((len(block),), torch.inf)
    best_scale, best_zero = torch.zeros_like(low), torch.zeros_like(low)
    for shrink in torch.linspace(1, 0.5, 11, dtype=torch.float32, device=block.device):
        scale = ((high - low) * shrink / levels).half().float()
        zero = torch.where(scale > 0, (-low * shrink / scale).round(), 0).clamp(0, levels)
        code = _nearest(block, scale[:, None], zero[:, None], bits)
        loss = ((code - zero[:, None]) * scale[:, None] - block).square().sum(1)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The nearest codes, elementwise; the zero point if the scale is zero."""
    return torch.where(scale > 0, (weight / scale + zero).round().clamp(0, 2**bits - 1), zero)


@dataclass(frozen=True)
class Feedback:
    """How later columns make up for the rounding of a column: the Gram matrix of the operand, factored once.

    Attributes:
        order: the columns, most active first (GPTQ's "act-order").
        upper: Cholesky factor of the inverse of the damped Gram matrix in that order, up to a factor: rows of at most
            :data:`BLOCK` columns together, each from the diagonal block on.
    """

    order: Int64[Tensor, " columns"]
    upper: Sequence[Float32[Tensor, "_ _"]]

    @classmethod
    def from_gram(cls, gram: Float[Tensor, "columns columns"], damping: float = 10 * DAMPING) -> "Feedback":
        """Factors a Gram matrix.

        Raises:
            CalibrationError: an entry is NaN or infinite.
        """
        rising = gram.diagonal().argsort()
        return cls.from_factor(rising, factor(gram[rising[:, None], rising], damping=damping))

    @classmethod
    def from_factor(cls, rising: Int64[Tensor, " columns"], lower: Float64[Tensor, "columns columns"]) -> "Feedback":
        """From the Cholesky factor of a Gram matrix whose columns are in the order ``rising``, least active first."""
        order, reverse = rising.flip(0), lower.flip(0, 1)  # R with R Rᵀ the matrix in ``order``; R⁻¹ is what is wanted
        reverse = (reverse / reverse.diagonal().mean()).float()
        identity = torch.eye(len(order), dtype=reverse.dtype, device=reverse.device)
        upper = torch.linalg.solve_triangular(reverse, identity, upper=True)
        starts = range(0, len(order), BLOCK)
        return cls(order, [upper[start : start + BLOCK, start:].clone() for start in starts])


@dataclass(frozen=True)
class Rows:
    """A matrix in codes, in the layout of :mod:`tardis_fx.runtime.tables`."""

    rows: UInt8[Tensor, "rows row_bytes"]
    bits: int
    columns: int

    @property
    def weight(self) -> Float32[Tensor, "rows columns"]:
        """The matrix that the codes stand for."""
        return tables.weights(self.rows, self.bits, self.columns)

    def __call__(self, x: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        """Products with every row."""
        return x @ self.weight.T


def code_rows(weight: Float[Tensor, "rows d"], feedback: Feedback | None, bits: int) -> Rows:
    """Rounds a matrix to minimise the error of ``x @ weight.T``: GPTQ with tables, most active columns first.

    Args:
        weight: the matrix.
        feedback: of the inputs x; None rounds every weight to the nearest level.
        bits: 1 to 8.
    """
    weight = weight.float().contiguous()
    scale = _scales(weight, bits)
    codes = _round_in_turn(weight.T, scale, feedback, bits).T
    return Rows(tables.join(codes.contiguous(), scale, bits), bits, weight.shape[1])


def code_columns(weight: Float[Tensor, "h d"], feedback: Feedback | None, bits: int) -> Rows:
    """Rounds a matrix to minimise the error of ``c @ weight``: :func:`code_rows` for products from the left.

    Args:
        weight: the matrix, whose rows have the scales and are rounded in turn.
        feedback: of the factors c, [tokens, h]; None rounds every weight to the nearest level.
        bits: 1 to 8.
    """
    weight = weight.float().contiguous()
    scale = _scales(weight, bits)
    codes = _round_in_turn(weight, scale[:, None], feedback, bits)
    return Rows(tables.join(codes, scale, bits), bits, weight.shape[1])


def _round_in_turn(
    weight: Float32[Tensor, "turns others"],
    scale: Float16[Tensor, " others"] | Float16[Tensor, "turns 1"],
    feedback: Feedback | None,
    bits: int,
) -> UInt8[Tensor, "turns others"]:
    """Codes of a matrix whose rows are rounded one after the other, where later rows make up for earlier ones."""
    levels = tables.levels(bits)
    middles, (turns, others) = (levels[1:] + levels[:-1]) / 2, weight.shape
    steps = scale.float().clamp(min=torch.finfo(torch.float16).tiny).expand(turns, others)
    if feedback is None:
        return torch.bucketize((weight / steps).contiguous(), middles).to(torch.uint8)
    rest, steps = weight[feedback.order].contiguous(), steps[feedback.order]
    codes = torch.zeros(turns, others, dtype=torch.uint8, device=weight.device)
    for start, upper in zip(range(0, turns, BLOCK), feedback.upper, strict=True):
        size = len(upper)
        block, errors = rest[start : start + size], torch.zeros_like(rest[start : start + size])
        for i in range(size):
            step, row = steps[start + i], upper[i, i:size]
            code = torch.bucketize(block[i] / step, middles, out_int32=True)
            codes[start + i] = code
            errors[i] = (block[i] - torch.index_select(levels, 0, code) * step) / row[0]
            block[i:].addr_(row, errors[i], alpha=-1)
        rest[start + size :] -= upper[:, size:].T @ errors
    return codes[feedback.order.argsort()]


def _scales(weight: Float32[Tensor, "rows columns"], bits: int) -> Float16[Tensor, " rows"]:
    """Scale of each row with the least squared error; parts of the rows stay in the cache."""
    rows = max(1, CACHED // weight.shape[1])
    return torch.cat([_scales_together(part, bits) for part in weight.split(rows)])


def _scales_together(weight: Float32[Tensor, "rows columns"], bits: int) -> Float16[Tensor, " rows"]:
    """Scale of each row with the least squared error among multiples of its standard deviation, and steps from it.

    Levels are looked up in a fine grid: close to a middle between two levels, either one has almost the same error.
    """
    levels = tables.levels(bits)
    reach = float(levels.abs().max())
    grid = torch.linspace(-reach, reach, GRID, dtype=levels.dtype, device=levels.device)
    nearest = levels[torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2)]
    spread = weight.square().mean(1).sqrt() * tables.PEAKS[bits]
    limit = torch.finfo(torch.float16).max
    best_error, best = torch.full_like(spread, torch.inf), torch.zeros_like(spread, dtype=torch.float16)
    place = torch.empty_like(weight)
    for multiples in (SCALES, *((1 - step, 1 + step) for step in STEPS)):
        start = best.float() if multiples is not SCALES else spread
        for multiple in multiples:
            scale = (start * multiple).clamp(max=limit).half()
            step = scale.float().clamp(min=torch.finfo(torch.float16).tiny)[:, None]
            torch.mul(weight, (GRID - 1) / 2 / reach / step, out=place)
            index = place.add_(GRID / 2).clamp_(0, GRID - 1).int()
            rounded = torch.index_select(nearest, 0, index.flatten()).view_as(weight)
            error = rounded.mul_(step).sub_(weight).square_().sum(1)
            better = error < best_error
            best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
    return best
