"""FFSplit (arXiv 2401.04044) without fine-tuning: heavy hitters stay dense, the rest becomes low-rank.

1. Heavy hitters are the neurons with the largest output norm, ``mean |a_n| ‖W2[:, n]‖`` over the calibration tokens.
2. For all other neurons, the rows of W1 and of a gate and the columns of W2 each become a product of two thin
   matrices, by plain SVD.
3. The paper keeps 25% of the neurons and 10% of the rank. The budget scales both by one factor: with k of h neurons
   kept, the rank is 0.4 k / h of the full one, and k is the largest that fits; all kept is the original.
"""

from collections.abc import Sequence
from typing import ClassVar

from jaxtyping import Float, Float64
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.graph.feed_forward import BIASES, biases, dense, feed_forward, matrices, narrowed
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.run import Fit
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import Layout, Tensors, indices, setting
from tardis_fx.passes.matrix_forms import Factored
from tardis_fx.passes.static import Choice, StaticRewrite, bias_bytes, measured
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.operands import ColumnNorms

#: Share of full rank over share of neurons kept: 10% over 25%.
PROPORTION = 0.4


class FFSplit(StaticRewrite):
    """Keeps heavy hitters dense and factors the other neurons."""

    name: ClassVar[str] = "ffsplit"
    leaves_matrices = True

    def floor(self, weights: SiteWeights) -> int:
        """Bytes with one heavy hitter, and rank 1."""
        return _bytes(weights, 1)

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Splits every site by the output norms of its neurons."""
        norms = yield measured(ColumnNorms, sites)
        return [self._split(site.weights, norms[site.fingerprint].magnitude, config.budget) for site in sites]

    def _split(self, weights: SiteWeights, magnitude: Float64[Tensor, " h"], budget: float) -> Choice:
        h = len(weights.up)
        heavy = max(k for k in range(1, h + 1) if _bytes(weights, k) <= budget * weights.bytes)
        order = (magnitude * weights.down.double().cpu().norm(dim=0)).argsort(descending=True, stable=True)
        tensors = {"neurons": order.int()}
        if heavy < h:
            rest = matrices(narrowed(weights, order[heavy:].to(weights.up.device)))
            for (name, weight), rank in zip(rest.items(), _ranks(weights, heavy), strict=True):
                tensors |= Factored.from_matrix(weight, rank).tensors(name)
        return Choice(_bytes(weights, heavy), tensors, {"heavy": heavy})

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The order of the neurons, and factors of the neurons that are not heavy hitters."""
        hidden = len(weights.up)
        heavy = setting(plan, "heavy", range(1, hidden + 1))
        layout = {"neurons": indices(hidden, hidden)}
        if heavy < hidden:
            for (name, weight), rank in zip(matrices(weights).items(), _ranks(weights, heavy), strict=True):
                (rows, columns), rest = weight.shape, hidden - heavy
                sizes = (rows, rest) if name == "down" else (rest, columns)
                layout |= Factored.layout(name, sizes, rank, weight.dtype)
        return layout

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """Matrices of the heavy hitters and factors of the rest."""
        return dict.fromkeys([*matrices_of(plan), *(name for name in plan.tensors if name != "neurons")], 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The heavy hitters' ``up``, ``down``, ...; factors of the rest; biases are split likewise."""
        factors, heavy = super().constants(plan, weights), plan.settings["heavy"]
        order = factors.pop("neurons").long()
        kept, rest = (narrowed(weights, part) for part in (order[:heavy], order[heavy:]))
        rest_biases = {f"{name}_rest": bias for name, bias in biases(rest).items() if name != BIASES["down"]}
        return factors | rest_biases | matrices(kept) | biases(kept)

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Adds a narrow FFN and one of thin matrices."""
        activation = str(plan.activation)
        output = dense(x, constants, activation)
        if "up_a" not in constants:
            return output

        def project(x: Tensor, name: str) -> Tensor:
            return Factored.from_tensors(constants, name).apply(x, constants.get(f"{BIASES[name]}_rest"))

        return output + feed_forward(x, project, activation, gated=plan.kind == "gated")


def _ranks(weights: SiteWeights, heavy: int) -> list[int]:
    """Rank of the remainder of each matrix."""
    h = len(weights.up)
    share = PROPORTION * heavy / h
    return [min(h - heavy, max(1, round(share * min(w.shape)))) for w in matrices(weights).values()]


def _bytes(weights: SiteWeights, heavy: int) -> int:
    h, numbers = len(weights.up), 0
    for weight, rank in zip(matrices(weights).values(), _ranks(weights, heavy), strict=True):
        side = weight.numel() // h
        numbers += heavy * side + rank * (h - heavy + side)
    return numbers * weights.up.element_size() + bias_bytes(weights)
