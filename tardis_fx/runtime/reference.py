"""The eager specification of the run-time ops. Every kernel is tested against it."""

import torch
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime.packing import low_bits, split, spread, unpack


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float32 for half precision, the tensor's own otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def estimate(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The predictor's estimate of the pre-activations, without their bias (paper, section 5.2).

    Args:
        x: [tokens, d].
        codes: [guarded, packed bytes of d columns], the packed codes of W1's rows.
        scale: [guarded, groups], float16; a weight is ``scale * (code - zero)``.
        zero: [guarded, groups], uint8.
        bits: bits of a code.

    Returns:
        [tokens, guarded].
    """
    return x @ dequantise(codes, scale, zero, bits, x.shape[-1], x.dtype).T


def dequantise(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights ``scale * (code - zero)``, [rows, columns]; arguments as of :func:`estimate`."""
    values = unpack(codes, bits, columns).to(dtype)
    return (values - spread(zero.to(dtype), columns)) * spread(scale.to(dtype), columns)


def rows_of(weight: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix, [rows, columns], that is stored whole (``bits`` is 16) or as rows of :func:`packing.join`."""
    return weight.to(dtype) if bits == 16 else dequantise(*split(weight, bits, columns), bits, columns, dtype)


def outliers(
    x: Tensor, counts: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, lower: Tensor, upper: Tensor, bits: int
) -> Tensor:
    """Which listed neurons are corrected, [tokens, listed]; arguments as of :func:`correct`, x as [tokens, d]."""
    listed, guarded = counts.tolist()
    outlier = torch.ones(len(x), listed, dtype=torch.bool, device=x.device)
    z_hat = estimate(x, codes[:guarded], scale[:guarded], zero[:guarded], bits)
    outlier[:, :guarded] = (z_hat < lower[:guarded]) | (z_hat > upper[:guarded])
    return outlier


def correct(
    folded: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2t: Tensor,
    counts: Tensor,
    neurons: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    lower: Tensor,
    upper: Tensor,
    slope: Tensor,
    intercept: Tensor,
    bits: int,
    activation: str,
    fold: Tensor | None = None,
    fold_bits: int = 16,
    row_bits: int = 16,
) -> Tensor:
    """Adds the exact terms of the predicted outliers to the folded output (paper, section 5.3).

    The first ``guarded`` neurons of the list are corrected where the estimate leaves their hot range, the rest of
    the ``listed`` ones always. Correcting neuron ``n`` replaces ``slope z + intercept`` by ``activation(z)``, with
    ``z`` computed from the original weights; or, with quantised rows, the estimate of ``z`` and what a row of low
    planes adds to it, for which every listed neuron is a guarded one (a bound may be infinite).

    Args:
        folded: [..., d_out], ``x C + B``; or [d_out], B, where ``fold`` is given.
        x: [..., d], of the dtype of ``folded``, as are ``w1``, ``b1`` and ``w2t``.
        w1: [h, d]; with ``row_bits`` below 16, [h, row bytes], uint8, as :func:`packing.join` makes them, of
            :func:`packing.low_bits` a weight.
        b1: [h] or None.
        w2t: [h, d_out], the second matrix, one row a neuron; or [h, row bytes], uint8, of ``row_bits`` a weight.
        counts: [2], int64: listed, guarded.
        neurons: [capacity], int32: rows of ``w1``; like all that follow, only the first ``listed`` (or ``guarded``
            for the predictor and the bounds) entries mean anything.
        codes: [capacity, packed bytes]: see :func:`estimate`; groups are of the same size in all codes of a call.
        scale: [capacity, groups], float16.
        zero: [capacity, groups], uint8.
        lower: [capacity], float32: an estimate below it is an outlier.
        upper: [capacity], float32: an estimate above it is an outlier.
        slope: [capacity], float32.
        intercept: [capacity], float32.
        bits: bits of a code.
        activation: name in the registry.
        fold: C transposed, [d_out, d], or in codes, [d_out, row bytes], uint8; None where ``folded`` has it.
        fold_bits: bits of a code of ``fold``; 16 where it is no codes.
        row_bits: bits a weight of the rows; 16 where they are no codes.

    Returns:
        [..., d_out], of the dtype of ``folded``.
    """
    dtype = compute_dtype(x.dtype)
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    outlier = outliers(tokens, counts, codes, scale, zero, lower, upper, bits)
    listed = outlier.shape[1]
    rows = neurons[:listed].long()
    if row_bits == 16:
        z = tokens @ w1[rows].to(dtype).T
    else:
        low = rows_of(w1[rows], low_bits(bits, row_bits), x.shape[-1], dtype)
        z = estimate(tokens, codes[:listed], scale[:listed], zero[:listed], bits) + tokens @ low.T
    if b1 is not None:
        z = z + b1[rows].to(dtype)
    surrogate = slope[:listed].to(dtype) * z + intercept[:listed].to(dtype)
    residual = torch.where(outlier, ACTIVATIONS[activation].eager(z) - surrogate, 0)
    added = residual @ rows_of(w2t[rows], row_bits, folded.shape[-1], dtype)
    if fold is not None:
        added += tokens @ rows_of(fold, fold_bits, x.shape[-1], dtype).T
    return (folded.to(dtype) + added.view(*x.shape[:-1], folded.shape[-1])).to(folded.dtype)
