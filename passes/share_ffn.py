"""One FFN for several layers (One Wide Feedforward, arXiv 2309.01826), fitted to each of them by regression.

1. Sites of one shape and activation, in the model's order, are cut into groups of equal length. A group keeps one of
   its FFNs, the one whose output, scaled and shifted feature by feature, misses least of what the others give.
2. Every other site of the group is an affine map of the kept FFN's output and of the site's own input. The map is their
   ridge regression, cut to low rank where it errs least (reduced-rank regression).
3. Bytes go to the maps first: the groups are as long as they can be with maps of full rank, and the rank is what is
   left.

The bytes that a token touches are counted once, however many layers touch them. Where a kept FFN outgrows the cache it
is read from memory again by every layer of its group: sharing saves memory there, and no time.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch

from tardis_fx.errors import CalibrationError
from tardis_fx.graph.feed_forward import biases, dense, matrices
from tardis_fx.observation.run import Run
from tardis_fx.passes.layout import Expected, like, setting
from tardis_fx.passes.matrix_forms import Factored, truncated
from tardis_fx.passes.static import Choice, StaticRewrite
from tardis_fx.statistics.neurons import Neurons
from tardis_fx.statistics.regression import Residual, fitted_tokens
from tardis_fx.statistics.surrogates import Sums, products

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import SiteWeights
    from tardis_fx.observation.merging import Merge
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.observation.run import Fit
    from tardis_fx.passes.layout import Layout
    from tardis_fx.plan import SitePlan


class ShareFfn(StaticRewrite):
    """The rules of the module's docstring."""

    name: ClassVar[str] = "share_ffn"

    compares_sites = True

    def floor(self, weights: SiteWeights) -> int:
        """A map of rank 1; the FFN is counted where it is kept."""
        return _map_bytes(weights, 1)

    def least(self, sites: Sequence[ObservedSite]) -> float:
        """One FFN for all sites of a shape, and maps of rank 1."""
        shares = []
        for alike in _alike(sites):
            whole = alike[0].weights.bytes
            shares.append((whole + (len(alike) - 1) * self.floor(alike[0].weights)) / (whole * len(alike)))
        return max(shares)

    def afford(self, sites: Sequence[ObservedSite], config: Config) -> None:
        """Compares the budget with :meth:`least`.

        Raises:
            CalibrationError: the budget is too small, or the sites are to be fitted in turn.
        """
        if config.sequential:
            raise CalibrationError(f"{self.name} fits the sites to each other: fit without sequential")
        if (least := self.least(sites)) > config.budget:
            raise CalibrationError(
                f"a budget of {config.budget:.2%} is too small for {self.name}: one FFN for all sites of a shape, and "
                f"maps of rank 1, touch {least:.2%} of the original's bytes"
            )

    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Choice]]:
        """Two runs: which FFN each group of sites keeps, and the regressions."""
        groups: dict[str, Group] = {}
        for alike in _alike(sites):
            count, rank = _split(alike[0].weights, len(alike), config.budget)
            for part in torch.arange(len(alike), dtype=torch.int64, device="cpu").tensor_split(count):
                group = Group([alike[i] for i in part], rank)
                groups |= dict.fromkeys((s.fingerprint for s in group.sites), group)
        what = f"which FFNs {self.name} keeps at a budget of {config.budget}"
        tried = yield Run(what, lambda s: Tried(s, groups[s.fingerprint].sites), sites)
        for group in groups.values():
            group.keep(tried)
        takers = [s for s in sites if groups[s.fingerprint].kept is not s]
        what = f"maps of {self.name} at a budget of {config.budget}"
        maps = (yield Run(what, lambda s: Mapped(s, groups[s.fingerprint].kept), takers)) if takers else {}
        return [self._choice(s, groups[s.fingerprint], maps.get(s.fingerprint)) for s in sites]

    def _choice(self, site: ObservedSite, group: Group, fitted: Mapped | None) -> Choice:
        share = site.weights.bytes / len(group.sites)
        if len(group.sites) == 1:
            return Choice(share, settings={"rank": None})
        if fitted is None:
            return Choice(share, group.tensors, {"rank": None})
        tensors = fitted.solve(group.rank, site.weights.down.dtype)
        touched = share + sum(tensor.nbytes for tensor in tensors.values())
        return Choice(touched, tensors | group.tensors, {"rank": group.rank})

    def layout(self, plan: SitePlan, weights: SiteWeights) -> Layout:
        """The kept FFN, of the same shapes, and where it is another site's, the map."""
        own, rank, d_out = matrices(weights) | biases(weights), plan.settings["rank"], len(weights.down)
        if rank is None:
            return like(own) if plan.tensors else {}
        setting(plan, "rank", range(1, d_out + 1))
        dtype, d = weights.down.dtype, weights.up.shape[1]
        bias = {"map_bias": Expected(dtype, (d_out,))}
        return like(own) | Factored.layout("map", (d_out, d + d_out), rank, dtype) | bias

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """The kept FFN's, and ``map_a`` [d_out, r], ``map_b`` and ``map_bias`` where that is another site's."""
        shared = {name: tensor.to(weights.up.device) for name, tensor in plan.tensors.items()}
        return shared or matrices(weights) | biases(weights)

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """The kept FFN, and two thin linear layers."""
        shared = dense(x, constants, str(plan.activation))
        if plan.settings["rank"] is None:
            return shared
        return Factored.from_tensors(constants, "map").apply(torch.cat([x, shared], -1), constants["map_bias"])


