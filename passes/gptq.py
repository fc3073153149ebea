"""GPTQ (arXiv 2210.17323): weight-only quantisation of all matrices that minimises the error of their products.

Like :mod:`tardis_fx.passes.rtn`, but each column compensates for the rounding of earlier columns, by the Gram matrix of
the matrix's operand: the site's inputs for W1 and a gate, the neurons' responses for W2.
"""

from typing import ClassVar

from tardis_fx.passes.rtn import Rtn
from tardis_fx.statistics.operands import ByMatrix, Grams


class Gptq(Rtn):
    """Quantises all matrices by GPTQ."""

    name: ClassVar[str] = "gptq"
    operands: ClassVar[type[ByMatrix] | None] = Grams
