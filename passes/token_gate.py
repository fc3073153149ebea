"""Routes each token through the whole FFN or an affine map by a gate of d + 1 numbers (after arXiv 2603.03459).

1. The map is the ridge regression of the FFN's output on its input.
2. The gate is the ridge regression of the logarithm of the map's squared error on the input; tokens above a threshold
   take the FFN. The threshold is set so that FFN, gate and map together meet the budget.
3. ``forward`` computes both and chooses, as the specification; ``touched_bytes`` assumes a runtime that computes only
   one: it counts the gate always, the FFN for its share of tokens, and the map for the others.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tardis_fx.config import Config
from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.run import Fit, Run
from tardis_fx.observation.site import Merge, ObservedSite, fitted_tokens
from tardis_fx.passes.affine import folded, map_bytes, map_layout
from tardis_fx.passes.layout import Expected, Layout, Tensors
from tardis_fx.passes.static import Choice, StaticRewrite, measured
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.affine import Outputs
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.regression import AffineMap, Residual


class TokenGate(StaticRewrite):
    """Routes each token through the whole FFN or through an affine map."""

    name: ClassVar[str] = "token_gate"

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of gate and map."""
        return _gate_bytes(weights) + map_bytes(weights)

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Fits maps and gates in three runs: the maps, their errors, the gates' scores."""
        outputs = yield measured(Outputs, sites)
        maps = {s.fingerprint: outputs[s.fingerprint].residual.solve() for s in sites}
        names = ", ".join(site.site.name for site in sites)
        errors = yield Run(f"errors of affine maps of {names}", lambda s: _Errors(s, maps[s.fingerprint]), sites)
        gates = {s.fingerprint: errors[s.fingerprint].residual.solve() for s in sites}
        scores = yield Run(f"gate scores of {names}", lambda s: _Scores(gates[s.fingerprint]), sites)
        return [
            _choice(s.weights, maps[s.fingerprint], gates[s.fingerprint], scores[s.fingerprint].all, config.budget)
            for s in sites
        ]

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """Weights and biases of the map and of the gate, ``token_gate`` [1, d] and ``token_gate_bias`` [1], float32."""
        gate = {"token_gate": (1, weights.up.shape[1]), "token_gate_bias": (1,)}
        return map_layout(weights) | {name: Expected(torch.float32, shape) for name, shape in gate.items()}

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The FFN, the map, and the gate."""
        return super().constants(plan, weights) | matrices(weights) | biases(weights)

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Computes both, and chooses one for each token."""
        whole = dense(x, constants, str(plan.activation))
        affine = F.linear(x, constants["folded_weight"], constants["folded_bias"])
        chosen = F.linear(x.float(), constants["token_gate"], constants["token_gate_bias"]) > 0
        return torch.where(chosen, whole, affine)


class _Errors:
    """The regression of the logarithm of a map's squared error."""

    merged: ClassVar[Mapping[str, Merge]] = {"residual": "parts"}

    def __init__(self, site: ObservedSite, affine: AffineMap) -> None:
        self._site, self._weight, self._bias = Neurons.from_site(site), affine.weight.float(), affine.bias.float()
        self.residual = Residual(len(self._weight), 1)

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        missed = self._site(x) - (x @ self._weight + self._bias)
        logarithm = missed.square().sum(1, keepdim=True).clamp(min=1e-30).log()
        self.residual.update(x, logarithm, logarithm)


class _Scores:
    """Observer of a gate's score of every fitted token; it keeps one number per token."""

    merged: ClassVar[Mapping[str, Merge]] = {"_scores": "joined"}

    def __init__(self, gate: AffineMap) -> None:
        self._weight, self._scores = gate.weight.float(), list[Float32[Tensor, " tokens"]]()

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        self._scores.append((x[: fitted_tokens(len(x))] @ self._weight)[:, 0])

    @property
    def all(self) -> Float32[Tensor, " tokens"]:
        return torch.cat(self._scores)


def _choice(
    weights: SiteWeights, affine: AffineMap, gate: AffineMap, scores: Float32[Tensor, " tokens"], budget: float
) -> Choice:
    fixed, whole = _gate_bytes(weights) + map_bytes(weights), weights.bytes
    share = min(1.0, (budget * whole - fixed) / (whole - map_bytes(weights)))
    above = int(share * len(scores))
    ordered = scores.sort(descending=True).values
    threshold = ordered[above] if above < len(scores) else ordered[-1] - 1
    rate = float((scores > threshold).float().mean())
    tensors = {"token_gate": gate.weight.T.float().contiguous(), "token_gate_bias": -threshold.float().view(1)}
    touched = fixed + rate * (whole - map_bytes(weights))
    return Choice(touched, outlier_rate=rate, tensors=tensors | folded(affine, weights))


def _gate_bytes(weights: SiteWeights) -> int:
    return 4 * (weights.up.shape[1] + 1)