class Group:
    """Sites that have one FFN between them.

    Attributes:
        sites: in the model's order.
        rank: of the maps.
        kept: the site whose FFN it is, once :meth:`keep` has chosen it.
    """

    kept: ObservedSite

    def __init__(self, sites: Sequence[ObservedSite], rank: int) -> None:
        self.sites, self.rank = sites, rank

    def keep(self, tried: Mapping[str, Tried]) -> None:
        """Chooses the FFN that misses least of all sites' outputs."""
        missed = torch.stack([tried[site.fingerprint].missed for site in self.sites]).sum(0)
        self.kept = self.sites[int(missed.argmin())]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """A copy of the kept FFN, for all sites of the group: a plan outlives the weights that it is made from."""
        own = matrices(self.kept.weights) | biases(self.kept.weights)
        return {name: tensor.detach().cpu().clone() for name, tensor in own.items()}


class Tried:
    """What the FFNs of other sites miss of a site's output, each feature of theirs scaled and shifted.

    Of every batch it sees one token in so many as there are FFNs, so that its cost does not grow with their number.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"sums": "sum"}

    def __init__(self, site: ObservedSite, others: Sequence[ObservedSite]) -> None:
        self._own, self._others = Neurons.from_site(site), [Neurons.from_site(other) for other in others]
        #: Of the products of 1, their output and the site's own; [products, FFNs, d_out].
        self.sums = Sums.zeros(1, len(others), len(site.weights.down)).table

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        x = x[: fitted_tokens(len(x)) : len(self._others)]
        output = self._own(x).double()
        for sums, other in zip(self.sums.unbind(1), self._others, strict=True):
            sums += torch.stack([product.sum(0) for product in products([other(x).double()], output)])

    @property
    def missed(self) -> Tensor:
        """Mean square of what each FFN misses, summed over the features, [FFNs]."""
        sums = Sums(self.sums.flatten(1), 1)
        missed = sums.error(sums.regress()) / sums.count.clamp(min=1)
        return missed.view(self.sums.shape[1:]).sum(1)


class Mapped:
    """The regression of a site's output on its input and on what another site's FFN gives for it.

    Memory: 2 (d + d_out) (d + 2 d_out) float64.
    """

    merged: ClassVar[Mapping[str, Merge]] = {"_residual": "parts"}

    def __init__(self, site: ObservedSite, kept: ObservedSite) -> None:
        self._own, self._kept = Neurons.from_site(site), Neurons.from_site(kept)
        d_out, d = len(site.weights.down), site.weights.up.shape[1]
        self._residual = Residual(d + d_out, d_out)

    def update(self, x: Tensor) -> None:
        """Adds tokens, [tokens, d], float32."""
        output = self._own(x)
        self._residual.update(torch.cat([x, self._kept(x)], 1), output, output)

    def solve(self, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The map, ``map_a`` [d_out, rank], ``map_b`` [rank, d + d_out] and ``map_bias`` [d_out]."""
        terms = self._residual.inputs
        a, b = truncated(self._residual.solve().weight.T, rank, terms.covariance)
        bias = self._residual.mean - a @ (b @ terms.mean)
        return {name: t.to(dtype) for name, t in (("map_a", a), ("map_b", b), ("map_bias", bias))}


def _alike(sites: Sequence[ObservedSite]) -> list[list[ObservedSite]]:
    """The sites by what an FFN must have in common with another to stand in for it, in their order."""
    found: dict[object, list[ObservedSite]] = {}
    for site in sites:
        own = matrices(site.weights) | biases(site.weights)
        key = site.site.kind, site.site.activation, *((n, tuple(t.shape), t.dtype) for n, t in own.items())
        found.setdefault(key, []).append(site)
    return list(found.values())


def _split(weights: SiteWeights, sites: int, budget: float) -> tuple[int, int]:
    """How many FFNs are kept of so many, and the rank of the others' maps."""
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
