"""The forms in which a model may store an FFN's weights; each gives the FFN another fingerprint.

An engine stores every matrix as [out, in] and merges projections; the calibrated model may have stored them otherwise.
"""

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from tardis_fx.graph.feed_forward import BIASES, matrices
from tardis_fx.graph.site import SiteWeights, function_of


@dataclass(frozen=True)
class Form:
    """One way to store an FFN's weights.

    Attributes:
        gate_half: index of the half of a fused matrix that is the gate; None if each projection has its own matrix.
        transposed: names of the matrices that are stored [in, out]; a fused one is ``up``.
    """

    gate_half: int | None
    transposed: tuple[str, ...]

    def parameters(self, weights: SiteWeights) -> list[Tensor]:
        """The weights as this form stores them, in the order of :attr:`tardis_fx.graph.site.Site.parameters`."""
        fused, parameters = self._fused(weights), list[Tensor | None]()
        for name, matrix in matrices(fused).items():
            parameters += [matrix.mT if name in self.transposed else matrix, getattr(fused, BIASES[name])]
        return [parameter for parameter in parameters if parameter is not None]

    def function(self, weights: SiteWeights, activation: str | None) -> str | None:
        """Describes the function of these parameters; see :func:`tardis_fx.graph.site.function_of`."""
        shapes = {name: matrix.shape for name, matrix in matrices(self._fused(weights)).items()}
        square = [name for name in self.transposed if shapes[name][0] == shapes[name][1]]
        return function_of(activation, self.gate_half, square)

    def _fused(self, weights: SiteWeights) -> SiteWeights:
        """The weights, with both projections in ``up`` if the form fuses them."""
        if self.gate_half is None:
            return weights
        pairs = [(weights.gate, weights.gate_bias), (weights.up, weights.up_bias)]
        up, bias = zip(*(pairs if self.gate_half == 0 else pairs[::-1]), strict=True)
        fused_bias = None if weights.up_bias is None else torch.cat(bias)
        return replace(weights, up=torch.cat(up), up_bias=fused_bias, gate=None, gate_bias=None)


def forms(weights: SiteWeights) -> list[Form]:
    """All ways to store an FFN's weights, of which only the presence counts."""
    fusible = weights.gate is not None and (weights.gate_bias is None) == (weights.up_bias is None)
    names = {half: [n for n in matrices(weights) if half is None or n != "gate"] for half in (None, 0, 1)}
    return [
        Form(half, tuple(name for name, turn in zip(names[half], turns, strict=True) if turn))
        for half in ((None, 0, 1) if fusible else (None,))
        for turns in product((False, True), repeat=len(names[half]))
    ]
