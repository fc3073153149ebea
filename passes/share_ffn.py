"""Shares one FFN among several layers (One Wide Feedforward, arXiv 2309.01826), fitted to each by regression.

1. Sites of one shape and activation, in the model's order, are cut into groups of equal length. A group keeps the FFN
   whose output, scaled and shifted feature by feature, approximates the outputs of the others best.
2. Every other site of the group becomes an affine map of the kept FFN's output and of the site's own input. The map is
   a ridge regression of the best low rank (reduced-rank regression).
3. Bytes go to the maps first: the groups are as long as maps of full rank allow, and the remaining bytes determine the
   rank.

The bytes of a shared FFN are counted once per token, regardless of the number of layers. If the FFN does not fit in the
cache, every layer of its group reads it from memory again: sharing then saves memory but no time.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import CalibrationError
from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.graph.site import SiteWeights
from tardis_fx.observation.run import Fit, Run
from tardis_fx.observation.site import Merge, ObservedSite, fitted_tokens
from tardis_fx.passes.layout import Expected, Layout, Tensors, like, setting
from tardis_fx.passes.matrix_forms import Factored, truncated
from tardis_fx.passes.static import Choice, StaticRewrite
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.regression import Residual
from tardis_fx.statistics.surrogates import Sums, products


class ShareFfn(StaticRewrite):
    """Shares one FFN among several layers."""

    name: ClassVar[str] = "share_ffn"

    compares_sites = True

    def floor(self, weights: SiteWeights) -> int:
        """Bytes of a map of rank 1; the FFN counts at the site that keeps it."""
        return _map_bytes(weights, 1)

    def minimum_budget(self, sites: Sequence[ObservedSite]) -> float:
        """Smallest budget: one FFN for all sites of a shape, and maps of rank 1."""
        shares = []
        for alike in _alike(sites):
            dense = alike[0].weights.bytes
            shares.append((dense + (len(alike) - 1) * self.floor(alike[0].weights)) / (dense * len(alike)))
        return max(shares)

    def afford(self, sites: Sequence[ObservedSite], config: Config) -> None:
        """Checks the budget against :meth:`minimum_budget`.

        Raises:
            CalibrationError: the budget is too small.
        """
        if (minimum := self.minimum_budget(sites)) > config.budget:
            raise CalibrationError(
                f"a budget of {config.budget:.2%} is too small for {self.name}: one FFN for all sites of a shape, and "
                f"maps of rank 1, touch {minimum:.2%} of the original's bytes"
            )

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Chooses the kept FFNs and fits the maps, in two runs."""
        groups: dict[str, Group] = {}
        for alike in _alike(sites):
            count, rank = _split(alike[0].weights, len(alike), config.budget)
            for part in torch.arange(len(alike), dtype=torch.int64, device="cpu").tensor_split(count):
                group = Group([alike[i] for i in part], rank)
                groups |= dict.fromkeys((s.fingerprint for s in group.sites), group)
        title = f"which FFNs {self.name} keeps at a budget of {config.budget}"
        candidates = yield Run(title, lambda s: CandidateErrors(s, groups[s.fingerprint].sites), sites)
        for group in groups.values():
            group.keep(candidates)
        takers = [s for s in sites if groups[s.fingerprint].kept is not s]
        title = f"maps of {self.name} at a budget of {config.budget}"
        maps = (yield Run(title, lambda s: OutputRegression(s, groups[s.fingerprint].kept), takers)) if takers else {}
        return [self._choice(s, groups[s.fingerprint], maps.get(s.fingerprint)) for s in sites]

    def _choice(self, site: ObservedSite, group: "Group", fitted: "OutputRegression | None") -> Choice:
        share = site.weights.bytes / len(group.sites)
        if len(group.sites) == 1:
            return Choice(share, settings={"rank": None})
        if fitted is None:
            return Choice(share, group.tensors, {"rank": None})
        tensors = fitted.solve(group.rank, site.weights.down.dtype)
        touched = share + sum(tensor.nbytes for tensor in tensors.values())
        return Choice(touched, tensors | group.tensors, {"rank": group.rank})

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The kept FFN, and the map if another site keeps it."""
        ffn, rank, d_out = like(matrices(weights) | biases(weights)), plan.settings["rank"], len(weights.down)
        if rank is None:
            return ffn if plan.tensors else {}
        setting(plan, "rank", range(1, d_out + 1))
        dtype, d = weights.down.dtype, weights.up.shape[1]
        bias = {"map_bias": Expected(dtype, (d_out,))}
        return ffn | Factored.layout("map", (d_out, d + d_out), rank, dtype) | bias

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Constants of the kept FFN, and ``map_a`` [d_out, r], ``map_b`` and ``map_bias`` if another site keeps it."""
        return super().constants(plan, weights) or matrices(weights) | biases(weights)

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Applies the kept FFN, then two thin linear layers."""
        shared = dense(x, constants, str(plan.activation))
        if plan.settings["rank"] is None:
            return shared
        return Factored.from_tensors(constants, "map").apply(torch.cat([x, shared], -1), constants["map_bias"])


class Group:
    """Sites that share one FFN.

    Attributes:
        sites: in the model's order.
        rank: of the maps.
        kept: the site that keeps its FFN, once :meth:`keep` has chosen it.
    """

    kept: ObservedSite

    def __init__(self, sites: Sequence[ObservedSite], rank: int) -> None:
        self.sites, self.rank = sites, rank

    def keep(self, candidates: Mapping[str, "CandidateErrors"]) -> None:
        """Chooses the FFN with the smallest error over all sites' outputs."""
        errors = torch.stack([candidates[site.fingerprint].errors for site in self.sites]).sum(0)
        self.kept = self.sites[int(errors.argmin())]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """A copy of the kept FFN, for all sites of the group: a plan outlives the weights that it is made from."""
        ffn = matrices(self.kept.weights) | biases(self.kept.weights)
        return {name: tensor.detach().cpu().clone() for name, tensor in ffn.items()}


