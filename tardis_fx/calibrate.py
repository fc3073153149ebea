"""``tardis_fx.calibrate``: a model and some text in, a plan out."""

from __future__ import annotations

import gc
import logging
import math
from dataclasses import asdict, fields, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Never

import torch

from tardis_fx.calibration.batches import Batch, checked, uncompiled
from tardis_fx.calibration.checkpoint import Checkpoint
from tardis_fx.calibration.observe import BatchObservation, Observation, ObservedSite
from tardis_fx.calibration.part import Part
from tardis_fx.calibration.ranks import Ranks, arithmetic
from tardis_fx.config import Config
from tardis_fx.digest import digest
from tardis_fx.errors import CalibrationError, ConfigError, RewriteError
from tardis_fx.passes.base import rewrite_named
from tardis_fx.passes.exact_fold import ExactFold
from tardis_fx.plan import Plan, SitePlan

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Any

    from torch import nn

_log = logging.getLogger("tardis_fx")

#: With fewer tokens than this, or than the widest matrix has columns, calibration warns.
FEW_TOKENS = 2048


@torch.inference_mode(mode=False)
@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    config: Config | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    offload: bool = False,
    **unknown: Never,
) -> Plan:
    """Runs a model on calibration batches and plans a rewrite for every FFN in it.

    Memory beyond the model's: the batches, and for each site sums of a size that no text changes (see Concepts).

    Where ``torch.distributed`` is initialised, all its ranks must call this with the same model, batches and config:
    each runs its share of the batches, and all return the same plan.

    Args:
        model: in eval mode; it is neither changed nor compiled for later use. A compiled one is taken for what it was
            compiled from.
        batches: each a tensor, the model's first argument, or a dict of keyword arguments. 16,000 tokens or more; with
            fewer than 2,048, or than the widest matrix has columns, a warning says how many there are. Padding is left
            out where ``attention_mask`` or ``decoder_attention_mask``, [batch, tokens], says what it is.
        config: what to aim at; the defaults when None.
        checkpoint: a folder for the statistics of finished runs over the batches. Given again after an interruption,
            the calibration goes on behind them.
        offload: fit one FFN after the other, so that what is measured and fitted is in memory for one at a time. Every
            run over the batches is made once for each of them, and ``Config.allocation`` is ``"per_site"``.
        unknown: fields of the config belong into ``Config(...)``, and are refused here.

    Raises:
        ConfigError: the config names no registered rewrite, rewrites that do not compose, or sites that there are not;
            with ``offload``, one that decides about all FFNs together; an argument is unknown.
        CalibrationError: the model is none, on the meta device or in training mode, or fails; there are no batches, or
            one is nothing that the model takes; an input or a weight is NaN, there is no FFN, or the budget is smaller
            than the folded weights; a rewrite fails, or the error of none can be measured on these tokens; ranks differ
            in what they are given or in what they compute, or one died.
        CheckpointError: the checkpoint is damaged, of another calibration, or cannot be written.
    """
    if unknown:
        raise ConfigError(_misplaced(unknown))
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise ConfigError(f"config must be a tardis_fx.Config, not {type(config).__name__}")
    for _, method in config.methods:
        if method is not None:
            rewrite_named(method)  # before the model runs
    if offload:
        config = _by_site(config)
    ranks = Ranks.initialised()
    with ranks.together():
        return _calibrated(uncompiled(model), batches, config, checkpoint, ranks, offload=offload)


def _calibrated(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Config,
    checkpoint: str | os.PathLike[str] | None,
    ranks: Ranks,
    *,
    offload: bool,
) -> Plan:
    """The plan, by all ranks."""
    given, owner = checked(model, batches), ""
    if ranks.count > 1 or checkpoint is not None:
        owner = digest(dict(model.state_dict()), given, asdict(replace(config, progress=False)), offload)
    ranks.agree("arithmetic", arithmetic())
    ranks.agree("hashes of model, batches and config", owner)
    kept = ranks.attempt(lambda: Checkpoint(checkpoint, owner) if checkpoint is not None and ranks.rank == 0 else None)
    observation = BatchObservation(
        model, given, progress=config.progress and ranks.rank == 0, ranks=ranks, checkpoint=kept[ranks.rank]
    )
    names = [site.site.name for site in observation.sites]
    for pattern, _ in config.methods:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"method: {pattern!r} matches no site; there are {', '.join(names)}")
    plan = plan_for(observation, config, offload=offload)
    if ranks.count > 1:
        ranks.agree("hashes of the plans", digest(*map(vars, plan.sites)))
    return plan


def _misplaced(unknown: dict[str, Any]) -> str:
    """What is wrong with arguments that there are not."""
    if own := [f"{name}={value!r}" for name, value in unknown.items() if name in {f.name for f in fields(Config)}]:
        return f"{', '.join(own)}: give calibrate config=Config({', '.join(own)})"
    return f"calibrate has no argument {', '.join(unknown)}: it has model, batches, config, checkpoint and offload"


def _by_site(config: Config) -> Config:
    """The config with bytes for every FFN, which is then fitted without the others.

    Raises:
        ConfigError: it asks for a decision about all of them.
    """
    if config.sequential or config.target_error is not None:
        what = "sequential" if config.sequential else "target_error"
        raise ConfigError(f"{what} needs all FFNs at once, and offload has one at a time: leave one of them out")
    for _, method in config.methods:
        if method is not None and rewrite_named(method).compares_sites:
            raise ConfigError(f"{method} compares all FFNs before it replaces one: calibrate without offload")
    return replace(config, allocation="per_site")


