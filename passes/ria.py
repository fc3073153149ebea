"""RIA (Zhang et al., "Plug-and-Play", ICLR 2024): prunes by relative importance and activations.

Quality baseline, no speed-up.

    score[i, j] = (|W[i, j]| / Σ_k |W[i, k]| + |W[i, j]| / Σ_k |W[k, j]|) ‖x_j‖₂^½

compared over the whole matrix; ``ria_2_4`` keeps two of each four neighbours in a row. The paper's permutation of
channels before 2:4 pruning is left out.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tardis_fx.passes.matrix_forms import Weight
from tardis_fx.passes.sparse import Scored


class Ria(Scored):
    """Prunes weights by relative importance and activations."""

    name: ClassVar[str] = "ria"

    def score(self, weight: Weight, norms: Float[Tensor, " columns"]) -> Weight:
        """Relative importance times the root of the norms."""
        size = weight.abs()
        in_row, in_column = (size / size.sum(axis, keepdim=True).clamp(min=1e-30) for axis in (1, 0))
        return (in_row + in_column) * norms.sqrt()


class Ria24(Ria):
    """RIA pruning that keeps two of each four neighbours."""

    name: ClassVar[str] = "ria_2_4"
    two_of_four: ClassVar[bool] = True
