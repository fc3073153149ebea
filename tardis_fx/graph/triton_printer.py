# ruff: noqa: N802, N815 - sympy finds a printer's methods by the names of its classes
"""Prints a sympy expression as a Triton expression of ``z``, in float32."""

import ast

import numpy as np
import sympy
from sympy.printing.precedence import PRECEDENCE
from sympy.printing.str import StrPrinter

from tardis_fx.errors import ConfigError

_FUNCTIONS = ("abs", "cos", "erf", "exp", "log", "sigmoid", "sin", "sqrt")
_SIGMOID = sympy.Function("sigmoid")


def triton_code(expression: sympy.Expr) -> str:
    """Prints an expression as Triton code.

    A NaN stays NaN. A tanh in a sum that cancels it becomes a sigmoid; any other is a call of ``tanh``, which the
    kernel's module must define.

    Args:
        expression: of the symbol ``z``, with :class:`sympy.Piecewise` instead of Max, Min and the like.

    Raises:
        ConfigError: the expression has an unknown function or power.
    """
    factored = sympy.factor_terms(expression.replace(lambda e: e.is_Add, _with_sigmoid))
    rounded = factored.replace(lambda e: e.is_number and not e.is_Integer, lambda e: e.evalf())
    code: str = _Printer().doprint(rounded)
    unknown = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)} - {"z", "tl", "tanh"}
    if unknown:
        raise ConfigError(f"no Triton code for {', '.join(sorted(unknown))} in {expression}")
    return code


def _with_sigmoid(add: sympy.Add) -> sympy.Expr:
    """Replaces ``a + a tanh(u)`` in a sum by ``2 a sigmoid(2 u)``, which keeps its digits where tanh is close to -1."""
    number = add.as_coeff_Add()[0]
    for term in add.args:
        scale, function = term.as_coeff_Mul()
        if isinstance(function, sympy.tanh) and number in (scale, -scale):
            return add - number - term + 2 * number * _SIGMOID(2 * scale / number * function.args[0])
    return add


class _Printer(StrPrinter):  # type: ignore[misc]
    """Prints every number as a float32."""

    def _print_Integer(self, expr: sympy.Integer) -> str:
        return str(np.float32(float(expr)))

    _print_Zero = _print_One = _print_NegativeOne = _print_Float = _print_Integer

    def _print_Function(self, expr: sympy.Function) -> str:
        name = type(expr).__name__.lower()
        return f"{'tl.' * (name in _FUNCTIONS)}{name}({self.stringify(expr.args, ', ')})"

    _print_Abs = _print_ExpBase = _print_Function

    def _print_Pow(self, expr: sympy.Pow, rational: bool = False) -> str:
        exponent = abs(float(expr.exp)) if expr.exp.is_number else None
        factor = self.parenthesize(expr.base, PRECEDENCE["Pow"], strict=True)
        if exponent == 0.5:
            power = f"tl.sqrt({self._print(expr.base)})"
        elif exponent is not None and exponent in range(1, 9):
            power = "*".join([factor] * int(exponent))
        else:
            raise ConfigError(f"no Triton code for the power {expr.exp} in {expr}")
        return f"({power})" if expr.exp > 0 else f"(1.0/({power}))"

    def _print_Piecewise(self, expr: sympy.Piecewise) -> str:
        *pieces, (last, _) = expr.args
        code = self._print(last)
        for value, condition in reversed(pieces):
            code = f"tl.where({self._print(condition)}, {self._print(value)}, {code})"
        return code if last.free_symbols else f"tl.where(z == z, {code}, z)"  # no comparison holds for a NaN
