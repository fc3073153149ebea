"""Magnitude pruning: the smallest weights of a matrix become zero. Quality baseline, no speed-up.

``score = |W|``, over the whole matrix; ``magnitude_2_4`` keeps two of each four neighbours of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tardis_fx.passes.sparse import Scored

if TYPE_CHECKING:
    from torch import Tensor


class Magnitude(Scored):
    """The rule of the module's docstring."""

    name: ClassVar[str] = "magnitude"

    def score(self, weight: Tensor, norms: Tensor) -> Tensor:
        """``|W|``."""
        return weight.abs()


class Magnitude24(Magnitude):
    """Two of four."""

    name: ClassVar[str] = "magnitude_2_4"
    two_of_four: ClassVar[bool] = True
