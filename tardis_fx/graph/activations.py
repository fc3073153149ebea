"""The registry of activations: each is one sympy expression, from which everything else is derived.

:func:`register` adds one. Matching, calibration, the eager reference and the kernels in C++ and Triton then know it:

```python
register(Activation("lecun_tanh", 1.7159 * sympy.tanh(2 * Z / 3), lambda z: 1.7159 * torch.tanh(2 * z / 3)))
```
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sympy
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn import functional

from tardis_fx.errors import ConfigError

Array = NDArray[np.float64]

Z = sympy.Symbol("Z", real=True)

REACH = 40.0
"""Kinks and inflections lie in [-REACH, REACH]; outside, a derivative is constant to rounding or diverges."""

ENDLESS = 1e100
"""Limit of the search for slope points on a side where the derivative diverges."""


@dataclass(frozen=True)
class Activation:
    """An elementwise activation: its name, its sympy formula and its torch function.

    Attributes:
        name: its key in the registry.
        expression: its formula in :data:`Z`, written so that nothing in it or in its derivatives overflows to NaN on
            [-1e4, 1e4].
        eager: its torch function, for any float dtype.
    """

    name: str
    expression: sympy.Expr
    eager: Callable[[Tensor], Tensor]

    def value(self, z: ArrayLike) -> Array:
        """The activation at ``z``, of any shape, in float64."""
        return self._derivatives[0](z)

    def derivative(self, z: ArrayLike) -> Array:
        """The derivative at ``z``, of any shape, in float64; at a kink, that of the formula that applies there."""
        return self._derivatives[1](z)

    def slope_points(self, slope: ArrayLike) -> Array:
        """Every isolated point where the derivative has a given value.

        Each monotone piece of the derivative whose end values enclose the slope holds exactly one, found by
        bisection. A stretch of constant derivative has no isolated point, and a kink does not count as one.

        Args:
            slope: [n].

        Returns:
            [n, k], ascending and padded with NaN; k is the largest number of points that any slope has.
        """
        slope = np.asarray(slope, dtype=np.float64)[..., None]
        pieces = self._pieces
        points = _bisect(self.derivative, slope, pieces.start, pieces.end, rising=pieces.rising)
        return np.sort(np.where(pieces.reach(slope), points, np.nan))[..., : pieces.most]

    def max_error(self, slope: ArrayLike, intercept: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> Array:
        """The largest ``|activation(z) - slope z - intercept|`` on ``[lower, upper]``, exact up to rounding.

        The extrema are at the bounds, the kinks and the slope points. At an infinite bound the error is its limit:
        the distance to the asymptote if the slope is that of the asymptote, else infinity.

        Args:
            slope: [n].
            intercept: [n].
            lower: [n], may be infinite.
            upper: [n], may be infinite.

        Returns:
            [n].

        Raises:
            ValueError: a lower bound is above its upper bound, or one of them is NaN.
        """
        columns = (np.asarray(argument, dtype=np.float64) for argument in (slope, intercept, lower, upper))
        slope, intercept, lower, upper = (column[..., None] for column in np.broadcast_arrays(*columns))
        if not np.all(lower <= upper):
            raise ValueError(f"max_error of {self.name}: every lower bound must be at most its upper bound")
        kinks = np.broadcast_to(self._kinks, (*slope.shape[:-1], self._kinks.size))
        inner = np.concatenate([kinks, self.slope_points(slope[..., 0])], axis=-1)
        inner = np.where((lower < inner) & (inner < upper), inner, lower)
        points = np.concatenate([lower, upper, inner], axis=-1)
        with np.errstate(invalid="ignore"):
            error = np.abs(self.value(points) - slope * points - intercept)
        for end, (tail_slope, tail_intercept) in zip((-np.inf, np.inf), self._tails, strict=True):
            limit = np.where(slope == tail_slope, np.abs(tail_intercept - intercept), np.inf)
            error = np.where(points == end, limit, error)
        return np.asarray(error.max(axis=-1))

    @functools.cached_property
    def affine(self) -> tuple[float, float] | None:
        """Slope and intercept if the activation is an affine function, else None."""
        polynomial = self.expression.as_poly(Z) if self.expression.has(Z) else sympy.Poly(self.expression, Z)
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

        in_z = self._piecewise.subs(Z, sympy.Symbol("z", real=True))
        rounded = in_z.replace(lambda e: e.is_number and not e.is_Integer, lambda e: e.evalf(9))
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

        return triton_code(self._piecewise, Z)

    @functools.cached_property
    def _piecewise(self) -> sympy.Expr:
        # A product with a piecewise factor would turn infinity times 0 into NaN; a piecewise product selects the 0.
        return sympy.piecewise_fold(self.expression.rewrite(sympy.Piecewise))

    @functools.cached_property
    def _derivatives(self) -> tuple[Callable[[ArrayLike], Array], ...]:
        """The activation, its derivative and its second derivative."""
        return tuple(_compile(self._piecewise.diff(Z, order)) for order in range(3))

    @functools.cached_property
    def _kinks(self) -> Array:
        """Points where the expression passes from one formula to the next, [kinks], ascending."""
        conditions = self._piecewise.atoms(sympy.core.relational.Relational)
        kinks = np.unique([float(z) for c in conditions for z in sympy.solve(c.lhs - c.rhs, Z)])
        if not np.all(np.abs(kinks) < REACH):
            raise ConfigError(f"{self.name}: a kink beyond {REACH}")
        return kinks

    @functools.cached_property
    def _tails(self) -> tuple[tuple[float, float], ...]:
        """Slope and intercept of the asymptotes at -inf and at inf; NaN where the derivative diverges."""
        tails = []
        for end in (-REACH, REACH):
            slope = float(self.derivative(end))
            beyond = self.derivative(np.geomspace(end, 250 * end, 1000))
            constant = bool(np.all(np.abs(beyond - slope) <= 1e-12))
            if not constant and not abs(beyond[-1]) > 10 * abs(slope):
                raise ConfigError(f"{self.name}: no asymptote found")
            tails.append((slope, float(self.value(end)) - slope * end) if constant else (np.nan, np.nan))
        return tuple(tails)

    @functools.cached_property
    def _pieces(self) -> "_Pieces":
        curvature = self._derivatives[2]
        edges = np.array([-REACH, *self._kinks, REACH])
        brackets = _sign_changes(curvature, edges, points=2000)
        # One grid misses two inflections between neighbouring points; the other grid would then find them.
        if len(brackets) != len(_sign_changes(curvature, edges, points=9001)):
            raise ConfigError(f"{self.name}: its inflections lie too close together")
        before, after = brackets.T
        inflections = _bisect(curvature, np.zeros(1), before, after, rising=curvature(after) > curvature(before))
        below, above = (ENDLESS if np.isnan(slope) else REACH for slope, _ in self._tails)
        ends = np.unique([-below, *self._kinks, *inflections, above])
        start, end = ends[:-1], ends[1:]
        # Taken one step inwards, since the derivative may jump at a kink.
        at_start, at_end = self.derivative(np.nextafter(start, end)), self.derivative(np.nextafter(end, start))
        closed = np.isin(start, inflections)
        varies = at_start != at_end
        return _Pieces(*(column[varies] for column in (start, end, at_start, at_end, closed)))


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
        ConfigError: the name is taken or not an identifier; the expression has symbols other than :data:`Z`, a kink
            beyond :data:`REACH` or no asymptote, or C++ or Triton has no code for it; the eager function computes
            something else; or the registry is closed.
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
    for derive in (lambda: activation.slope_points([0.0]), lambda: activation.cxx, lambda: activation.triton):
        derive()  # raises where it cannot
    ACTIVATIONS[name] = activation
    return activation


def close() -> tuple[Activation, ...]:
    """Closes the registry, so that no activation can be added, and returns the registered ones."""
    global _closed
    _closed = True
    return tuple(ACTIVATIONS.values())


@dataclass(frozen=True)
class _Pieces:
    """The intervals on which a derivative rises or falls: their bounds and the derivative at these, each [pieces]."""

    start: Array
    end: Array
    at_start: Array
    at_end: Array
    closed: NDArray[np.bool_]
    """Whether the start belongs to the piece: an inflection does; a kink and the far end of a tail do not."""

    @property
    def rising(self) -> NDArray[np.bool_]:
        """Whether the derivative rises on each piece, [pieces]."""
        return self.at_start < self.at_end

    @functools.cached_property
    def most(self) -> int:
        """The largest number of pieces that reach one slope."""
        values = np.unique([self.at_start, self.at_end])
        slopes = np.concatenate([values, (values[1:] + values[:-1]) / 2])
        return int(self.reach(slopes[:, None]).sum(axis=-1).max(initial=0))

    def reach(self, slope: Array) -> NDArray[np.bool_]:
        """Whether the derivative takes the slope, [n, 1], on each piece: [n, pieces]."""
        low, high = np.minimum(self.at_start, self.at_end), np.maximum(self.at_start, self.at_end)
        return np.asarray((low < slope) & (slope < high) | self.closed & (slope == self.at_start))


def _compile(expression: sympy.Expr) -> Callable[[ArrayLike], Array]:
    """Compiles the expression to a float64 function of arrays; a constant is broadcast to their shape."""
    function = sympy.lambdify(Z, expression, modules=["scipy", "numpy"], cse=True)

    def evaluate(z: ArrayLike) -> Array:
        z = np.asarray(z, dtype=np.float64)
        with np.errstate(all="ignore"):
            return np.full(z.shape, function(z), dtype=np.float64)

    return evaluate


def _sign_changes(function: Callable[[ArrayLike], Array], edges: Array, *, points: int) -> Array:
    """Brackets of the sign changes between neighbouring edges, [changes, 2]; values below 1e-12 are rounding noise."""
    brackets: list[tuple[float, float]] = []
    for start, end in itertools.pairwise(edges):
        grid = np.linspace(start, end, points)[1:-1]
        grid = grid[np.abs(function(grid)) > 1e-12]
        change = np.flatnonzero(np.diff(np.sign(function(grid))))
        brackets += zip(grid[change], grid[change + 1], strict=True)
    return np.array(brackets, dtype=np.float64).reshape(-1, 2)


def _bisect(
    function: Callable[[ArrayLike], Array], target: Array, start: Array, end: Array, *, rising: NDArray[np.bool_]
) -> Array:
    """Points where a function that is monotone between start and end takes the target; elementwise, broadcast.

    It bisects asinh z, so that a piece of any length takes the same steps and a far root keeps its digits.
    """
    shape = np.broadcast_shapes(target.shape, start.shape)
    low, high = (np.broadcast_to(np.arcsinh(bound), shape) for bound in (start, end))
    for _ in range(64):
        middle = (low + high) / 2
        values = function(np.sinh(middle))
        short = np.where(rising, values < target, values > target)
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return np.asarray(np.sinh(high))
