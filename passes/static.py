"""What rewrites have in common that do the same for every token: no guard, no predictor, bytes known beforehand.

1. Every site gets the same fraction of its bytes, whatever ``Config.allocation`` says, so that sites of one shape get
   constants of one shape.
2. The error is that of the finished replacement on the held-back tokens, in the model's own dtype.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from tardis_fx.errors import CalibrationError
from tardis_fx.graph.feed_forward import biases
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.passes.base import Rewrite, stored_bytes
from tardis_fx.plan import SitePlan
from tardis_fx.statistics.check import Check
from tardis_fx.statistics.target import least_budget

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.observation.observe import Observation, ObservedSite, SiteObserver

O = TypeVar("O", bound="SiteObserver")


@dataclass(frozen=True)
class Choice:
    """What a rewrite has settled on for one site; the fields are those of :class:`tardis_fx.plan.SitePlan`."""

    touched_bytes: float
    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    outlier_rate: float = 0.0


class StaticRewrite(Rewrite):
    """A rewrite that does the same for every token; see the module's docstring."""

    @abstractmethod
    def floor(self, weights: SiteWeights) -> int:
        """The least bytes per token that this rewrite can read at a site."""

    @abstractmethod
    def choose(self, observation: Observation, sites: Sequence[ObservedSite], config: Config) -> Sequence[Choice | str]:
        """What to do at each site within ``config.budget``, or why it stays as it is."""

    def least(self, sites: Sequence[ObservedSite]) -> float:
        """The least budget: by default, that every site's floor is within."""
        return max(self.floor(site.weights) / site.weights.bytes for site in sites)

    def afford(self, sites: Sequence[ObservedSite], config: Config) -> None:
        """Compares the budget with each site's floor.

        Raises:
            CalibrationError: the budget is too small.
        """
        for site in sites:
            floor, whole = self.floor(site.weights), site.weights.bytes
            if floor > config.budget * whole:
                raise CalibrationError(
                    f"a budget of {config.budget:.2%} is too small for {self.name}: {site.site.name or 'an FFN'} reads "
                    f"{floor:,} bytes per token at the least, {floor / whole:.2%} of the original's"
                )

    def refuse(self, site: Site) -> str | None:
        """Sites without an activation are refused."""
        return "no activation between its projections" if site.affine is not None else None

    def fit(self, observation: Observation, sites: Sequence[ObservedSite], config: Config) -> list[SitePlan]:
        """Chooses, and runs the batches once more for the error.

        Raises:
            CalibrationError: the budget is below a site's floor, or the target is out of reach.
        """
        if config.target_error is None:
            return self._fit_within(observation, sites, config)
        tried: dict[float, list[SitePlan]] = {}

        def error(budget: float) -> float:
            tried[budget] = self._fit_within(observation, sites, replace(config, budget=budget))
            return math.sqrt(sum(plan.error**2 for plan in tried[budget]) / len(sites))

        return tried[least_budget(error, self.least(sites), config.target_error)]

    def _fit_within(self, observation: Observation, sites: Sequence[ObservedSite], config: Config) -> list[SitePlan]:
        self.afford(sites, config)
        if not config.sequential:
            return self._fit_together(observation, sites, config)
        assert isinstance(observation, BatchObservation)  # Options refuses it elsewhere
        try:
            return [self._fit_next(observation, site, config) for site in sites]
        finally:
            observation.restore()

    def _fit_together(self, observation: Observation, sites: Sequence[ObservedSite], config: Config) -> list[SitePlan]:
        choices = self.choose(observation, sites, config)
        plans = {s.fingerprint: self._plan(s, choice) for s, choice in zip(sites, choices, strict=True)}
        chosen = [s for s in sites if plans[s.fingerprint].method is not None]
        if chosen:
            functions = {s.fingerprint: self._function(s, plans[s.fingerprint]) for s in chosen}
            checks = observation.run(
                lambda s: Check(s, functions[s.fingerprint], held_back=True),
                chosen,
                f"error of {self.name} at a budget of {config.budget}",
            )
            plans |= {identity: replace(plans[identity], error=check.error) for identity, check in checks.items()}
        return [plans[s.fingerprint] for s in sites]

    def _fit_next(self, observation: BatchObservation, site: ObservedSite, config: Config) -> SitePlan:
        """Fits one site and rewrites it for all runs to come."""
        (plan,) = self._fit_together(observation, [site], config)
        if plan.method is not None:
            observation.replace(site, self._function(site, plan))
        return plan

    def _function(self, site: ObservedSite, plan: SitePlan) -> partial[Tensor]:
        return partial(self.forward, constants=self.constants(plan, site.weights), plan=plan)

    def _plan(self, site: ObservedSite, choice: Choice | str) -> SitePlan:
        if isinstance(choice, str):
            return SitePlan.of(site.site, site.parameters, reason=choice)
        plan = SitePlan.of(site.site, site.parameters, method=self.name, **vars(choice))
        return replace(plan, stored_bytes=stored_bytes(site, self.constants(plan, site.weights)))


def measured(
    observation: Observation, kind: Callable[[ObservedSite], O], sites: Sequence[ObservedSite], config: Config
) -> dict[str, O]:
    """What observers that take a site saw of each, by fingerprint; once for one observation and the same sites.

    A sequential fit sees what the rewritten sites before it give, and measures anew.
    """
    what = f"{kind.__name__.lower()} of {', '.join(site.site.name for site in sites)}"
    if config.sequential:
        return observation.run(kind, sites, what)
    if what not in observation.memo:
        observation.memo[what] = observation.run(kind, sites, what)
    found: dict[str, O] = observation.memo[what]
    return found


def bias_bytes(weights: SiteWeights) -> int:
    """Size of all biases."""
    return sum(bias.nbytes for bias in biases(weights).values())
