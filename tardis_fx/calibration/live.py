"""Calibration on live calls: a model compiled without a plan is observed, fitted and checked while it serves.

A profile is what is known of the sites of one graph; profiles are found by the fingerprints of these sites' weights,
so that all graphs of a model (prefill, decoding) add to the same ones, and a changed weight begins anew.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tardis_fx.calibrate import plan_for, refused
from tardis_fx.calibration.check import Check
from tardis_fx.calibration.observe import O, Observation, ObservedSite, SiteObserver
from tardis_fx.config import Config
from tardis_fx.errors import CalibrationError, TardisError
from tardis_fx.fingerprint import fingerprint
from tardis_fx.passes.base import rewrite_named
from tardis_fx.plan import Plan, SitePlan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

_log = logging.getLogger("tardis_fx")

#: Tokens of a site that are kept until the observer gets them together.
TOGETHER = 512


@dataclass(frozen=True)
class Settings:
    """How profiles are fitted; see :class:`tardis_fx.config.Options`."""

    config: Config
    profile_tokens: int
    tolerance: float


class Suspended(BaseException):
    """A run has not seen its tokens yet."""


class LiveObservation(Observation):
    """Sites whose inputs arrive call by call.

    A run cannot wait for them, so it suspends the fit, which is begun again when the tokens are there: runs that are
    done then answer at once.
    """

    def __init__(self, sites: Sequence[ObservedSite], tokens: int) -> None:
        """Starts without any run.

        Args:
            sites: the sites.
            tokens: how many each run shows of every site.
        """
        self._sites, self._tokens, self.memo = list(sites), tokens, {}
        self.what, self.seen = "", 0
        self._done: dict[str, dict[str, Any]] = {}
        self._observers: dict[str, SiteObserver] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._counts: dict[str, int] = {}

    @property
    def sites(self) -> list[ObservedSite]:
        """All sites."""
        return self._sites

    def run(self, make: Callable[[ObservedSite], O], sites: Sequence[ObservedSite], what: str) -> dict[str, O]:
        """Answers when the tokens have been seen; see :meth:`Observation.run`.

        Raises:
            Suspended: they have not.
        """
        if what not in self._done:
            self.what, self.seen = what, 0
            self._observers = {site.fingerprint: make(site) for site in sites}
            self._kept = {identity: [] for identity in self._observers}
            self._counts = dict.fromkeys(self._observers, 0)
            raise Suspended
        return self._done[what]

    def update(self, inputs: Sequence[tuple[str, Tensor]]) -> bool:
        """Shows the inputs of one call to the observers of the current run.

        Args:
            inputs: fingerprints and inputs, [tokens, d].

        Returns:
            Whether the run is done.

        Raises:
            CalibrationError: an input is NaN or infinite.
        """
        for identity, x in inputs:
            if identity not in self._observers or not len(x):
                continue
            if not torch.isfinite(x).all():
                raise CalibrationError("inputs of a feed-forward network hold NaN or infinity")
            self._kept[identity].append(x.float().cpu())
            self._counts[identity] += len(x)
            if sum(map(len, self._kept[identity])) >= TOGETHER:
                self._show(identity)
        self.seen = min(self._counts.values(), default=0)
        if self.seen < self._tokens:
            return False
        for identity in self._observers:
            self._show(identity)
        self._done[self.what], self._observers = dict(self._observers), {}
        return True

    def _show(self, identity: str) -> None:
        if kept := self._kept[identity]:
            self._observers[identity].update(torch.cat(kept))
            kept.clear()


class Profile:
    """The sites of one graph on their way from observed to rewritten.

    Attributes:
        plan: what to do at them, or None as long as that is open.
    """

    def __init__(self, sites: Sequence[ObservedSite], settings: Settings) -> None:
        """Begins the first run."""
        self.plan: Plan | None = None
        self._settings = settings
        self._observation = LiveObservation(sites, settings.profile_tokens)
        self._weights = [weakref.ref(weight) for site in sites for weight in site.parameters]
        self._advance()

    @property
    def alive(self) -> bool:
        """Whether all weights still exist."""
        return all(ref() is not None for ref in self._weights)

    @property
    def stage(self) -> str:
        """Where the profile stands, for people."""
        if self.plan is not None:
            return "fitted"
        seen, of = self._observation.seen, self._settings.profile_tokens
        return f"profiling: {self._observation.what}, {seen:,} of {of:,} tokens"

    def update(self, inputs: Sequence[tuple[str, Tensor]]) -> None:
        """Adds the inputs of one call, with fingerprints; fits and checks when there are enough."""
        try:
            if self.plan is None and self._observation.update(inputs):
                self._advance()
        except TardisError as error:
            self._give_up(error)

    def _advance(self) -> None:
        try:
            self.plan = self._checked(plan_for(self._observation, self._settings.config))
            del self._observation
        except Suspended:
            pass
        except TardisError as error:
            self._give_up(error)

    def _checked(self, plan: Plan) -> Plan:
        """The plan without sites whose error on calls that it was not fitted on exceeds the tolerance."""
        entries = {entry.fingerprint: entry for entry in plan.sites}
        sites = {site.fingerprint: site for site in self._observation.sites}
        fitted = [site for identity, site in sites.items() if entries[identity].method is not None]
        if not fitted:
            return plan
        checks = self._observation.run(lambda s: Check(s, _replacement(s, entries[s.fingerprint])), fitted, "check")
        for identity, check in checks.items():
            entry = entries[identity]
            if not check.error <= self._settings.tolerance:
                reason = f"its error on held-back calls, {check.error:.3f}, exceeds the tolerance"
                _log.warning("%s is not rewritten: %s", entry.name, reason)
                entries[identity] = refused(sites[identity], reason)
            else:
                entries[identity] = replace(entry, error=check.error)
        return Plan(tuple(entries.values()), plan.config)

    def _give_up(self, error: TardisError) -> None:
        _log.error("the feed-forward networks stay as they are: %s", error)
        sites = self._observation.sites
        self.plan = Plan(tuple(refused(site, str(error)) for site in sites), self._settings.config)
        del self._observation


def _replacement(site: ObservedSite, entry: SitePlan) -> Callable[[Tensor], Tensor]:
    """What an entry puts in a site's place."""
    rewrite = rewrite_named(str(entry.method))
    constants = rewrite.constants(entry, site.weights)
    return lambda x: rewrite.forward(x, constants, entry)


