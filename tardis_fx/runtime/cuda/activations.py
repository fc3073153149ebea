# mypy: ignore-errors
"""The registered activations in Triton: the formulas of :mod:`tardis_fx.graph.activations`, written for float32."""

import triton
import triton.language as tl


@triton.jit
def tanh(z):
    """Of the sigmoid, which overflows nowhere; the language has no other that the interpreter knows."""
    return 2 * tl.sigmoid(2 * z) - 1


@triton.jit
def activation(z, NAME: tl.constexpr):
    """The activation of this name, elementwise, of float32; a NaN stays one."""
    if NAME == "identity":
        return z
    elif NAME == "relu":
        return tl.where(z < 0, 0.0, z)
    elif NAME == "relu2":
        return tl.where(z < 0, 0.0, z * z)
    elif NAME == "leaky_relu":
        return tl.where(z < 0, z * 0.01, z)
    elif NAME == "gelu":
        return z * (1 + tl.erf(z * 0.7071067811865476)) * 0.5
    elif NAME == "gelu_tanh":
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif NAME == "gelu_quick":
        return z * tl.sigmoid(1.702 * z)
    elif NAME == "silu":
        return z * tl.sigmoid(z)
    elif NAME == "mish":  # tanh(softplus(z)), without the exponential of a large z
        other = 1 - tl.sigmoid(z)
        return z * (2 / (1 + other * other) - 1)
    elif NAME == "hardswish":
        return tl.where(z < -3, 0.0, tl.where(z > 3, z, z * (z + 3) / 6))
    elif NAME == "tanh":
        return tanh(z)
    else:
        tl.static_assert(NAME == "sigmoid", "this activation has no formula in Triton")
        return tl.sigmoid(z)
