"""Activations that are not registered."""

import sympy
import torch
from torch.nn import functional

from tardis_fx.graph.activations import Activation, Z

_HALF = sympy.tanh(Z / 2)

#: Spelt with Max and Min.
RELU6 = Activation("relu6", sympy.Min(sympy.Max(Z, 0), 6), functional.relu6)
#: Its derivative diverges on both sides.
CUBE = Activation("cube", Z**3, lambda z: z**3)
#: exp(z) - 1 without cancellation: (1 + t) / (1 - t) - 1, with t = tanh(z / 2).
ELU = Activation("elu", sympy.Piecewise((2 * _HALF / (1 - _HALF), Z < 0), (Z, True)), functional.elu)
LECUN_TANH = Activation(
    "lecun_tanh", sympy.Rational("1.7159") * sympy.tanh(2 * Z / 3), lambda z: 1.7159 * torch.tanh(2 * z / 3)
)
