# mypy: ignore-errors
"""The registered activations in Triton, generated from their expressions when this module is imported."""

import hashlib
import linecache

import triton
import triton.language as tl

from tardis_fx.graph.activations import close


@triton.jit
def tanh(z):
    """Computes tanh as ``2 sigmoid(2z) - 1``, or a series where that would cancel; the interpreter has no tanh."""
    square = z * z
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(tl.abs(z) < 0.25, z * series, 2 * tl.sigmoid(2 * z) - 1)


def generate(activations):
    """Generates the function of ``z`` and a name that computes these activations."""
    cases = "    el".join(f"if NAME == {a.name!r}:\n        return {a.triton}\n" for a in activations)
    source = f'''def activation(z, NAME: tl.constexpr):
    """The activation of this name, elementwise, of float32; a NaN stays one."""
    {cases}    else:
        tl.static_assert(False, "this activation has no formula in Triton")
'''
    # Triton and its interpreter get the source from inspect. No file has such a name in brackets, and linecache does
    # not look for a file if its entry has no time.
    name = f"<tardis_fx activations {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope = {"__name__": __name__, "tl": tl, "tanh": tanh}
    exec(compile(source, name, "exec"), scope)
    return triton.jit(scope["activation"])


activation = generate(close())
