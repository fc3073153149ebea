"""Activations that are not registered, and the largest error of a surrogate."""

import numpy as np
import sympy
import torch
from jaxtyping import Float64
from torch.nn import functional

from tardis_fx.graph.activations import Activation, Z

_HALF = sympy.tanh(Z / 2)

#: Spelt with Max and Min.
RELU6 = Activation("relu6", sympy.Min(sympy.Max(Z, 0), 6), functional.relu6)
CUBE = Activation("cube", Z**3, lambda z: z**3)
#: exp(z) - 1 without cancellation: (1 + t) / (1 - t) - 1, with t = tanh(z / 2).
ELU = Activation("elu", sympy.Piecewise((2 * _HALF / (1 - _HALF), Z < 0), (Z, True)), functional.elu)
LECUN_TANH = Activation(
    "lecun_tanh", sympy.Rational("1.7159") * sympy.tanh(2 * Z / 3), lambda z: 1.7159 * torch.tanh(2 * z / 3)
)


def largest_error(
    activation: Activation,
    slope: Float64[np.ndarray, " h"],
    intercept: Float64[np.ndarray, " h"],
    lower: Float64[np.ndarray, " h"],
    upper: Float64[np.ndarray, " h"],
) -> Float64[np.ndarray, " h"]:
    """The largest ``|activation(z) - slope z - intercept|`` of each neuron on its ``[lower, upper]``, by a fine grid."""
    kinks = np.array([[-3.0], [0.0], [3.0]])
    z = np.concatenate([np.linspace(lower, upper, 10_000), np.clip(kinks, lower, upper)])
    return np.asarray(np.abs(activation.value(z) - slope * z - intercept).max(axis=0))
