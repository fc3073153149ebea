"""The registry of activations: each is one sympy expression, from which everything else is derived.

:func:`register` adds one. Matching, calibration, the eager reference and the kernels in C++ and Triton then know it:

```python
register(Activation("lecun_tanh", 1.7159 * sympy.tanh(2 * Z / 3), lambda z: 1.7159 * torch.tanh(2 * z / 3)))
```
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sympy
import torch
from jaxtyping import Float, Float64
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional

from tardis_fx.errors import ConfigError

Z = sympy.Symbol("z", real=True)


@dataclass(frozen=True)
class Activation:
    """An elementwise activation: its name, its sympy formula and its torch function.

    Attributes:
        name: its key in the registry.
        expression: its formula in :data:`Z`, written so that nothing in it overflows to NaN on [-1e4, 1e4].
        eager: its torch function, for any float dtype.
    """

    name: str
    expression: sympy.Expr
    eager: Callable[[Float[Tensor, "*z"]], Float[Tensor, "*z"]]

    def value(self, z: ArrayLike) -> Float64[np.ndarray, "..."]:
        """The activation at ``z``, in its shape."""
        z = np.asarray(z, dtype=np.float64)
        with np.errstate(all="ignore"):
            return np.full(z.shape, self._evaluate(z), dtype=np.float64)  # the value may be one constant

    @functools.cached_property
    def affine(self) -> tuple[float, float] | None:
        """Slope and intercept if the activation is an affine function, else None."""
        polynomial = self.expression.as_poly(Z)
        if polynomial is None or polynomial.degree() > 1:
            return None
        return float(polynomial.nth(1)), float(polynomial.nth(0))

    @property
    def cxx(self) -> str:
        """The activation as a C++ expression of ``float z``, in single precision throughout.

        Raises:
            ConfigError: the expression has a function that C++ does not have.
        """
        from sympy.codegen.ast import float32, real  # slow to import, seldom needed
        from sympy.codegen.rewriting import create_expand_pow_optimization

        rounded = self._piecewise.replace(lambda e: e.is_number and not e.is_Integer, lambda e: e.evalf(9))
        products = create_expand_pow_optimization(4, base_req=lambda base: True)(rounded)
        try:
            code = " ".join(sympy.cxxcode(products, type_aliases={real: float32}, strict=True).split())
        except NotImplementedError as error:
            raise ConfigError(f"no C++ code for {self.expression}: {error}") from error
        choices = self._piecewise.atoms(sympy.Piecewise)
        # A NaN fails every comparison, so it takes the last formula.
        return code if all(choice.args[-1].expr.free_symbols for choice in choices) else f"((z == z) ? ({code}) : (z))"

    @property
    def triton(self) -> str:
        """The activation as a Triton expression of ``z``, float32; it may call the ``tanh`` of the kernels' module.

        Raises:
            ConfigError: the expression has a function or a power that Triton does not have.
        """
        from tardis_fx.graph.triton_printer import triton_code

        return triton_code(self._piecewise)

    @functools.cached_property
    def _piecewise(self) -> sympy.Expr:
        # Factors are folded one by one: a product stays a product, in which infinity times 0 is NaN, as in PyTorch.
        factors = sympy.Mul.make_args(self.expression.rewrite(sympy.Piecewise))
        return sympy.Mul(*map(sympy.piecewise_fold, factors))

    @functools.cached_property
    def _evaluate(self) -> Callable[[Float64[np.ndarray, "*z"]], Float64[np.ndarray, "*z"]]:
        return sympy.lambdify(Z, self._piecewise, modules=["scipy", "numpy"], cse=True)  # type: ignore[no-any-return]


_SIGMOID = (1 + sympy.tanh(Z / 2)) / 2
_QUICK_SIGMOID = _SIGMOID.subs(Z, sympy.Rational("1.702") * Z)
_GELU_CUBIC = sympy.sqrt(2 / sympy.pi) * (Z + sympy.Rational("0.044715") * Z**3)

# Piecewise rather than Max and Min, whose C++ does not keep a NaN.
ACTIVATIONS: dict[str, Activation] = {
    activation.name: activation
    for activation in (
        Activation("identity", Z, lambda z: z),
        Activation("relu", sympy.Piecewise((0, Z < 0), (Z, True)), functional.relu),
        Activation("relu2", sympy.Piecewise((0, Z < 0), (Z**2, True)), lambda z: functional.relu(z).square()),
        Activation("leaky_relu", sympy.Piecewise((Z / 100, Z < 0), (Z, True)), functional.leaky_relu),
        Activation("gelu", Z * (1 + sympy.erf(Z / sympy.sqrt(2))) / 2, functional.gelu),
        Activation(
            "gelu_tanh", Z * (1 + sympy.tanh(_GELU_CUBIC)) / 2, lambda z: functional.gelu(z, approximate="tanh")
        ),
        Activation("gelu_quick", Z * _QUICK_SIGMOID, lambda z: z * (1.702 * z).sigmoid()),
        Activation("silu", Z * _SIGMOID, functional.silu),
        # tanh(softplus(z)) is (1 - (1 - s)^2) / (1 + (1 - s)^2), where s is the sigmoid.
        Activation("mish", Z * (2 / (1 + (1 - _SIGMOID) ** 2) - 1), functional.mish),
        Activation(
            "hardswish", Z * sympy.Piecewise((0, Z < -3), (1, Z > 3), ((Z + 3) / 6, True)), functional.hardswish
        ),
        Activation("tanh", sympy.tanh(Z), torch.tanh),
        Activation("sigmoid", _SIGMOID, torch.sigmoid),
    )
}

_closed = False


def register(activation: Activation) -> Activation:
    """Adds an activation to the registry.

    A plan names its activations: register them in every process that calibrates a model or loads a plan, before the
    first call on a CUDA device, whose kernels are generated once.

    Returns:
        The activation.

    Raises:
        ConfigError: the name is taken or not an identifier; the expression has symbols other than :data:`Z`; C++ or
            Triton has no code for it; the eager function computes something else; or the registry is closed.
    """
    name = activation.name
    if not name.isidentifier():
        raise ConfigError(f"the name of an activation must be an identifier, not {name!r}")
    if name in ACTIVATIONS or name == "affine":
        raise ConfigError(f"there is an activation {name!r} already")
    if _closed:
        raise ConfigError(f"{name}: activations must be registered before the first call on a CUDA device")
    if not activation.expression.free_symbols <= {Z}:
        raise ConfigError(f"{name}: the only symbol in {activation.expression} must be tardis_fx.graph.activations.Z")
    z = np.linspace(-30, 30, 601)
    if not np.allclose(activation.value(z), activation.eager(torch.from_numpy(z)).numpy(), rtol=1e-6, atol=1e-6):
        raise ConfigError(f"{name}: the eager function does not compute {activation.expression}")
    _ = activation.cxx, activation.triton  # raises an error if there is no code
    ACTIVATIONS[name] = activation
    return activation


def close() -> tuple[Activation, ...]:
    """Closes the registry, so that no activation can be added, and returns the registered ones."""
    global _closed
    _closed = True
    return tuple(ACTIVATIONS.values())