_PROFILES: dict[tuple[str, Settings], Profile] = {}


def reset() -> None:
    """Forgets all profiles; what they gave to compiled graphs stays there."""
    _PROFILES.clear()


def profiles_of(sites: Iterable[ObservedSite], settings: Settings) -> dict[str, Profile]:
    """The profiles of sites, by fingerprint; those that have none begin one together."""
    sites = list(sites)
    if new := [site for site in sites if (site.fingerprint, settings) not in _PROFILES]:
        for gone in [key for key, profile in _PROFILES.items() if not profile.alive]:
            del _PROFILES[gone]
        unique = list({site.fingerprint: site for site in new}.values())
        begun = Profile(unique, settings)
        _PROFILES.update({(site.fingerprint, settings): begun for site in unique})
    return {site.fingerprint: _PROFILES[site.fingerprint, settings] for site in sites}


def extended(plan: Plan | None, settings: Settings) -> Plan:
    """A plan with what profiles have added to it."""
    plans = {id(p.plan): p.plan for (_, s), p in _PROFILES.items() if s == settings and p.plan is not None}
    known = () if plan is None else plan.sites
    return Plan((*known, *(site for p in plans.values() for site in p.sites)), settings.config)


def fitted() -> Plan:
    """All entries that profiles have fitted, the youngest first."""
    plans = [profile.plan for profile in reversed(_PROFILES.values()) if profile.plan is not None]
    return Plan(tuple(site for plan in plans for site in plan.sites), plans[0].config if plans else Config())


def stage_of(weights: Sequence[Tensor], function: str | None) -> str | None:
    """Where the youngest profile of a site stands, or None where there is none."""
    identity = fingerprint(weights, function)
    return next((p.stage for (key, _), p in reversed(_PROFILES.items()) if key == identity), None)