def plan_for(observation: Observation, config: Config, *, offload: bool = False) -> Plan:
    """Plans from an observation; several plans of one observation share what does not depend on the config.

    Args:
        observation: of the sites.
        config: what to aim at.
        offload: fit the sites one after the other, each as if it were the only one, and keep no statistics.

    Raises:
        ConfigError: as :func:`calibrate`.
        CalibrationError: as :func:`calibrate`. An error of a rewrite's own is its cause.
    """
    sites = tuple(observation.sites)
    methods = {s.fingerprint: _method_of(s.site.name, config) for s in sites}
    fold = ExactFold()
    planned = {
        s.fingerprint: plan
        for s in sites
        if methods[s.fingerprint] is not None and (plan := fold.unaided(s.site, s.parameters))
    }
    reasons: dict[str, str | None] = {}
    groups: dict[str, list[ObservedSite]] = {}
    for site in sites:
        method = methods[site.fingerprint]
        left = "left as it is by Config.method" if method is None else rewrite_named(method).refuse(site.site)
        reasons[site.fingerprint] = site.site.reason or left
        if method is not None and reasons[site.fingerprint] is None and site.fingerprint not in planned:
            groups.setdefault(method, []).append(site)
    for site in (site for group in groups.values() for site in group):
        if not all(torch.isfinite(parameter).all() for parameter in site.parameters):
            raise CalibrationError(f"the weights of {site.site.name} hold NaN or infinity")
    fits = list(groups.items())
    if offload:
        fits = [(method, [site]) for method, group in fits for site in group]
    for i, (method, group) in enumerate(fits, 1):
        label = f"FFN {i} of {len(fits)}" if offload else method
        whole = isinstance(config.method, str) and not offload
        part = observation if whole else Part(observation, group, label)
        planned |= {plan.fingerprint: plan for plan in _fitted(part, group, method, config)}
        if offload:
            part.memo.clear()
            gc.collect()  # drafts refer to themselves by what they cache
    for site in observation.sites[len(sites) :]:
        _log.warning("%s is not planned: the first batch does not reach it", site.site.name)
    entries = [planned.get(s.fingerprint) or refused(s, reasons[s.fingerprint]) for s in sites]
    return Plan(tuple(_stored_once(entries)), config)


def _fitted(observation: Observation, sites: Sequence[ObservedSite], method: str, config: Config) -> list[SitePlan]:
    """Fits a rewrite to some sites; where its error could not be measured, a site stays as it is.

    Raises:
        CalibrationError: it could not be measured at any of them.
        RewriteError: the rewrite fails.
    """
    try:
        plans = rewrite_named(method).fit(observation, sites, config)
    except RewriteError as error:
        if error.__cause__ is None:  # another rank's
            raise
        raise RewriteError(f"{error} ({_amount(observation, sites)})") from error.__cause__
    _warn_of_few(observation, sites)
    faults = [_fault(plan, observation, site) for plan, site in zip(plans, sites, strict=True)]
    if any(faults) and all(fault or plan.method is None for fault, plan in zip(faults, plans, strict=True)):
        raise CalibrationError(next(filter(None, faults)))
    for site, fault in zip(sites, faults, strict=True):
        if fault:
            _log.warning("%s is not rewritten: %s", site.site.name, fault)
    return [refused(site, fault) if fault else plan for plan, site, fault in zip(plans, sites, faults, strict=True)]


def _fault(plan: SitePlan, observation: Observation, site: ObservedSite) -> str | None:
    """Why the error that a plan states is none, or None."""
    if plan.method is None:
        return None
    if not math.isfinite(plan.error):
        return f"the error of {plan.method} is {plan.error} ({_amount(observation, [site])}): values may be too large"
    seen = observation.seen(site)
    if seen is not None and not seen.held_back:
        amount = _amount(observation, [site])
        return f"no token is held back to measure the error of {plan.method} ({amount}): batches need 8 tokens or more"
    return None


def _amount(observation: Observation, sites: Sequence[ObservedSite]) -> str:
    """Tokens, their greatest possible rank, and the number of inputs, of the site that saw least."""
    columns = max(site.weights.w1.shape[1] for site in sites)
    counts = [seen.tokens for site in sites if (seen := observation.seen(site)) is not None]
    if not counts:
        return f"{columns:,} inputs"
    return f"{min(counts):,} tokens, so a rank of {min(*counts, columns):,} at most, for {columns:,} inputs"


def _warn_of_few(observation: Observation, sites: Sequence[ObservedSite]) -> None:
    """Warns once for an observation where the tokens are few."""
    counts = [seen.tokens for site in sites if (seen := observation.seen(site)) is not None]
    wanted = max(FEW_TOKENS, *(max(site.weights.w1.shape) for site in sites))
    if counts and max(counts) < wanted and not observation.warned:
        observation.warned = True
        _log.warning(
            "calibrated on %s tokens: with fewer than %s the error on other text may be higher than the plan says; "
            "16,000 are a good number",
            f"{max(counts):,}",
            f"{wanted:,}",
        )


def _stored_once(entries: Sequence[SitePlan]) -> Iterator[SitePlan]:
    """The entries, with tensors that several of them hold counted as stored at the first of these."""
    counted: set[int] = set()
    for entry in entries:
        again = sum(t.nbytes for t in entry.tensors.values() if id(t) in counted)
        counted |= {id(t) for t in entry.tensors.values()}
        yield replace(entry, stored_bytes=entry.stored_bytes - again) if again else entry


def _method_of(name: str, config: Config) -> str | None:
    """What is to become of the site of this name."""
    return next((method for pattern, method in config.methods if fnmatchcase(name, pattern)), None)


def refused(site: ObservedSite, reason: str | None) -> SitePlan:
    """The entry of a site that is not rewritten."""
    return SitePlan.of(site.site, site.parameters, identity=site.fingerprint, reason=reason)
