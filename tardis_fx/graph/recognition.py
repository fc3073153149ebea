"""Recognises the activation that a function computes by comparing its values with the registry's."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import sympy
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tardis_fx.graph.activations import ACTIVATIONS, Activation, Z

Points = Float64[np.ndarray, " points"]

#: Limits beyond which intermediate values of an activation overflow, in float32 and in float64.
_LARGEST, _LARGEST_KINK = 1e37, 1e100

#: Largest values of number types: 8-bit floats, 8- and 16-bit integers, float16.
_EDGES = (127, 240, 255, 448, 480, 32767, 57344, 61440, 65504, 65535)


def recognise(
    function: Callable[[Tensor], Tensor],
    *,
    compared: Callable[[Tensor], Sequence[Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Activation | None:
    """The activation, registered or affine, that a function computes, regardless of its arithmetic.

    Constants may be rounded: the values must agree within 1e-6, relative to the value and to the smaller of argument
    and 1. They are compared at about 2000 points in [-12, 12], at others up to the largest number of the type, where a
    clipped activation differs, down to 1e-37, and around kinks. At the infinities either value may be NaN. Nothing is
    required for a NaN input, which an explicit comparison turns into a number. An affine function must be affine to
    rounding.

    Args:
        function: an elementwise function; called without gradients on CPU tensors [points], of float64, and of float32
            for the infinities.
        compared: differences whose signs select the formula that the function computes, [points] each; the function
            may have a kink where a sign changes.
        dtype: of the function's arguments in the model.

    Returns:
        The activation, or None if none agrees or the function raises, or returns anything but values of the same shape.
    """
    largest = torch.finfo(dtype).max
    points = _grid(largest)
    values = _values(function, points)
    if values is None:
        return None
    if (line := _line(points, values)) is not None:
        activation = ACTIVATIONS["identity"] if line == (1, 0) else _affine(*line)
    else:
        curved = (a for name, a in ACTIVATIONS.items() if name != "identity")
        agreeing = next((a for a in curved if _agree(points, values, _expected(a, largest))), None)
        if agreeing is None:
            return None
        activation = agreeing
    return activation if _agrees_off_grid(activation, function, compared, dtype) else None


def recognise_product(
    function: Callable[[Tensor, Tensor], Tensor],
    *,
    compared: Callable[[Tensor, Tensor], Sequence[Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Activation | None:
    """The activation of a function that computes ``activation(gate) * up``, or None if it is no such product.

    Args:
        function: of gate and up, [points] each; see :func:`recognise`.
        compared: see :func:`recognise`.
        dtype: see :func:`recognise`.
    """

    def along(place: Callable[[Tensor], tuple[Tensor, Tensor]], divisor: float = 1.0) -> Activation | None:
        """The activation of the function along a line in the plane of gate and up."""
        return recognise(
            lambda z: function(*place(z)) / divisor,
            compared=None if compared is None else lambda z: compared(*place(z)),
            dtype=dtype,
        )

    def of_gate(up: float) -> Activation | None:
        return along(lambda gate: (gate, torch.full_like(gate, up)), up)

    def is_linear_in_up(gate: float, factor: float) -> bool:
        activation = along(lambda up: (torch.full_like(up, gate), up))
        slope, intercept = (activation and activation.affine) or (math.nan, math.nan)
        return intercept == 0 and math.isclose(slope, factor, rel_tol=1e-6)

    activation = of_gate(1.0)
    if activation is None or activation.affine is not None:
        return None
    linear = all(is_linear_in_up(gate, float(activation.value(gate))) for gate in (-0.7, 0.7, 3.0))
    return activation if linear and all(of_gate(up) is activation for up in (-2.5, 1e4, -1e4)) else None


def _agrees_off_grid(
    activation: Activation,
    function: Callable[[Tensor], Tensor],
    compared: Callable[[Tensor], Sequence[Tensor]] | None,
    dtype: torch.dtype,
) -> bool:
    """Whether a function that agrees with an activation on the grid also agrees at its kinks and at the infinities."""
    ends = torch.tensor([-torch.inf, torch.inf], dtype=torch.promote_types(dtype, torch.float32), device="cpu")
    values, expected = _values(function, ends), _values(activation.eager, ends)
    if values is None or expected is None:
        return False
    if not np.all((values == expected) | np.isnan(values) | np.isnan(expected)):
        return False
    if compared is None:
        return True
    largest = torch.finfo(dtype).max
    points = _around(_kinks(compared, _grid(largest)))
    points = points[np.abs(points) <= min(largest, _LARGEST_KINK)]
    values = _values(function, points)
    return values is not None and _agree(points, values, activation.value(points))


def _values(function: Callable[[Tensor], Tensor], points: Float[Tensor, " points"] | Points) -> Points | None:
    try:
        with torch.no_grad():
            values: Points = function(torch.as_tensor(points, device="cpu").clone()).to(torch.float64).numpy()
    except Exception:  # a function of unknown origin may fail in any way
        return None
    return values if values.shape == points.shape else None


def _agree(points: Points, values: Points, expected: Points) -> bool:
    with np.errstate(all="ignore"):
        # A product of very small numbers may come out as 0, or not.
        allowed = 1e-6 * (np.minimum(1, np.abs(points)) + np.abs(expected)) + 1e-300
        return bool(np.all(np.abs(values - expected) <= allowed))


def _line(points: Points, values: Points) -> tuple[float, float] | None:
    """Slope and intercept of the affine function with these values, if there is one."""
    at = {z: values[np.flatnonzero(points == z)[0]] for z in (0.0, 12.0)}
    with np.errstate(all="ignore"):
        intercept, slope = float(at[0.0]), float((at[12.0] - at[0.0]) / 12)
        error = np.abs(values - slope * points - intercept)
        exact = np.all(error <= 1e-13 * (np.abs(slope * points) + np.abs(intercept)))
    return (slope, intercept) if exact else None


def _affine(slope: float, intercept: float) -> Activation:
    return Activation("affine", sympy.Float(slope) * Z + sympy.Float(intercept), lambda z: slope * z + intercept)


@functools.cache
def _grid(largest: float) -> Points:
    """A grid that is dense where activations bend, and up to the largest number of a type."""
    largest = min(largest, _LARGEST)
    edges = np.outer(_EDGES, [1 - 1e-3, 1, 1 + 1e-3]).ravel()
    far = np.concatenate([[20, 50, 100, largest], edges, np.geomspace(12.1, largest, 400)])
    sides = np.concatenate([far[far <= largest], np.geomspace(1e-37, 1e-2, 100)])
    return np.unique(np.concatenate([np.linspace(-12, 12, 2001), -sides, sides]))


@functools.cache
def _expected(activation: Activation, largest: float) -> Points:
    """Values of an activation on the grid."""
    return activation.value(_grid(largest))


def _kinks(compared: Callable[[Tensor], Sequence[Tensor]], points: Points) -> Float64[np.ndarray, " kinks"]:
    """Points where a difference changes its sign, to rounding."""
    kinks = points[:0]
    for _ in range(2):  # a sign change hidden between two points shows once its kinks are among the points
        signs = _signs(compared, points)
        row, column = np.nonzero(signs[:, 1:] != signs[:, :-1])
        if not row.size:
            break
        bracket, each = np.arcsinh(np.stack([points[column], points[column + 1]])), np.arange(row.size)
        for _ in range(8):  # as fine as 64 halvings; one call with many points is faster than many calls
            steps = np.linspace(bracket[0], bracket[1], 257)
            at_steps = _signs(compared, np.sinh(steps).ravel()).reshape(-1, *steps.shape)[row, :, each]
            differs = at_steps != signs[row, column][:, None]
            differs[:, -1] = True
            first = np.maximum(differs.argmax(1), 1)
            bracket = np.stack([steps[first - 1, each], steps[first, each]])
        kinks = np.unique(np.sinh(bracket))
        points = np.unique(np.concatenate([points, _around(kinks)]))
    return kinks


def _signs(compared: Callable[[Tensor], Sequence[Tensor]], points: Points) -> Float64[np.ndarray, "differences points"]:
    """Signs of the differences; 0 for NaN."""
    with torch.no_grad():
        differences = [d.double().numpy() for d in compared(torch.from_numpy(points.copy()))]
    return np.asarray(np.nan_to_num(np.sign(np.array(differences).reshape(-1, points.size))))


def _around(kinks: Float64[np.ndarray, " kinks"]) -> Float64[np.ndarray, " points"]:
    """Points at the kinks, on both sides of each, and between neighbours."""
    sides = [np.nextafter(kinks, -np.inf), np.nextafter(kinks, np.inf), kinks * (1 - 1e-5), kinks * (1 + 1e-5)]
    return np.concatenate([kinks, *sides, (kinks[1:] + kinks[:-1]) / 2])
