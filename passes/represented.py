"""Base class of rewrites that only change the form of an FFN's matrices.

A subclass defines the settings for a budget, their bytes, and how to fit and read the form of one matrix, or
:meth:`Represented.tensors`, how to fit all of them.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.graph.feed_forward import BIASES, biases, feed_forward, matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.run import Fit
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.layout import Tensors
from tardis_fx.passes.matrix_forms import Form, Weight
from tardis_fx.passes.static import Choice, StaticRewrite, measured
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.operands import ByMatrix


class Represented(StaticRewrite):
    """Base class of rewrites that change the form of each matrix separately."""

    #: Observer of the matrices' operands, or None.
    operands: ClassVar[type[ByMatrix] | None] = None

    @abstractmethod
    def settings(self, weights: SiteWeights, budget: float) -> dict[str, Any]:
        """Settings of the plan for the best forms of all matrices within a budget."""

    @abstractmethod
    def bytes(self, weights: SiteWeights, settings: Mapping[str, Any]) -> int:
        """Bytes read per token, including biases."""

    def fitted(self, index: int, weight: Weight, operand: Any, settings: Mapping[str, Any]) -> Form | None:
        """Fits the form of a matrix; None leaves it unchanged.

        Args:
            index: of the matrix, in the order of :func:`tardis_fx.graph.feed_forward.matrices`.
            weight: the matrix.
            operand: statistic of the matrix's operand, measured by :attr:`operands`.
            settings: of the site.
        """
        raise NotImplementedError

    @abstractmethod
    def opened(self, name: str, constants: Tensors, plan: SitePlan) -> Form:
        """Reads the form of a matrix from the constants."""

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Fits every matrix of every site."""
        operands = {} if self.operands is None else (yield measured(self.operands, sites))
        return [self._choice(site.weights, operands.get(site.fingerprint), config.budget) for site in sites]

    def _choice(self, weights: SiteWeights, operands: ByMatrix | None, budget: float) -> Choice:
        settings = self.settings(weights, budget)
        return Choice(self.bytes(weights, settings), self.tensors(weights, operands, settings), settings)

    def tensors(self, weights: SiteWeights, operands: Any, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors of the plan: by default, those of the forms of all matrices.

        Args:
            weights: of the site.
            operands: the observer of :attr:`operands`, or None.
            settings: of the site.
        """
        tensors: dict[str, Tensor] = {}
        for index, (name, weight) in enumerate(matrices(weights).items()):
            form = self.fitted(index, weight, None if operands is None else operands.for_matrix(name), settings)
            tensors |= {} if form is None else form.tensors(name)
        return tensors

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The plan's tensors and the original biases."""
        return super().constants(plan, weights) | biases(weights)

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Applies the FFN with the new forms of its matrices."""

        def project(x: Tensor, name: str) -> Tensor:
            return self.opened(name, constants, plan).apply(x, constants.get(BIASES[name]))

        return feed_forward(x, project, str(plan.activation), gated=plan.kind == "gated")
