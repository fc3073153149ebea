"""GPTQ (arXiv 2210.17323): weight-only quantisation of all matrices that changes their products least.

As :mod:`tardis_fx.passes.rtn`, but each column makes up for what rounding did to those before it, by the Gram matrix of
what the matrix multiplies: of the site's inputs for W1 and a gate, of what the neurons give for W2.
"""

from __future__ import annotations

from typing import ClassVar

from tardis_fx.passes.rtn import Rtn
from tardis_fx.statistics.operands import ByMatrix, Grams


class Gptq(Rtn):
    """The rule of the module's docstring."""

    name: ClassVar[str] = "gptq"
    operands: ClassVar[type[ByMatrix] | None] = Grams
