"""The ways in which models write activations: one call, a method, or arithmetic."""

import math
import operator
from collections.abc import Callable

import torch
from torch import fx
from torch.nn import functional as F  # noqa: N812

from tardis_fx.testing.building import Graph

Spelling = Callable[[Graph, fx.Node], fx.Node]
"""Adds an activation of a node to a graph and returns its result."""


def _gelu_tanh(cube: Spelling) -> Spelling:
    def spell(g: Graph, z: fx.Node) -> fx.Node:
        inner = g.call(torch.add, z, g.call(operator.mul, 0.044715, cube(g, z)))
        tanh = g.call(torch.tanh, g.call(operator.mul, math.sqrt(2 / math.pi), inner))
        return g.call(operator.mul, g.call(operator.mul, 0.5, z), g.call(operator.add, 1.0, tanh))

    return spell


def _gelu_erf(g: Graph, z: fx.Node) -> fx.Node:
    erf = g.call(torch.erf, g.call(operator.truediv, z, math.sqrt(2)))
    return g.call("mul", g.call("mul", z, 0.5), g.call(operator.add, erf, 1.0))


#: Ways to write each activation.
SPELLINGS: dict[str, list[Spelling]] = {
    "relu": [
        lambda g, z: g.call(F.relu, z),
        lambda g, z: g.call("relu", z),
        lambda g, z: g.call(torch.clamp, z, min=0),
        lambda g, z: g.call("clamp_min", z, 0),
        lambda g, z: g.call(operator.mul, g.call(operator.add, z, g.call(torch.abs, z)), 0.5),
        lambda g, z: g.call(torch.threshold, z, 0, 0),
        lambda g, z: g.call(torch.where, g.call(operator.gt, z, 0), z, 0),
        lambda g, z: g.call(operator.mul, z, g.call("to", g.call(operator.gt, z, 0), torch.float32)),
    ],
    "relu2": [
        lambda g, z: g.call(torch.square, g.call(F.relu, z)),
        lambda g, z: g.call(torch.pow, g.call(torch.relu, z), 2),
        lambda g, z: g.call(operator.mul, r := g.call(F.relu, z), r),
    ],
    "gelu": [lambda g, z: g.call(F.gelu, z), lambda g, z: g.call(F.gelu, z, approximate="none"), _gelu_erf],
    "gelu_tanh": [
        lambda g, z: g.call(F.gelu, z, approximate="tanh"),
        _gelu_tanh(lambda g, z: g.call(torch.pow, z, 3.0)),
        _gelu_tanh(lambda g, z: g.call(operator.mul, g.call(operator.mul, z, z), z)),
    ],
    "gelu_quick": [lambda g, z: g.call(operator.mul, z, g.call(torch.sigmoid, g.call(operator.mul, 1.702, z)))],
    "silu": [
        lambda g, z: g.call(F.silu, z),
        lambda g, z: g.call(torch.mul, g.call("sigmoid", z), z),
        lambda g, z: g.call(operator.truediv, z, g.call(operator.add, g.call(torch.exp, g.call(operator.neg, z)), 1)),
    ],
}
