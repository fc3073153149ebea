"""Base class of rewrites that treat every token alike: no guard, no predictor, bytes known in advance.

1. Every site gets the same fraction of its bytes, regardless of ``Config.allocation``, so that sites of one shape get
   constants of one shape.
2. The error is that of the finished replacement on the held-back tokens, in the model's own dtype.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import CalibrationError
from tardis_fx.graph.feed_forward import biases
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.observation.run import Fit, Run, changed, steps
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import Rewrite, stored_bytes, with_errors
from tardis_fx.plan import KeptSite, Planned, SitePlan
from tardis_fx.statistics.target import fit_to_target


@dataclass(frozen=True)
class Choice:
    """A rewrite's choice for one site; the fields are those of :class:`tardis_fx.plan.SitePlan`."""

    touched_bytes: float
    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    outlier_rate: float = 0.0


#: The choice for each site, or the reason to keep it.
Choices = Sequence[Choice | str]


class StaticRewrite(Rewrite):
    """Base class of rewrites that treat every token alike."""

    @abstractmethod
    def floor(self, weights: SiteWeights) -> int:
        """Minimum bytes per token that this rewrite reads at a site."""

    @abstractmethod
    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[Choices] | Choices:
        """Chooses a plan for each site within ``config.budget``, or the reason to keep it; a generator if it measures.

        Like :meth:`Rewrite.fit`, it yields the runs that it needs.
        """

    def minimum_budget(self, sites: Sequence[ObservedSite]) -> float:
        """Smallest budget: by default, one that covers every site's floor."""
        return max(self.floor(site.weights) / site.weights.bytes for site in sites)

    def afford(self, sites: Sequence[ObservedSite], config: Config) -> None:
        """Checks the budget against each site's floor.

        Raises:
            CalibrationError: the budget is too small.
        """
        for site in sites:
            floor, dense = self.floor(site.weights), site.weights.bytes
            if floor > config.budget * dense:
                raise CalibrationError(
                    f"a budget of {config.budget:.2%} is too small for {self.name}: {site.site.name or 'an FFN'} reads "
                    f"at least {floor:,} bytes per token, {floor / dense:.2%} of the original's"
                )

    def refuse(self, site: Site) -> str | None:
        """Refuses sites without an activation."""
        return "no activation between its projections" if site.affine is not None else None

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        """Chooses a plan for each site, then measures the errors in one more run.

        Raises:
            CalibrationError: the budget is below a site's floor, the target is out of reach, or the rewrite compares
                sites in a sequential fit.
        """
        if config.target_error is None:
            return self._fit_within(sites, config)
        return fit_to_target(
            lambda budget: self._fit_within(sites, replace(config, budget=budget, target_error=None)),
            self.minimum_budget(sites),
            config.target_error,
        )

    def _fit_within(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        if config.sequential and self.compares_sites:
            raise CalibrationError(f"{self.name} compares all sites before it changes one: fit without sequential")
        self.afford(sites, config)
        if not config.sequential:
            return (yield from self._fit_together(sites, config))
        plans: list[Planned] = []
        replaced: dict[str, Callable[[Tensor], Tensor]] = {}
        for site in sites:
            seeing = partial(replace, key=None, replaced=dict(replaced))
            (plan,) = yield from changed(self._fit_together([site], config), seeing)
            if isinstance(plan, SitePlan):
                replaced[site.fingerprint] = self.replacement(plan, site.weights)
            plans.append(plan)
        return plans

    def _fit_together(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        choices = yield from steps(self.choose(sites, config))
        plans = [self._plan(site, choice) for site, choice in zip(sites, choices, strict=True)]
        return (yield from with_errors(self, sites, plans, config))

    def _plan(self, site: ObservedSite, choice: Choice | str) -> Planned:
        if isinstance(choice, str):
            return KeptSite.from_site(site.site, site.parameters, reason=choice)
        plan = SitePlan.from_site(site.site, site.parameters, method=self.name, **vars(choice))
        return replace(plan, stored_bytes=stored_bytes(site, self.constants(plan, site.weights)))


def measured(kind: Callable[[ObservedSite], Any], sites: Sequence[ObservedSite]) -> Run:
    """A run of observers made from sites; remembered for the same sites of one observation."""
    names = ", ".join(site.site.name for site in sites)
    return Run(f"{kind.__name__.lower()} of {names}", kind, sites, key=kind)


def bias_bytes(weights: SiteWeights) -> int:
    """Size of all biases in bytes."""
    return sum(bias.nbytes for bias in biases(weights).values())
