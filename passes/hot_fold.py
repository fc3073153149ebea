"""Keeps some neurons exact and replaces all others by one affine map, without predictor or branch, also in prefill.

1. The kept neurons are those whose affine surrogate leaves the largest error in the output, ``Σ (a_n - s z_n - t)²
   ‖W2[:, n]‖²`` with s and t by least squares; as many as the budget allows in addition to the map. The surrogate of a
   gated neuron has two slopes, for the two pre-activations that it multiplies.
2. The map is the ridge regression of the output of all other neurons, including down_bias, on the site's input.
3. A budget of all bytes keeps every neuron and needs no map.

This is the fold of :mod:`tardis_fx.passes.guarded_fold` without guards.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.graph.feed_forward import biases, dense, matrices, multiply, narrowed
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.run import Fit, Run
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.affine import folded, map_bytes, map_layout
from tardis_fx.passes.base import matrices_of
from tardis_fx.passes.layout import Layout, Tensors, indices, setting
from tardis_fx.passes.static import Choice, StaticRewrite, measured
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.affine import Outputs
from tardis_fx.statistics.regression import AffineMap
from tardis_fx.statistics.surrogates import SurrogateSums


class HotFold(StaticRewrite):
    """Keeps some neurons exact and folds the others into one affine map."""

    name: ClassVar[str] = "hot_fold"
    leaves_matrices = True

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of the map alone."""
        return map_bytes(weights)

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Chooses the kept neurons and fits the map in two runs: surrogates, then the regression."""
        neurons = yield measured(SurrogateSums, sites)
        kept = {s.fingerprint: _kept(s.weights, neurons[s.fingerprint].output_error, config.budget) for s in sites}
        if config.budget == 1:
            return [
                Choice(s.weights.bytes, {"kept": kept[s.fingerprint].int()}, {"kept": len(s.weights.up)}) for s in sites
            ]
        rest = yield Run(f"what is not kept by hot_fold at a budget of {config.budget}", partial(_rest, kept), sites)
        return [_choice(s.weights, kept[s.fingerprint], rest[s.fingerprint].residual.solve()) for s in sites]

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The kept neurons and, unless all are kept, the map."""
        hidden = len(weights.up)
        kept = setting(plan, "kept", range(hidden + 1))
        affine = map_layout(weights) if kept < hidden or "folded_weight" in plan.tensors else {}
        return {"kept": indices(kept, hidden)} | affine

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """Matrices of the kept neurons, and the map."""
        return dict.fromkeys([*matrices_of(plan), *plan.tensors.keys() & {"folded_weight"}], 1.0)

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The kept neurons' ``up``, ``down``, ...; ``folded_weight`` and ``folded_bias`` of the others."""
        affine = super().constants(plan, weights)
        kept = narrowed(weights, affine.pop("kept").long())
        return matrices(kept) | biases(replace(kept, down_bias=None) if affine else kept) | affine

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Adds a narrow FFN and a linear layer."""
        exact = dense(x, constants, str(plan.activation))
        if "folded_weight" not in constants:
            return exact
        return exact + multiply(x, constants["folded_weight"], constants["folded_bias"])


def _kept(weights: SiteWeights, error: Float[Tensor, " h"], budget: float) -> Int[Tensor, " kept"]:
    """Indices of the neurons that stay exact, ascending, by the errors of their surrogates."""
    allowed = len(error) if budget == 1 else int((budget * weights.bytes - map_bytes(weights)) / _row_bytes(weights))
    return error.topk(min(allowed, len(error))).indices.sort().values


def _choice(weights: SiteWeights, kept: Int[Tensor, " kept"], affine: AffineMap) -> Choice:
    touched = map_bytes(weights) + len(kept) * _row_bytes(weights)
    return Choice(touched, folded(affine, weights) | {"kept": kept.int()}, {"kept": len(kept)})


def _row_bytes(weights: SiteWeights) -> int:
    of_neurons = matrices(weights) | biases(replace(weights, down_bias=None))
    return sum(tensor.numel() for tensor in of_neurons.values()) // len(weights.up) * weights.up.element_size()


def _rest(kept: Tensors, site: ObservedSite) -> Outputs:
    exact = torch.zeros(len(site.weights.up), dtype=torch.bool, device="cpu")
    exact[kept[site.fingerprint]] = True
    return Outputs(site, exact)
