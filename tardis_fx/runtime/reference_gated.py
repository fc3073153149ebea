"""The eager specification of the run-time op of gated sites. The kernel is tested against it."""

import torch
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.runtime.packing import low_bits
from tardis_fx.runtime.reference import compute_dtype, estimate, rows_of


def estimates(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, biases: Tensor | None, bits: int) -> Tensor:
    """The predictors' estimates of the pre-activations of gate and up projection, [tokens, neurons, 2].

    Args:
        x: [tokens, d].
        codes: [neurons, 2, packed bytes], as :func:`tardis_fx.runtime.reference.estimate` takes them: gate, then up.
        scale: [neurons, 2, groups], float16.
        zero: [neurons, 2, groups], uint8.
        biases: [neurons, 2], float32, or None.
        bits: bits of a code.
    """
    found = estimate(x, codes.flatten(0, 1), scale.flatten(0, 1), zero.flatten(0, 1), bits)
    both = found.view(len(x), len(codes), 2)
    return both if biases is None else both + biases.to(x.dtype)


def beyond(both: Tensor, planes: Tensor, activation: str) -> Tensor:
    """What planes miss of the products ``activation(gate) * up``, [tokens, neurons].

    Args:
        both: pre-activations of gate and up, [tokens, neurons, 2].
        planes: [neurons, 3]: factors of gate and up, and a constant.
        activation: name in the registry.
    """
    gate, up = both.unbind(-1)
    alpha, beta, gamma = planes.to(both.dtype).unbind(-1)
    return ACTIVATIONS[activation].eager(gate) * up - (alpha * gate + beta * up + gamma)


def outliers(
    x: Tensor, counts: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, biases: Tensor | None, guard: Tensor,
    bits: int, activation: str,
) -> Tensor:  # fmt: skip
    """Which listed neurons are corrected, [tokens, listed]; arguments as of :func:`correct`, x as [tokens, d]."""
    listed, guarded = counts.tolist()
    outlier = torch.ones(len(x), listed, dtype=torch.bool, device=x.device)
    both = estimates(
        x, codes[:guarded], scale[:guarded], zero[:guarded], None if biases is None else biases[:guarded], bits
    )
    score = beyond(both, guard[:guarded, :3], activation).abs()
    outlier[:, :guarded] = score > guard[:guarded, 3].to(x.dtype)
    return outlier


def correct(
    folded: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    w2t: Tensor,
    counts: Tensor,
    neurons: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    biases: Tensor | None,
    guard: Tensor,
    surrogate: Tensor,
    bits: int,
    activation: str,
    fold: Tensor | None = None,
    fold_bits: int = 16,
    row_bits: int = 16,
) -> Tensor:
    """Adds the exact terms of the predicted outliers of a gated site to the folded output.

    A neuron gives ``activation(g) u``; the fold has the plane ``alpha g + beta u + gamma`` in its place. The first
    ``guarded`` neurons of the list are corrected where their score, the distance of product and plane of the estimates,
    exceeds a threshold, the rest of the ``listed`` ones always. Correcting a neuron replaces the plane by the product,
    with ``g`` and ``u`` computed from the original weights; or, with quantised rows, the estimates and what rows of
    low planes add to them, for which every listed neuron is a guarded one (a threshold may be infinite).

    Args:
        folded: [..., d_out], ``x C + B``; or [d_out], B, where ``fold`` is given.
        x: [..., d], of the dtype of ``folded``.
        gate: [h, d], of the same dtype; with ``row_bits`` below 16, [h, row bytes], uint8, as
            :func:`tardis_fx.runtime.packing.join` makes them, of :func:`tardis_fx.runtime.packing.low_bits` a weight.
        up: likewise.
        w2t: [h, d_out], the last matrix, one row a neuron; or [h, row bytes], uint8, of ``row_bits`` a weight.
        counts: [2], int64: listed, guarded.
        neurons: [capacity], int32: rows of ``gate``, ``up`` and ``w2t``; like all that follow, only the first
            ``listed`` (or ``guarded`` for the predictors and ``guard``) entries mean anything.
        codes: [capacity, 2, packed bytes]: see :func:`estimates`.
        scale: [capacity, 2, groups], float16.
        zero: [capacity, 2, groups], uint8.
        biases: [capacity, 2], float32, of gate and up projection, or None.
        guard: [capacity, 4], float32: the plane that the score is measured from, and the threshold.
        surrogate: [capacity, 3], float32: the plane that the fold has.
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
    outlier = outliers(tokens, counts, codes, scale, zero, biases, guard, bits, activation)
    listed = outlier.shape[1]
    rows, own = neurons[:listed].long(), None if biases is None else biases[:listed]
    if row_bits == 16:
        both = torch.stack([tokens @ weight[rows].to(dtype).T for weight in (gate, up)], -1)
        both = both if own is None else both + own.to(dtype)
    else:
        low = [rows_of(weight[rows], low_bits(bits, row_bits), x.shape[-1], dtype) for weight in (gate, up)]
        both = estimates(tokens, codes[:listed], scale[:listed], zero[:listed], own, bits)
        both = both + torch.stack([tokens @ weight.T for weight in low], -1)
    residual = torch.where(outlier, beyond(both, surrogate[:listed], activation), 0)
    added = residual @ rows_of(w2t[rows], row_bits, folded.shape[-1], dtype)
    if fold is not None:
        added += tokens @ rows_of(fold, fold_bits, x.shape[-1], dtype).T
    return (folded.to(dtype) + added.view(*x.shape[:-1], folded.shape[-1])).to(folded.dtype)
