"""FFSplit (arXiv 2401.04044), without its fine-tuning: heavy hitters stay dense, the rest gets low rank.

1. Heavy hitters are the neurons of the largest output norm, ``mean |a_n| ‖W2[:, n]‖`` over the calibration tokens.
2. Of all other neurons, the rows of W1 and the columns of W2 each become a product of two thin matrices, by plain SVD.
3. The paper keeps 25% of the neurons and 10% of the rank. The budget scales both by one factor: with k of h neurons
   kept, the rank is 0.4 k / h of the full one, and k is the largest that fits; all kept is the original.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch.nn import functional as F  # noqa: N812

from tardis_fx.calibration.operands import Sizes
from tardis_fx.graph.activations import ACTIVATIONS
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.low_rank import truncated
from tardis_fx.passes.static import Choice, StaticRewrite, bias_bytes, measured

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.calibration.observe import Observation, ObservedSite
    from tardis_fx.config import Config
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.plan import SitePlan

#: Share of full rank over share of neurons kept: 10% over 25%.
PROPORTION = 0.4


class FFSplit(StaticRewrite):
    """The rules of the module's docstring."""

    name: ClassVar[str] = "ffsplit"

    def floor(self, weights: SiteWeights) -> int:
        """One heavy hitter, and rank 1."""
        return _bytes(weights, 1)

    def choose(self, observation: Observation, sites: Sequence[ObservedSite], config: Config) -> list[Choice]:
        """Splits every site."""
        sizes = measured(observation, Sizes, sites, config)
        return [self._split(site.weights, sizes[site.fingerprint].magnitude, config.budget) for site in sites]

    def _split(self, weights: SiteWeights, magnitude: Tensor, budget: float) -> Choice:
        w1, w2 = weights.w1.double().cpu(), weights.w2.double().cpu()
        h = len(w1)
        heavy = max(k for k in range(1, h + 1) if _bytes(weights, k) <= budget * weights.bytes)
        order = (magnitude * w2.norm(dim=0)).argsort(descending=True, stable=True)
        tensors, rest = {"neurons": order.int()}, order[heavy:]
        if heavy < h:
            for name, weight, rank in zip(("w1", "w2"), (w1[rest], w2[:, rest]), _ranks(weights, heavy), strict=True):
                a, b = truncated(weight, rank)
                tensors |= {f"{name}_a": a.to(weights.w1.dtype), f"{name}_b": b.to(weights.w1.dtype)}
        return Choice(_bytes(weights, heavy), tensors, {"heavy": heavy})

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """The heavy hitters' and the factors of the rest."""
        return dict.fromkeys([*matrices_of(plan), *(name for name in plan.tensors if name != "neurons")], 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Heavy hitters ``w1`` [k, d], ``w2`` [d_out, k]; factors of the rest; ``b1`` cut in two alike."""
        device, heavy = weights.w1.device, plan.settings["heavy"]
        order = plan.tensors["neurons"].long().to(device)
        found = {name: tensor.to(device) for name, tensor in plan.tensors.items() if name != "neurons"}
        found |= {"w1": weights.w1[order[:heavy]], "w2": weights.w2[:, order[:heavy]].contiguous()}
        if weights.b1 is not None:
            found |= {"b1": weights.b1[order[:heavy]], "b1_rest": weights.b1[order[heavy:]]}
        return found if weights.b2 is None else found | {"b2": weights.b2}

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """A narrow FFN, and one of thin matrices."""
        activation = ACTIVATIONS[str(plan.activation)].eager
        dense = activation(F.linear(x, constants["w1"], constants.get("b1")))
        found = F.linear(dense, constants["w2"], constants.get("b2"))
        if "w1_a" not in constants:
            return found
        rest = activation(F.linear(F.linear(x, constants["w1_b"]), constants["w1_a"], constants.get("b1_rest")))
        return found + F.linear(F.linear(rest, constants["w2_b"]), constants["w2_a"])


def _ranks(weights: SiteWeights, heavy: int) -> tuple[int, int]:
    """Ranks of the rest of W1 and of W2."""
    (h, d), d_out = weights.w1.shape, len(weights.w2)
    share = PROPORTION * heavy / h
    up, down = (min(h - heavy, max(1, round(share * min(h, side)))) for side in (d, d_out))
    return up, down


def _bytes(weights: SiteWeights, heavy: int) -> int:
    (h, d), d_out = weights.w1.shape, len(weights.w2)
    up, down = _ranks(weights, heavy)
    numbers = heavy * (d + d_out) + (h - heavy) * (up + down) + up * d + down * d_out
    return numbers * weights.w1.element_size() + bias_bytes(weights)
