"""Base class of rewrites that put every matrix of an FFN in another form, and leave all else as it is.

Such a rewrite says what a budget buys, what that costs, and how it fits and opens the form of one matrix.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from tardis_fx.graph.feed_forward import BIASES, biases, feed_forward, matrices
from tardis_fx.passes.static import Choice, StaticRewrite, measured

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.observation.run import Fit
    from tardis_fx.passes.matrix_forms import Form
    from tardis_fx.plan import SitePlan
    from tardis_fx.statistics.operands import ByMatrix


class Represented(StaticRewrite):
    """A rewrite of every matrix by itself; see the module's docstring."""

    #: What is measured of that which the matrices multiply, or None.
    operands: ClassVar[type[ByMatrix] | None] = None

    @abstractmethod
    def settings(self, weights: SiteWeights, budget: float) -> dict[str, Any]:
        """What the plan says of the forms of all matrices: the best within a budget."""

    @abstractmethod
    def bytes(self, weights: SiteWeights, settings: Mapping[str, Any]) -> int:
        """Bytes that a token reads, biases included."""

    @abstractmethod
    def fitted(self, index: int, weight: Tensor, operand: Any, settings: Mapping[str, Any]) -> Form | None:
        """The form of a matrix, or None where it stays as it is.

        Args:
            index: of the matrix, in the order of :func:`tardis_fx.graph.feed_forward.matrices`.
            weight: [rows, columns].
            operand: what :attr:`operands` measured of that which it multiplies.
            settings: of the site.
        """

    @abstractmethod
    def opened(self, name: str, constants: Mapping[str, Tensor], plan: SitePlan) -> Form:
        """The form of a matrix, from the constants."""

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Fits every matrix of every site."""
        operands = {} if self.operands is None else (yield measured(self.operands, sites))
        return [self._choice(site.weights, operands.get(site.fingerprint), config.budget) for site in sites]

    def _choice(self, weights: SiteWeights, operands: ByMatrix | None, budget: float) -> Choice:
        settings = self.settings(weights, budget)
        tensors: dict[str, Tensor] = {}
        for index, (name, weight) in enumerate(matrices(weights).items()):
            form = self.fitted(index, weight, None if operands is None else operands.of(name), settings)
            tensors |= {} if form is None else form.tensors(name)
        return Choice(self.bytes(weights, settings), tensors, settings)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The plan's tensors, and the biases."""
        return {name: tensor.to(weights.up.device) for name, tensor in plan.tensors.items()} | biases(weights)

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The FFN as it was, with other forms of its matrices."""

        def project(x: Tensor, name: str) -> Tensor:
            return self.opened(name, constants, plan).apply(x, constants.get(BIASES[name]))

        return feed_forward(x, project, str(plan.activation), gated=plan.kind == "gated")
