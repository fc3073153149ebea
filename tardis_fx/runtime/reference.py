"""The eager specification of the run-time ops. Every kernel is tested against it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime.correction import Correction
from tardis_fx.runtime.packing import low_bits, split, spread, unpack


def correct(call: Correction) -> Tensor:
    """Adds the exact terms of the predicted outliers to the folded output (paper, section 5.3).

    The response of a neuron to its pre-activations is ``activation(z[0])`` times the others; the fold contains an
    affine function of them, the surrogate, instead. The first ``guarded`` neurons of the list are corrected if the
    guard says so, the other ``listed`` ones always. A correction replaces the surrogate by the response. The
    pre-activations are computed from the original weights; with quantised rows, they are the estimates plus the
    products with rows of low planes, and every listed neuron must be guarded (a bound may be infinite).

    Returns:
        [..., d_out], of the dtype of ``folded``.
    """
    (*shape, d), dtype = call.x.shape, compute_dtype(call.x.dtype)
    tokens = call.x.reshape(-1, d).to(dtype)
    outlier = outliers(call)
    listed = outlier.shape[1]
    rows = call.neurons[:listed].long()
    if call.row_bits == 16:
        z = [tokens @ projection[rows].to(dtype).T for projection in call.projections]
    else:
        width = low_bits(call.bits, call.row_bits)
        low = [tokens @ rows_of(projection[rows], width, d, dtype).T for projection in call.projections]
        z = [high + rest for high, rest in zip(estimates(call, tokens, listed), low, strict=True)]
    preactivations = biased(z, call.biases, listed)
    error = surrogate_error(preactivations, call.surrogate[:listed], response(preactivations, call.activation))
    residual = torch.where(outlier, error, 0)
    added = residual @ rows_of(call.columns[rows], call.row_bits, call.folded.shape[-1], dtype)
    if call.fold is not None:
        added += tokens @ rows_of(call.fold, call.fold_bits, d, dtype).T
    return (call.folded.to(dtype) + added.view(*shape, call.folded.shape[-1])).to(call.folded.dtype)


def outliers(call: Correction) -> Tensor:
    """Mask of the listed neurons that are corrected, [tokens, listed]."""
    tokens = call.x.reshape(-1, call.x.shape[-1]).to(compute_dtype(call.x.dtype))
    listed, guarded = call.counts.tolist()
    outlier = torch.ones(len(tokens), listed, dtype=torch.bool, device=tokens.device)
    z_hat = estimates(call, tokens, guarded)
    outlier[:, :guarded] = outside(z_hat, call.biases, call.guard[:guarded], call.activation)
    return outlier


def outside(z_hat: Sequence[Tensor], biases: Tensor | None, guard: Tensor, activation: str) -> Tensor:
    """Mask of the guarded neurons that are corrected, [tokens, guarded].

    Args:
        z_hat: estimates without biases, k of [tokens, guarded].
        biases: [guarded or more, k], or None.
        guard: [guarded, numbers of a guard].
        activation: name in the registry.
    """
    if len(z_hat) == 1:
        lower, upper = guard.unbind(1)
        return (z_hat[0] < lower) | (z_hat[0] > upper)
    z = biased(z_hat, biases, len(guard))
    score = surrogate_error(z, guard[:, :-1], response(z, activation)).abs()
    return score > guard[:, -1].to(score.dtype)


def estimates(call: Correction, tokens: Tensor, count: int) -> list[Tensor]:
    """The predictor's estimates of k pre-activations, without their biases: k of [tokens, count].

    Args:
        call: the call.
        tokens: [tokens, d].
        count: number of leading listed neurons to estimate.
    """
    codes, scale, zero = (tensor[:count].unbind(1) for tensor in (call.codes, call.scale, call.zero))
    return [estimate(tokens, *parts, call.bits) for parts in zip(codes, scale, zero, strict=True)]


def biased(z: Sequence[Tensor], biases: Tensor | None, count: int) -> Sequence[Tensor]:
    """Pre-activations of the first ``count`` listed neurons, k of [tokens, count], with their biases, [capacity, k]."""
    return z if biases is None else [p + biases[:count, i].to(p.dtype) for i, p in enumerate(z)]


def surrogate_error(z: Sequence[Tensor], surrogate: Tensor, responses: Tensor) -> Tensor:
    """Responses minus their affine surrogates, [tokens, neurons].

    Args:
        z: pre-activations, k of [tokens, neurons].
        surrogate: [neurons, k + 1]: slopes and intercept.
        responses: [tokens, neurons].
    """
    *slopes, intercept = surrogate.to(z[0].dtype).unbind(1)
    for slope, p in zip(slopes, z, strict=True):
        responses = responses - slope * p
    return responses - intercept


def response(z: Sequence[Tensor], activation: str) -> Tensor:
    """Responses of neurons to their pre-activations, k of one shape."""
    return math.prod(z[1:], start=ACTIVATIONS[activation].eager(z[0]))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums: float32 for half precision, otherwise the dtype of the tensor."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def estimate(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The predictor's estimate of pre-activations, without their bias (paper, section 5.2).

    Args:
        x: [tokens, d].
        codes: [rows, packed bytes of d columns], the packed codes of a projection's rows.
        scale: [rows, groups], float16; a weight is ``scale * (code - zero)``.
        zero: [rows, groups], uint8.
        bits: bits of a code.

    Returns:
        [tokens, rows].
    """
    return x @ dequantise(codes, scale, zero, bits, x.shape[-1], x.dtype).T


def dequantise(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, columns: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights ``scale * (code - zero)``, [rows, columns]; arguments as in :func:`estimate`."""
    values = unpack(codes, bits, columns).to(dtype)
    return (values - spread(zero.to(dtype), columns)) * spread(scale.to(dtype), columns)


def rows_of(weight: Tensor, bits: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Reads a matrix, [rows, columns], that is stored plain (``bits`` is 16) or as rows of :func:`packing.join`."""
    return weight.to(dtype) if bits == 16 else dequantise(*split(weight, bits, columns), bits, columns, dtype)
