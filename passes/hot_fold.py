"""Some neurons stay exact, all others become one affine map: no predictor, no branch, for prefill and batches too.

1. Kept are the neurons of which an affine surrogate would leave the most error in the output, ``Σ (a_n - s z_n - t)²
   ‖W2[:, n]‖²`` with s and t by least squares; as many as the budget allows beside the map. The surrogate of a gated
   neuron has two slopes, for the two pre-activations that it multiplies.
2. The map is the ridge regression of what all other neurons give, down_bias included, on the site's input.
3. A budget of all bytes keeps every neuron and needs no map.

This is the first class of neurons of :mod:`tardis_fx.passes.partial_linear`, alone: what a fold gives without guard.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.graph.feed_forward import biases, dense, matrices, multiply, narrowed
from tardis_fx.observation.run import Run
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import Expected, indices, setting
from tardis_fx.passes.static import Choice, StaticRewrite, measured
from tardis_fx.statistics.affine import Outputs
from tardis_fx.statistics.surrogates import SurrogateSums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.observation.run import Fit
    from tardis_fx.passes.layout import Layout
    from tardis_fx.plan import SitePlan


class HotFold(StaticRewrite):
    """The rules of the module's docstring."""

    name: ClassVar[str] = "hot_fold"
    leaves_matrices = True

    def floor(self, weights: SiteWeights) -> int:
        """The map alone."""
        return map_bytes(weights)

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Two runs: surrogates, and the regression."""
        neurons = yield measured(SurrogateSums, sites)
        kept = {s.fingerprint: _kept(s.weights, neurons[s.fingerprint].output_error, config.budget) for s in sites}
        if config.budget == 1:
            return [
                Choice(s.weights.bytes, {"kept": kept[s.fingerprint].int()}, {"kept": len(s.weights.up)}) for s in sites
            ]
        rest = yield Run(f"what is not kept by hot_fold at a budget of {config.budget}", partial(_rest, kept), sites)
        found = []
        for site in sites:
            fitted, own = rest[site.fingerprint].residual.solve(), kept[site.fingerprint]
            tensors = folded(fitted.weight, fitted.bias, site.weights) | {"kept": own.int()}
            touched = map_bytes(site.weights) + len(own) * _row_bytes(site.weights)
            found.append(Choice(touched, tensors, {"kept": len(own)}))
        return found

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The kept neurons and, unless these are all, the map."""
        hidden = len(weights.up)
        kept = setting(plan, "kept", range(hidden + 1))
        affine = map_layout(weights) if kept < hidden or "folded_weight" in plan.tensors else {}
        return {"kept": indices(kept, hidden)} | affine

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """The kept neurons' and the map."""
        return dict.fromkeys([*matrices_of(plan), *(name for name in plan.tensors if name == "folded_weight")], 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Kept neurons ``up`` [k, d], ``down`` [d_out, k], ...; the others' ``folded_weight`` and ``folded_bias``."""
        device = weights.up.device
        kept = narrowed(weights, plan.tensors["kept"].long().to(device))
        if "folded_weight" not in plan.tensors:
            return matrices(kept) | biases(kept)
        affine = {name: plan.tensors[name].to(device) for name in ("folded_weight", "folded_bias")}
        return matrices(kept) | biases(replace(kept, down_bias=None)) | affine

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """A narrow FFN and a linear layer."""
        exact = dense(x, constants, str(plan.activation))
        if "folded_weight" not in constants:
            return exact
        return exact + multiply(x, constants["folded_weight"], constants["folded_bias"])


def map_bytes(weights: SiteWeights) -> int:
    """Size of an affine map from a site's input to its output."""
    return len(weights.down) * (weights.up.shape[1] + 1) * weights.up.element_size()


def map_layout(weights: SiteWeights) -> Layout:
    """What :func:`folded` makes."""
    dtype, d_out = weights.up.dtype, len(weights.down)
    return {
        "folded_weight": Expected(dtype, (d_out, weights.up.shape[1])),
        "folded_bias": Expected(dtype, (d_out,)),
    }


def folded(weight: Tensor, bias: Tensor, weights: SiteWeights) -> dict[str, Tensor]:
    """An affine map, [d, d_out] and [d_out], as a plan's tensors in the model's dtype."""
    dtype = weights.up.dtype
    return {"folded_weight": weight.T.to(dtype).contiguous(), "folded_bias": bias.to(dtype)}


def _kept(weights: SiteWeights, missed: Tensor, budget: float) -> Tensor:
    """Numbers of the neurons that stay exact, ascending."""
    allowed = len(missed) if budget == 1 else int((budget * weights.bytes - map_bytes(weights)) / _row_bytes(weights))
    return missed.topk(min(allowed, len(missed))).indices.sort().values


def _row_bytes(weights: SiteWeights) -> int:
    own = [*matrices(weights).values(), *biases(replace(weights, down_bias=None)).values()]
    return sum(tensor.numel() for tensor in own) // len(weights.up) * weights.up.element_size()


def _rest(kept: Mapping[str, Tensor], site: ObservedSite) -> Outputs:
    exact = torch.zeros(len(site.weights.up), dtype=torch.bool, device="cpu")
    exact[kept[site.fingerprint]] = True
    return Outputs(site, exact)
