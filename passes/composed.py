"""Chains two rewrites at one site: the second is fitted to the FFN that the first leaves.

1. The first rewrite must leave an FFN (:attr:`tardis_fx.passes.base.Rewrite.leaves_ffn`). It is fitted with a budget of
   all bytes, because the budget limits the bytes that the second rewrite reads.
2. The second rewrite sees the site's inputs, and the weights that the first one leaves.
3. Constants are made from the original weights through both, so that only the original weights identify the plan. The
   error is measured against the original FFN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit, changed, forgotten, steps
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import Rewrite, stored_bytes, with_errors
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
            raise ConfigError(f"{second.method} folds what is affine as it is, and composes with nothing")
        if not first.leaves_ffn:
            raise ConfigError(
                f"{first.method} leaves no feed-forward network that {second.method} could be fitted to: "
                f"it can only stand last, or in front of int8_ffn and int4_ffn"
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
        left = [replace(s, weights=self._weights(e, s.weights)) for s, e in zip(sites, firsts, strict=True)]
        seconds = yield from changed(steps(self.second.fit(left, config)), forgotten)  # no other fit has these sites
        plans = [self._joined(s, *own) for s, *own in zip(sites, firsts, seconds, strict=True)]
        return (yield from with_errors(self, sites, plans, config))

    def _weights(self, first: Planned, weights: SiteWeights) -> SiteWeights:
        return self.first.weights(first, weights) if isinstance(first, SitePlan) else weights

    def _joined(self, site: ObservedSite, first: Planned, second: Planned) -> Planned:
        if not (isinstance(first, SitePlan) and isinstance(second, SitePlan)):
            return first if isinstance(first, KeptSite) else second
        plan = replace(
            second,
            method=self.method,
            settings={"first": first.settings, "second": second.settings},
            tensors={
                f"{part}.{n}": t for part, e in (("first", first), ("second", second)) for n, t in e.tensors.items()
            },
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
        if plan.settings.keys() != {"first", "second"}:
            raise ValueError(f"it has the settings {', '.join(plan.settings)}, not those of two rewrites")
        first, second = self._entries(plan)
        if len(first.tensors) + len(second.tensors) != len(plan.tensors):
            raise ValueError("it has tensors of neither of two rewrites")
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

    def forward(self, x: Tensor, constants: Mapping[str, Tensor], plan: SitePlan) -> Tensor:
        """Runs the second rewrite."""
        return self.second.forward(x, constants, self._entries(plan)[1])
