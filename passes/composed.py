"""Chains two rewrites at one site: the second is fitted to the FFN that the first leaves.

1. The first rewrite must leave an FFN (:attr:`tardis_fx.passes.base.Rewrite.leaves_ffn`). It is fitted with a budget of
   all bytes, because the budget limits the bytes that the second rewrite reads.
2. The second rewrite sees the site's inputs, and the weights that the first one leaves.
3. Constants are made from the original weights through both, so that only the original weights identify the plan. The
   error is measured against the original FFN.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit, changed, forgotten, steps
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import Rewrite, stored_bytes, with_errors
from tardis_fx.passes.layout import Tensors, check_settings
from tardis_fx.plan import KeptSite, Planned, SitePlan


class Composed(Rewrite):
    """Composition of two rewrites at the same sites."""

    name: ClassVar[str] = "composed"

    def __init__(self, first: Rewrite, second: Rewrite) -> None:
        """Composes two rewrites.

        Raises:
            ConfigError: the first leaves no FFN, or the second needs the original FFN.
        """
        if second.exact:
            raise ConfigError(f"{second.method} folds FFNs that are affine already, and cannot follow another rewrite")
        if second.linear:
            raise ConfigError(f"{second.method} rewrites linear layers, and cannot follow a rewrite of FFNs")
        if not first.leaves_ffn:
            raise ConfigError(
                f"{first.method} leaves no feed-forward network that {second.method} could be fitted to: "
                f"put it last, or directly before int8_ffn or int4_ffn"
            )
        self.first, self.second = first, second
        self.leaves_ffn, self.leaves_matrices = second.leaves_ffn, second.leaves_matrices
        self.compares_sites = first.compares_sites or second.compares_sites

    @property
    def method(self) -> str:
        """Names of both rewrites, joined with ``+``."""
        return f"{self.first.method}+{self.second.method}"

    def for_matrices(self, config: Config) -> Config:
        """The config with which the second rewrite leaves matrices."""
        return self.second.for_matrices(config)

    def refuse(self, site: Site) -> str | None:
        """Why either rewrite refuses a site, or None."""
        return self.first.refuse(site) or self.second.refuse(site)

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        """Fits the first rewrite, then the second, then measures the error of both together."""
        firsts = yield from steps(self.first.fit(sites, replace(config, budget=1.0)))
        left = [
            replace(site, weights=self.first.weights(first, site.weights)) if isinstance(first, SitePlan) else site
            for site, first in zip(sites, firsts, strict=True)
        ]
        seconds = yield from changed(steps(self.second.fit(left, config)), forgotten)  # no other fit has these sites
        plans = [self._joined(*entries) for entries in zip(sites, firsts, seconds, strict=True)]
        return (yield from with_errors(self, sites, plans, config))

    def _joined(self, site: ObservedSite, first: Planned, second: Planned) -> Planned:
        if not (isinstance(first, SitePlan) and isinstance(second, SitePlan)):
            return first if isinstance(first, KeptSite) else second
        plan = replace(
            second,
            method=self.method,
            settings={"first": first.settings, "second": second.settings},
            tensors={f"first.{n}": t for n, t in first.tensors.items()}
            | {f"second.{n}": t for n, t in second.tensors.items()},
        )
        return replace(plan, stored_bytes=stored_bytes(site, self.constants(plan, site.weights)))

    def _entries(self, plan: SitePlan) -> tuple[SitePlan, SitePlan]:
        """The entries of the first and of the second rewrite."""
        first, second = (
            replace(
                plan,
                method=rewrite.method,
                settings=plan.settings[part],
                tensors={n.removeprefix(f"{part}."): t for n, t in plan.tensors.items() if n.startswith(f"{part}.")},
            )
            for part, rewrite in (("first", self.first), ("second", self.second))
        )
        return first, second

    def validate(self, plan: SitePlan, weights: SiteWeights) -> None:
        """Lets each rewrite check its part of the entry."""
        check_settings(plan, "first", "second")
        first, second = self._entries(plan)
        if len(first.tensors) + len(second.tensors) != len(plan.tensors):
            raise ValueError("it has tensors that belong to neither rewrite")
        self.first.validate(first, weights)
        self.second.validate(second, self.first.weights(first, weights))

    def weights(self, plan: SitePlan, weights: SiteWeights) -> SiteWeights:
        """Weights after both rewrites."""
        first, second = self._entries(plan)
        return self.second.weights(second, self.first.weights(first, weights))

    def matrices(self, plan: SitePlan) -> dict[str, float]:
        """Matrices of the second rewrite."""
        return self.second.matrices(self._entries(plan)[1])

    def constants(self, plan: SitePlan, weights: SiteWeights) -> dict[str, Tensor]:
        """Constants of the second rewrite, for the weights that the first leaves."""
        first, second = self._entries(plan)
        return self.second.constants(second, self.first.weights(first, weights))

    def forward(self, x: Float[Tensor, "... d"], constants: Tensors, plan: SitePlan) -> Float[Tensor, "... d_out"]:
        """Runs the second rewrite."""
        return self.second.forward(x, constants, self._entries(plan)[1])
