"""What rewrites have in common that do the same for every token: no guard, no predictor, bytes known beforehand.

1. Every site gets the same fraction of its bytes, whatever ``Config.allocation`` says, so that sites of one shape get
   constants of one shape.
2. The error is that of the finished replacement on the held-back tokens, in the model's own dtype.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from tardis_fx.errors import CalibrationError
from tardis_fx.graph.feed_forward import biases
from tardis_fx.observation.run import Run, changed, steps
from tardis_fx.passes.base import Rewrite, stored_bytes, with_errors
from tardis_fx.plan import KeptSite, SitePlan
from tardis_fx.statistics.target import fit_to_target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tardis_fx.config import Config
    from tardis_fx.graph.site import Site, SiteWeights
    from tardis_fx.observation.observe import ObservedSite
    from tardis_fx.observation.run import Fit
    from tardis_fx.plan import Planned

    Choices = Sequence["Choice | str"]


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
    def choose(self, sites: Sequence[ObservedSite], config: Config) -> Fit[Choices] | Choices:
        """What to do at each site within ``config.budget``, or why it stays as it is; where it measures, a generator.

        Like :meth:`Rewrite.fit`, it yields the runs that it needs.
        """

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

    def fit(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        """Chooses, and runs the batches once more for the error.

        Raises:
            CalibrationError: the budget is below a site's floor, or the target is out of reach.
        """
        if config.target_error is None:
            return self._fit_within(sites, config)
        return fit_to_target(
            lambda budget: self._fit_within(sites, replace(config, budget=budget)),
            self.least(sites),
            config.target_error,
        )

    def _fit_within(self, sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
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
            return KeptSite.of(site.site, site.parameters, reason=choice)
        plan = SitePlan.of(site.site, site.parameters, method=self.name, **vars(choice))
        return replace(plan, stored_bytes=stored_bytes(site, self.constants(plan, site.weights)))


def measured(kind: Callable[[ObservedSite], Any], sites: Sequence[ObservedSite]) -> Run:
    """A run of observers that take a site; made once for one observation and the same sites."""
    names = ", ".join(site.site.name for site in sites)
    return Run(f"{kind.__name__.lower()} of {names}", kind, sites, key=kind)


def bias_bytes(weights: SiteWeights) -> int:
    """Size of all biases."""
    return sum(bias.nbytes for bias in biases(weights).values())
