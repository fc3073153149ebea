"""The eager specification of the run-time ops. Every kernel is tested against it."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime.correction import Correction
from tardis_fx.runtime.packing import low_bits, split, spread, unpack


def correct(call: Correction) -> Float[Tensor, "*tokens d_out"]:
    """Adds the exact terms of the predicted outliers to the folded output, in its dtype (paper, section 5.3).

    The response of a neuron to its pre-activations is ``activation(z[0])`` times the others; the fold contains an
    affine function of them, the surrogate, instead. The first ``guarded`` neurons of the list are corrected if the
    guard says so, the other ``listed`` ones always. A correction replaces the surrogate by the response. The
    pre-activations are computed from the original weights; with quantised rows, they are the estimates plus the
    products with rows of low planes, and every listed neuron must be guarded (a bound may be infinite).
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


def outliers(call: Correction) -> Bool[Tensor, "tokens listed"]:
    """Mask of the listed neurons that are corrected."""
    tokens = call.x.reshape(-1, call.x.shape[-1]).to(compute_dtype(call.x.dtype))
    listed, guarded = call.counts.tolist()
    outlier = torch.ones(len(tokens), listed, dtype=torch.bool, device=tokens.device)
    z_hat = estimates(call, tokens, guarded)
    outlier[:, :guarded] = outside(z_hat, call.biases, call.guard[:guarded], call.activation)
    return outlier


def outside(
    z_hat: Sequence[Float[Tensor, "tokens guarded"]], biases: Float[Tensor, "capacity k"] | None,
    guard: Float[Tensor, "guarded guard_width"], activation: str,
) -> Bool[Tensor, "tokens guarded"]:  # fmt: skip
    """Mask of the guarded neurons that are corrected, from their k estimates without biases."""
    if len(z_hat) == 1:
        lower, upper = guard.unbind(1)
        return (z_hat[0] < lower) | (z_hat[0] > upper)
    z = biased(z_hat, biases, len(guard))
    score = surrogate_error(z, guard[:, :-1], response(z, activation)).abs()
    return score > guard[:, -1].to(score.dtype)


def estimates(call: Correction, tokens: Float[Tensor, "tokens d"], count: int) -> list[Float[Tensor, "tokens {count}"]]:
    """The predictor's estimates of the k pre-activations of the first ``count`` listed neurons, without biases."""
    codes, scale, zero = (tensor[:count].unbind(1) for tensor in (call.codes, call.scale, call.zero))
    return [estimate(tokens, *parts, call.bits) for parts in zip(codes, scale, zero, strict=True)]


def biased(
    z: Sequence[Float[Tensor, "tokens {count}"]], biases: Float[Tensor, "capacity k"] | None, count: int
) -> Sequence[Float[Tensor, "tokens {count}"]]:
    """The k pre-activations of the first ``count`` listed neurons with their biases."""
    return z if biases is None else [p + biases[:count, i].to(p.dtype) for i, p in enumerate(z)]


def surrogate_error(
    z: Sequence[Float[Tensor, "tokens listed"]],
    surrogate: Float[Tensor, "listed coefficients"],
    responses: Float[Tensor, "tokens listed"],
) -> Float[Tensor, "tokens listed"]:
    """Responses to the k pre-activations minus their affine surrogates, given as slopes and intercept."""
    *slopes, intercept = surrogate.to(z[0].dtype).unbind(1)
    for slope, p in zip(slopes, z, strict=True):
        responses = responses - slope * p
    return responses - intercept


def response(z: Sequence[Float[Tensor, "*tokens h"]], activation: str) -> Float[Tensor, "*tokens h"]:
    """Responses of neurons to their k pre-activations."""
    return math.prod(z[1:], start=ACTIVATIONS[activation].eager(z[0]))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums: float32 for half precision, otherwise the dtype of the tensor."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def estimate(
    x: Float[Tensor, "tokens d"], codes: UInt8[Tensor, "rows packed"], scale: Float[Tensor, "rows groups"],
    zero: UInt8[Tensor, "rows groups"], bits: int,
) -> Float[Tensor, "tokens rows"]:  # fmt: skip
    """The predictor's estimate of pre-activations, without their bias (paper, section 5.2)."""
    return x @ dequantise(codes, scale, zero, bits, x.shape[-1], x.dtype).T


def dequantise(
    codes: UInt8[Tensor, "rows packed"], scale: Float[Tensor, "rows groups"], zero: UInt8[Tensor, "rows groups"],
    bits: int, columns: int, dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "rows {columns}"]:  # fmt: skip
    """The weights ``scale * (code - zero)``, from packed codes of ``bits`` bits."""
    values = unpack(codes, bits, columns).to(dtype)
    return (values - spread(zero.to(dtype), columns)) * spread(scale.to(dtype), columns)


def rows_of(
    weight: Float[Tensor, "rows {columns}"] | UInt8[Tensor, "rows row_bytes"],
    bits: int,
    columns: int,
    dtype: torch.dtype,
) -> Float[Tensor, "rows {columns}"]:
    """Reads a matrix that is stored plain (``bits`` is 16) or as rows of :func:`packing.join`."""
    return weight.to(dtype) if bits == 16 else dequantise(*split(weight, bits, columns), bits, columns, dtype)