class CandidateErrors:
    """Observer of the errors of other sites' FFNs against a site's output, after scaling and shifting each feature.

    With n candidates it uses every n-th token, so that its cost does not grow with their number.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"sums": "sum"}

    def __init__(self, site: ObservedSite, others: Sequence[ObservedSite]) -> None:
        self._neurons, self._others = Neurons.from_site(site), [Neurons.from_site(other) for other in others]
        #: Sums of the products of 1, their output and that of the site; [products, FFNs, d_out].
        self.sums = Sums.zeros(1, len(others), len(site.weights.down)).table

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        x = x[: fitted_tokens(len(x)) : len(self._others)]
        output = self._neurons(x).double()
        for sums, other in zip(self.sums.unbind(1), self._others, strict=True):
            sums += torch.stack([product.sum(0) for product in products([other(x).double()], output)])

    @property
    def errors(self) -> Float64[Tensor, " ffns"]:
        """Mean squared error of each FFN, summed over the features."""
        sums = Sums(self.sums.flatten(1), 1)
        errors = sums.error(sums.regress()) / sums.count.clamp(min=1)
        return errors.view(self.sums.shape[1:]).sum(1)


class OutputRegression:
    """Observer for the regression of a site's output on its input and on the output of another site's FFN.

    Memory: 2 (d + d_out) (d + 2 d_out) float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"_residual": "parts"}

    def __init__(self, site: ObservedSite, kept: ObservedSite) -> None:
        self._neurons, self._kept = Neurons.from_site(site), Neurons.from_site(kept)
        d_out, d = len(site.weights.down), site.weights.up.shape[1]
        self._residual = Residual(d + d_out, d_out)

    def update(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Adds tokens."""
        output = self._neurons(x)
        self._residual.update(torch.cat([x, self._kept(x)], 1), output, output)

    def solve(self, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The map, ``map_a`` [d_out, rank], ``map_b`` [rank, d + d_out] and ``map_bias`` [d_out]."""
        terms = self._residual.inputs
        a, b = truncated(self._residual.solve().weight.T, rank, terms.covariance)
        bias = self._residual.mean - a @ (b @ terms.mean)
        return {name: t.to(dtype) for name, t in (("map_a", a), ("map_b", b), ("map_bias", bias))}


def _alike(sites: Sequence[ObservedSite]) -> list[list[ObservedSite]]:
    """Groups sites whose FFNs have the same kind, activation, shapes and dtypes, in order."""
    groups: dict[object, list[ObservedSite]] = {}
    for site in sites:
        ffn = matrices(site.weights) | biases(site.weights)
        key = site.site.kind, site.site.activation, *((n, tuple(t.shape), t.dtype) for n, t in ffn.items())
        groups.setdefault(key, []).append(site)
    return list(groups.values())


def _split(weights: SiteWeights, sites: int, budget: float) -> tuple[int, int]:
    """Number of FFNs to keep of ``sites``, and the rank of the maps of the others."""
    full = len(weights.down)
    for kept in range(1, sites):
        left = (budget * sites - kept) * weights.bytes / (sites - kept)
        rank = int((left - _map_bytes(weights, 0)) / (_map_bytes(weights, 1) - _map_bytes(weights, 0)))
        if rank <= full or (budget * sites - kept - 1) * weights.bytes < (sites - kept - 1) * _map_bytes(weights, 1):
            return kept, max(1, min(rank, full))
    return sites, full


def _map_bytes(weights: SiteWeights, rank: int) -> int:
    d_out, d = len(weights.down), weights.up.shape[1]
    return (rank * (d + 2 * d_out) + d_out) * weights.down.element_size()
