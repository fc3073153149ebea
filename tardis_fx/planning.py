"""The engine of ``calibrate`` and live calibration: chooses each site's rewrite, fits and checks it."""

import gc
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch

from tardis_fx.config import Config
from tardis_fx.errors import CalibrationError, ConfigError, RewriteError
from tardis_fx.graph.feed_forward import matrices
from tardis_fx.observation.run import Fit, Observation, RepeatableObservation, changed, drive, forgotten, steps
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.coded_linear import CodedLinearLayer
from tardis_fx.passes.exact_fold import ExactFold
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import KeptSite, Plan, Planned, SitePlan

_log = logging.getLogger("tardis_fx")

#: With fewer tokens than this, or than the widest matrix has columns, calibration warns.
FEW_TOKENS = 2048


def plan_for(observation: RepeatableObservation, config: Config, *, offload: bool = False) -> Plan:
    """Makes the plan of :func:`fit_plan`; plans of one observation share results that do not depend on the config."""
    return drive(observation, fit_plan(observation, config, offload=offload))


def fit_plan(observation: Observation, config: Config, *, offload: bool = False) -> Fit[Plan]:
    """Fits all sites and returns a plan.

    With ``offload``, the sites are fitted one at a time, each as if it were the only one, without keeping statistics.

    Raises:
        ConfigError: as :func:`calibrate`.
        CalibrationError: as :func:`calibrate`. An error of a rewrite is its cause.
    """
    sites = tuple(observation.sites)
    methods = {s.fingerprint: _method(s, config) for s in sites}
    fold = ExactFold()
    planned: dict[str, Planned] = {
        s.fingerprint: plan
        for s in sites
        if methods[s.fingerprint] is not None and (plan := fold.unaided(s.site, s.parameters))
    }
    reasons: dict[str, str | None] = {}
    groups: dict[str, list[ObservedSite]] = {}
    for site in sites:
        method = methods[site.fingerprint]
        refusal = "left as it is by Config.method" if method is None else rewrite_named(method).refuse(site.site)
        reasons[site.fingerprint] = site.site.reason or refusal
        if method is not None and reasons[site.fingerprint] is None and site.fingerprint not in planned:
            groups.setdefault(method, []).append(site)
    for site in (site for group in groups.values() for site in group):
        if not all(torch.isfinite(parameter).all() for parameter in site.parameters):
            raise CalibrationError(f"the weights of {site.site.name} hold NaN or infinity")
    fits = [(method, group, _with_budget(config, group)) for method, group in groups.items()]
    if offload:
        fits = [(method, [site], fitted) for method, group, fitted in fits for site in group]
    for method, group, fitted in fits:
        fit = _fitted(observation, group, method, fitted)
        plans = yield from changed(fit, forgotten) if offload else fit
        planned |= {plan.fingerprint: plan for plan in plans}
        if offload:
            gc.collect()  # cached values of drafts contain reference cycles
    for site in observation.sites[len(sites) :]:
        _log.warning("%s is not planned: the first batch does not reach it", site.site.name)
    entries = [planned.get(s.fingerprint) or refused(s, reasons[s.fingerprint] or "") for s in sites]
    return Plan(tuple(_stored_once(entries)), config)


def _method(site: ObservedSite, config: Config) -> str | None:
    """The rewrite of a site, or None: for an FFN, of the first pattern that matches its name."""
    if site.site.kind == "linear":
        return CodedLinearLayer.name
    return next((method for pattern, method in config.methods if fnmatchcase(site.site.name, pattern)), None)


def _with_budget(config: Config, sites: Sequence[ObservedSite]) -> Config:
    """The config with the fraction of the FFNs' bytes that its bits per weight are; linear layers have no budget.

    Raises:
        ConfigError: the weights themselves have fewer bits.
    """
    assert config.target_kl is None  # see tardis_fx.target_kl
    if config.bits is None or sites[0].site.kind == "linear":
        return config
    own_bits = 8 * sum(site.weights.bytes for site in sites) / sum(site.weights.count for site in sites)
    if config.bits > own_bits:
        raise ConfigError(f"bits={config.bits:g}: the FFN weights have {own_bits:.3g} bits each, give fewer")
    return replace(config, bits=None, budget=config.bits / own_bits)


