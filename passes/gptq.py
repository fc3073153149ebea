"""GPTQ (arXiv 2210.17323): weight-only quantisation of all matrices that changes their products least.

As :mod:`tardis_fx.passes.rtn`, but each column makes up for what rounding did to those before it, by the Gram matrix of
what the matrix multiplies: of the site's inputs for W1 and a gate, of what the neurons give for W2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from tardis_fx.graph.feed_forward import matrices
from tardis_fx.passes.rtn import Rtn
from tardis_fx.passes.static import measured
from tardis_fx.statistics.operands import Grams

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.observation.observe import Observation, ObservedSite


class Gptq(Rtn):
    """The rule of the module's docstring."""

    name: ClassVar[str] = "gptq"

    def grams(
        self, observation: Observation, sites: Sequence[ObservedSite], config: Config
    ) -> Sequence[Mapping[str, Tensor | None]]:
        """Measured."""
        found = measured(observation, Grams, sites, config)
        return [{name: found[site.fingerprint].of(name) for name in matrices(site.weights)} for site in sites]
