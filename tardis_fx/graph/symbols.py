"""Finds sizes that ``torch._dynamo.mark_dynamic`` promises to keep symbolic, on which a guard can be an error."""

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, StrictMinMaxConstraint, statically_known_true


def pinned_between(size: torch.SymInt | int, limit: int) -> bool:
    """Whether Dynamo would refuse a graph that is limited to sizes on one side of a limit.

    It does if the user marked a dimension with a range that spans the limit, or one that would be left with a single
    value.

    Args:
        size: of the graph's inputs, or computed from their sizes.
        limit: the largest size on the lower side.
    """
    if isinstance(size, int) or statically_known_true(size <= limit) or statically_known_true(size > limit):
        return False
    shape_env, expression = size.node.shape_env, size.node.expr
    marked = _marked(shape_env)
    symbols = expression.free_symbols & marked.keys()
    if any(marked[symbol] for symbol in symbols):
        return True
    if not symbols or len(expression.free_symbols) > 1 or size.node.hint > limit:
        return False
    (symbol,) = symbols
    least = shape_env.var_to_range[symbol].lower
    return bool(expression.subs(symbol, least + 1) > limit)


def _marked(shape_env: ShapeEnv) -> dict[sympy.Symbol, bool]:
    """The symbols of sizes that the user marked as dynamic, and whether with a range."""
    marked: dict[sympy.Symbol, bool] = {}
    for tracked in shape_env.tracked_fakes or ():
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None) or ()
        for size, constraint in zip(getattr(tracked.fake, "shape", ()), constraints, strict=False):
            if isinstance(size, torch.SymInt) and constraint is not None and not constraint.warn_only:
                ranged = isinstance(constraint, StrictMinMaxConstraint)
                for symbol in size.node.expr.free_symbols:
                    marked[symbol] = ranged or marked.get(symbol, False)
    return marked
