"""Magnitude pruning: the smallest weights of a matrix become zero. Quality baseline, no speed-up.

``score = |W|``, over the whole matrix; ``magnitude_2_4`` keeps two of each four neighbours in a row.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tardis_fx.passes.matrix_forms import Weight
from tardis_fx.passes.sparse import Scored


class Magnitude(Scored):
    """Prunes the weights with the smallest magnitudes of each matrix."""

    name: ClassVar[str] = "magnitude"

    def score(self, weight: Weight, norms: Float[Tensor, " columns"]) -> Weight:
        """Magnitude of each weight, ``|W|``."""
        return weight.abs()


class Magnitude24(Magnitude):
    """Magnitude pruning that keeps two of each four neighbours."""

    name: ClassVar[str] = "magnitude_2_4"
    two_of_four: ClassVar[bool] = True
