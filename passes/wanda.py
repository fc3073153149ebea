"""Wanda (arXiv 2306.11695): prunes weights by their magnitude times the norm of their operand.

Quality baseline, no speed-up. ``score[i, j] = |W[i, j]| ‖x_j‖₂`` (section 3, equation 1), compared within each row;
``wanda_2_4`` keeps two of each four neighbours in a row.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tardis_fx.passes.matrix_forms import Weight
from tardis_fx.passes.sparse import Scored


class Wanda(Scored):
    """Prunes weights by magnitude times the norm of their operand."""

    name: ClassVar[str] = "wanda"
    by_row: ClassVar[bool] = True

    def score(self, weight: Weight, norms: Float[Tensor, " columns"]) -> Weight:
        """Magnitude of each weight times the norm of its operand, ``|W| ‖x‖``."""
        return weight.abs() * norms


class Wanda24(Wanda):
    """Wanda pruning that keeps two of each four neighbours."""

    name: ClassVar[str] = "wanda_2_4"
    two_of_four: ClassVar[bool] = True