def _fitted(observation: Observation, sites: Sequence[ObservedSite], method: str, config: Config) -> Fit[list[Planned]]:
    """Fits a rewrite to some sites; a site whose error cannot be measured is not rewritten.

    Raises:
        CalibrationError: the error cannot be measured at any site.
        RewriteError: the rewrite fails.
    """
    try:
        plans = yield from steps(rewrite_named(method).fit(sites, config))
    except RewriteError as error:
        if error.__cause__ is None:  # from another rank
            raise
        raise RewriteError(f"{error} ({_amount(observation, sites)})") from error.__cause__
    _warn_of_few(observation, sites)
    faults = [_fault(plan, observation, site) for plan, site in zip(plans, sites, strict=True)]
    if any(faults) and all(fault or isinstance(plan, KeptSite) for fault, plan in zip(faults, plans, strict=True)):
        raise CalibrationError(next(filter(None, faults)))
    for site, fault in zip(sites, faults, strict=True):
        if fault:
            _log.warning("%s is not rewritten: %s", site.site.name, fault)
    return [refused(site, fault) if fault else plan for plan, site, fault in zip(plans, sites, faults, strict=True)]


def _fault(plan: Planned, observation: Observation, site: ObservedSite) -> str | None:
    """Why the error of a plan is not valid, or None."""
    if isinstance(plan, KeptSite):
        return None
    seen, amount = observation.seen(site), _amount(observation, [site])
    if not math.isfinite(plan.error):
        return f"the error of {plan.method} is {plan.error} ({amount}): values may be too large"
    if seen is not None and not seen.held_back:
        return f"no token is held back to measure the error of {plan.method} ({amount}): batches need 8 tokens or more"
    return None


def _counts(observation: Observation, sites: Sequence[ObservedSite]) -> list[int]:
    """Numbers of tokens seen at the sites where they are known."""
    return [seen.tokens for site in sites if (seen := observation.seen(site)) is not None]


def _amount(observation: Observation, sites: Sequence[ObservedSite]) -> str:
    """Describes the tokens, their maximum rank, and the inputs of the site with the fewest tokens."""
    columns, counts = max(site.weights.up.shape[1] for site in sites), _counts(observation, sites)
    if not counts:
        return f"{columns:,} inputs"
    return f"{min(counts):,} tokens, so a rank of {min(*counts, columns):,} at most, for {columns:,} inputs"


def _warn_of_few(observation: Observation, sites: Sequence[ObservedSite]) -> None:
    """Warns once per observation if there are few tokens."""
    tokens = max(_counts(observation, sites), default=None)
    widest = max(matrix.shape[1] for site in sites for matrix in matrices(site.weights).values() if len(matrix))
    needed = max(FEW_TOKENS, widest)
    if tokens is not None and tokens < needed and not observation.warned:
        observation.warned = True
        _log.warning(
            f"calibrated on {tokens:,} tokens: with fewer than {needed:,} the error on other text may be higher than "
            "the plan says; 16,000 are a good number"
        )


def _stored_once(entries: Sequence[Planned]) -> Iterator[Planned]:
    """The entries, with shared tensors counted as stored only at the first entry that holds them."""
    counted: set[int] = set()
    for entry in entries:
        if isinstance(entry, SitePlan):
            tensors = entry.tensors.values()
            again = sum(t.nbytes for t in tensors if id(t) in counted)
            counted |= set(map(id, tensors))
            entry = replace(entry, stored_bytes=entry.stored_bytes - again) if again else entry
        yield entry


def refused(site: ObservedSite, reason: str) -> KeptSite:
    """The entry of a site that is not rewritten."""
    return KeptSite.from_site(site.site, site.parameters, identity=site.fingerprint, reason=reason)
