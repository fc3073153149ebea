"""Calibration on live calls: a model compiled without a plan is observed, fitted and checked while it serves.

A profile holds the state of the sites of one graph. Profiles are found by the fingerprints of the sites' weights, so
that all graphs of a model (prefill, decoding) add to the same ones, and a changed weight starts a new one.

Threads: one thread at a time observes and fits (:data:`OBSERVING`); the others run the original without waiting.
"""

import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError, TardisError
from tardis_fx.live.arrivals import PATIENCE, LiveObservation
from tardis_fx.observation.run import Fit, Run
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import KeptSite, Plan, Planned
from tardis_fx.planning import fit_plan, refused
from tardis_fx.runtime.fingerprint import fingerprint
from tardis_fx.statistics.check import Check

_log = logging.getLogger("tardis_fx")

#: Held while a thread adds to profiles.
OBSERVING = threading.Lock()


@dataclass(frozen=True)
class Settings:
    """How profiles are fitted; see :class:`tardis_fx.config.Options`."""

    config: Config
    profile_tokens: int
    tolerance: float


class Profile:
    """The sites of one graph on their way from observed to rewritten.

    Attributes:
        plan: entries of the sites, or None until they are fitted.
    """

    def __init__(self, sites: Sequence[ObservedSite], settings: Settings) -> None:
        self.plan: Plan | None = None
        self._settings, self._repeating = settings, list[KeptSite]()
        self._weights = [weakref.ref(weight) for site in sites for weight in site.parameters]
        self._observation: LiveObservation | None = None
        self._begin(sites)

    @property
    def alive(self) -> bool:
        """Whether all weights still exist."""
        return all(ref() is not None for ref in self._weights)

    @property
    def stage(self) -> str:
        """Description of the profile's progress."""
        observation = self._observation
        if observation is None:
            return "fitted"
        return f"profiling: {observation.title}, {observation.count:,} of {self._settings.profile_tokens:,} tokens"

    def update(self, inputs: Sequence[tuple[str, Float[Tensor, "_ _"]]]) -> None:
        """Adds the inputs of one call, with fingerprints; fits and checks once there are enough.

        An error ends the profile, not the call; after an interruption by the user, observation starts again.
        """
        if (observation := self._observation) is None:
            return
        try:
            if (plan := observation.update(inputs)) is not None:
                self._finish(plan.sites)
            elif late := observation.monotonous():
                self._leave(observation, late)
        except Exception as error:
            reason = str(error) if isinstance(error, TardisError) else f"{type(error).__name__}: {error}"
            _log.error("the feed-forward networks stay as they are: %s", reason)
            self._finish(refused(site, reason) for site in observation.sites)
        except BaseException:
            self._observation = LiveObservation(observation.sites, self._settings.profile_tokens, self._fit)
            raise

    def _begin(self, sites: Sequence[ObservedSite]) -> None:
        self._observation = LiveObservation(sites, self._settings.profile_tokens, self._fit)
        self.update([])  # to the first run

    def _finish(self, entries: Iterable[Planned]) -> None:
        self.plan = Plan((*entries, *self._repeating), self._settings.config)
        self._observation = None

    def _leave(self, observation: LiveObservation, late: Sequence[ObservedSite]) -> None:
        """Restarts without some sites, which might delay the others forever."""
        tokens = self._settings.profile_tokens
        reason = f"its inputs repeat: fewer than {tokens:,} different ones in {PATIENCE * tokens:,}"
        for site in late:
            _log.warning("%s is not rewritten: %s", site.site.name, reason)
            self._repeating.append(refused(site, reason))
        self._begin([site for site in observation.sites if site not in late])

    def _fit(self, observation: LiveObservation) -> Fit[Plan]:
        """Fits a plan, and drops sites whose error on held-back calls exceeds the tolerance."""
        plan = yield from fit_plan(observation, self._settings.config)
        entries = {entry.fingerprint: entry for entry in plan.sites}
        sites = {site.fingerprint: site for site in observation.sites}
        fitted = {entry.fingerprint: entry for entry in plan.rewritten}
        if not fitted:
            return plan

        def check_of(site: ObservedSite) -> Check:
            entry = fitted[site.fingerprint]
            return Check(site, rewrite_named(entry.method).replacement(entry, site.weights))

        checks = yield Run("check", check_of, [sites[identity] for identity in fitted])
        for identity, check in checks.items():
            entry = entries[identity]
            if not check.error <= self._settings.tolerance:
                reason = f"its error on held-back calls, {check.error:.3f}, exceeds the tolerance"
                _log.warning("%s is not rewritten: %s", entry.name, reason)
                entries[identity] = refused(sites[identity], reason)
            else:
                entries[identity] = replace(entry, error=check.error)
        return Plan(tuple(entries.values()), plan.config)


# Replaced, never modified, so that readers need no lock.
_profiles: dict[tuple[str, Settings], Profile] = {}


def reset() -> None:
    """Forgets all profiles; compiled graphs keep the plans that they have received."""
    global _profiles
    _profiles = {}


def profiles_of(sites: Iterable[ObservedSite], settings: Settings) -> dict[str, Profile]:
    """Profiles of sites, by fingerprint; new sites share a new profile. The caller holds :data:`OBSERVING`."""
    global _profiles
    sites, known = list(sites), _profiles
    if new := {site.fingerprint: site for site in sites if (site.fingerprint, settings) not in known}:
        profile = Profile(list(new.values()), settings)
        alive = {key: profile for key, profile in known.items() if profile.alive}
        _profiles = known = alive | {(identity, settings): profile for identity in new}
    return {site.fingerprint: known[site.fingerprint, settings] for site in sites}


def extended(plan: Plan | None, settings: Settings) -> Plan:
    """A plan extended by the entries that profiles have fitted.

    Raises:
        ConfigError: the settings want linear layers in codes, which only ``calibrate`` fits.
    """
    if settings.config.linear_bits is not None:
        raise ConfigError("linear_bits needs a plan of calibrate, compiled without on_change='refit'")
    plans = {id(p.plan): p.plan for (_, s), p in _profiles.items() if s == settings and p.plan is not None}
    known = () if plan is None else plan.sites
    return Plan((*known, *(site for p in plans.values() for site in p.sites)), settings.config)


def fitted() -> Plan:
    """A plan of all entries that profiles have fitted, the newest first."""
    plans = [profile.plan for profile in reversed(_profiles.values()) if profile.plan is not None]
    return Plan(tuple(site for plan in plans for site in plan.sites), plans[0].config if plans else Config())


def stage_of(weights: Sequence[Tensor], function: str | None) -> str | None:
    """Progress of the newest profile of a site, or None without a profile."""
    identity = fingerprint(weights, function)
    return next((p.stage for (key, _), p in reversed(_profiles.items()) if key == identity), None)
