"""The eager specification of ``tardis::coded_ffn``. Every kernel is tested against it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int8
from torch import Tensor

from tardis_fx.runtime import tables
from tardis_fx.runtime.coded import CodedFFN
from tardis_fx.runtime.reference import biased, compute_dtype, response, surrogate_error
from tardis_fx.runtime.rotation import rotate_back, rotate_in_order

#: Columns of a token that share a unit.
GROUP = 128


class Levels(NamedTuple):
    """Which parts of each listed neuron are read for each token.

    Attributes:
        up: the second projection; with one projection, as ``value``.
        value: the column: the neuron adds its value to the output.
        row: the refinements of the projections.
        column: the refinement of the column.
    """

    up: Bool[Tensor, "tokens listed"]
    value: Bool[Tensor, "tokens listed"]
    row: Bool[Tensor, "tokens listed"]
    column: Bool[Tensor, "tokens listed"]


def coded_ffn(call: CodedFFN) -> Float[Tensor, "*tokens d_out"]:
    """The output of an FFN in codes; see :func:`evaluate`."""
    return evaluate(call)[0]


def evaluate(call: CodedFFN) -> tuple[Float[Tensor, "*tokens d_out"], Levels]:
    """The output of an FFN in codes, and which parts of the listed neurons it reads.

    A neuron's value is its response minus its surrogate, which the fold holds. Its pre-activations are estimated from
    the base codes. Where :func:`levels` says so, the value times the column is added; the refinements make the
    pre-activations and the column more precise.
    """
    *shape, d_out = *call.x.shape[:-1], len(call.bias)
    x = _rotated(call)
    value, chosen = _added(call, x)
    output = value @ tables.weights(call.columns[: int(call.listed)], call.column_bits, d_out, x.dtype)
    refinement = tables.weights(call.column_refinements[: int(call.listed)], call.column_low_bits, d_out, x.dtype)
    output = output + torch.where(chosen.column, value, 0) @ refinement
    if call.fold is not None:
        output = output + x @ tables.weights(call.fold, call.fold_bits, x.shape[1], x.dtype).T
    output = rotate_back(output, call.out_signs) + call.bias.to(x.dtype)
    return output.to(call.x.dtype).view(*shape, d_out), chosen


def added_values(call: CodedFFN) -> Float[Tensor, "tokens listed"]:
    """The values by which a call multiplies the columns; zero where a column is not read."""
    return _added(call, _rotated(call))[0]


def _added(call: CodedFFN, x: Float[Tensor, "tokens d"]) -> tuple[Float[Tensor, "tokens listed"], Levels]:
    listed, d = int(call.listed), x.shape[1]
    base = estimates(call, x)
    surrogate = _surrogate(call, x.dtype)
    value = values(base, surrogate, call.activation)
    chosen = _levels(call, base, value)
    low = [x @ tables.weights(rows[:listed], call.low_bits, d, x.dtype).T for rows in call.refinements]
    refined = [estimate + rest for estimate, rest in zip(base, low, strict=True)]
    value = torch.where(chosen.row, values(refined, surrogate, call.activation), value)
    return torch.where(chosen.value, value, 0), chosen


def parts_read(call: CodedFFN) -> Levels:
    """Which parts of the listed neurons a call reads."""
    x = _rotated(call)
    base = estimates(call, x)
    return _levels(call, base, values(base, _surrogate(call, x.dtype), call.activation))


def estimates(call: CodedFFN, x: Float[Tensor, "tokens d"]) -> Sequence[Float[Tensor, "tokens listed"]]:
    """The k pre-activations of the listed neurons from their base codes; ``x`` is rotated."""
    listed = int(call.listed)
    products = [x @ tables.weights(rows[:listed], call.bits, x.shape[1], x.dtype).T for rows in call.projections]
    return biased(products, call.biases, listed)


def levels(
    estimates: Sequence[Float[Tensor, "tokens listed"]],
    value: Float[Tensor, "tokens listed"],
    noise: Sequence[Float[Tensor, " listed"]],
    norms: Float[Tensor, "listed k"],
    thresholds: Float32[Tensor, " parts"],
    surrogate: Float[Tensor, "listed coefficients"] | None,
    activation: str,
    *,
    relative: bool,
) -> Levels:
    """Which parts of the neurons are read, from the estimates of their pre-activations and their values.

    ``norms`` and ``thresholds`` are those of :class:`tardis_fx.runtime.coded.CodedFFN`, and ``noise`` the
    root-mean-square errors of the estimates (:func:`noises`). A part is read if its contribution
    (:func:`contributions`) exceeds its threshold (if ``relative``, times the token's scale) or is infinite or NaN; the
    refinements, only if the column is read.
    """
    parts, scale = contributions(estimates, value, noise, norms, surrogate, activation, relative=relative)
    *up, read, row, column = (
        ~((part <= threshold * scale) & (part < torch.inf))
        for part, threshold in zip(parts, thresholds.double(), strict=True)
    )
    if up:
        read = read & up[0]
    return Levels(up[0] if up else read, read, read & row, read & column)


def contributions(
    estimates: Sequence[Float[Tensor, "tokens listed"]],
    value: Float[Tensor, "tokens listed"],
    noise: Sequence[Float[Tensor, " listed"]],
    norms: Float[Tensor, "listed k"],
    surrogate: Float[Tensor, "listed coefficients"] | None,
    activation: str,
    *,
    relative: bool,
) -> tuple[list[Float[Tensor, "tokens listed"]], Float64[Tensor, "scales 1"]]:
    """What each part of the neurons contributes to the output, in the order of thresholds, and the scales of tokens.

    With ``v`` the value of the estimates and ``δ`` its expected change by the refinements (:func:`doubt`), the column
    contributes ``√(v² + δ²)`` times its norm, the refinement of the column ``|v|`` times the norm, and those of the
    projections ``δ`` times the norm. In a gated FFN, ``up`` and everything after it contribute ``|act(gate)|``
    times the gated norm. If not ``relative``, there is one scale for all tokens, 1.
    """
    k = len(estimates)
    norm = norms[:, -1]
    change = doubt(estimates, value, noise, surrogate, activation)
    parts, scale = [], value.new_ones(1, 1, dtype=torch.float64)
    if relative or k == 2:
        first = response(estimates[:1], activation).abs() * norms[:, 0]
        parts += [first] * (k - 1)
        scale = first.double().square().sum(1, keepdim=True).sqrt() if relative else scale
    parts += [torch.hypot(value, change) * norm, change * norm, value.abs() * norm]
    return parts, scale


def _rotated(call: CodedFFN) -> Float[Tensor, "tokens d"]:
    x = call.x.reshape(-1, call.x.shape[-1]).float()
    return rounded(x, call.signs, wide=call.wide).to(compute_dtype(call.x.dtype))


def rounded(
    x: Float32[Tensor, "tokens d"], signs: Int8[Tensor, " d"], *, wide: bool = False
) -> Float32[Tensor, "tokens d"]:
    """Rotated tokens, rounded to integers of 8 bits with one unit for every 128 columns.

    The unit is a 127th of the largest absolute value; if ``wide``, integers have 16 bits, and it is a 32,258th. A group
    with an infinity or NaN becomes NaN.
    """
    d, most = x.shape[1], 254 * 127 if wide else 127
    padded = torch.nn.functional.pad(rotate_in_order(x, signs), (0, -d % GROUP)).unflatten(1, (-1, GROUP))
    unit = padded.abs().amax(2, keepdim=True) / most
    numbers = torch.where(unit == 0, 0, (padded / unit).round().clamp(-most, most))
    rows: Tensor = (numbers * unit).flatten(1)[:, :d]
    return rows


def _levels(
    call: CodedFFN, base: Sequence[Float[Tensor, "tokens listed"]], value: Float[Tensor, "tokens listed"]
) -> Levels:
    norms, surrogate = call.norms[: int(call.listed)].to(value.dtype), _surrogate(call, value.dtype)
    noise = noises(call, value.dtype)
    return levels(base, value, noise, norms, call.thresholds, surrogate, call.activation, relative=call.relative)


def noises(call: CodedFFN, dtype: torch.dtype) -> Sequence[Float[Tensor, " listed"]]:
    """Root-mean-square errors of the estimates of the listed neurons, for each of the k pre-activations."""
    scales = [tables.scales(rows[: int(call.listed)]).to(dtype) for rows in call.projections]
    return [scale * noise for scale, noise in zip(scales, call.noise.to(dtype), strict=True)]


def _surrogate(call: CodedFFN, dtype: torch.dtype) -> Float[Tensor, "listed coefficients"] | None:
    return None if call.surrogate is None else call.surrogate[: int(call.listed)].to(dtype)


def doubt(
    estimates: Sequence[Float[Tensor, "tokens listed"]],
    value: Float[Tensor, "tokens listed"],
    noise: Sequence[Float[Tensor, " listed"]],
    surrogate: Float[Tensor, "listed coefficients"] | None,
    activation: str,
) -> Float[Tensor, "tokens listed"]:
    """Root-mean-square change of the values if one pre-activation after the other moves up or down by its noise."""
    square = torch.zeros_like(value)
    for i, step in enumerate(noise):
        for signed in (step, -step):
            moved = [z + signed if i == j else z for j, z in enumerate(estimates)]
            square = square + (values(moved, surrogate, activation) - value).square() / 2
    return square.sqrt()


def values(
    z: Sequence[Float[Tensor, "tokens listed"]],
    surrogate: Float[Tensor, "listed coefficients"] | None,
    activation: str,
) -> Float[Tensor, "tokens listed"]:
    """Responses minus surrogates."""
    responses = response(z, activation)
    return responses if surrogate is None else surrogate_error(z, surrogate, responses)
