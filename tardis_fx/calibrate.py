"""``tardis_fx.calibrate``: a model and some text in, a plan out."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch

from tardis_fx.calibration.checkpoint import Checkpoint
from tardis_fx.calibration.observe import Batch, BatchObservation, Observation, ObservedSite, checked
from tardis_fx.calibration.part import Part
from tardis_fx.calibration.ranks import Ranks, arithmetic
from tardis_fx.config import Config
from tardis_fx.digest import digest
from tardis_fx.errors import CalibrationError, ConfigError
from tardis_fx.passes.base import rewrite_named
from tardis_fx.passes.exact_fold import ExactFold
from tardis_fx.plan import Plan, SitePlan

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from torch import nn

_log = logging.getLogger("tardis_fx")


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    config: Config | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Plan:
    """Runs a model on calibration batches and plans a rewrite for every FFN in it.

    Memory beyond the model's: the batches, and for each site sums of a size that no text changes (see Concepts).

    Where ``torch.distributed`` is initialised, all its ranks must call this with the same model, batches and config:
    each runs its share of the batches, and all return the same plan.

    Args:
        model: in eval mode; it is neither changed nor compiled for later use.
        batches: each a tensor, the model's first argument, or a dict of keyword arguments. 16,000 tokens or more.
        config: what to aim at; the defaults when None.
        checkpoint: a folder for the statistics of finished runs over the batches. Given again after an interruption,
            the calibration goes on behind them.

    Raises:
        ConfigError: the config names no registered rewrite, rewrites that do not compose, or sites that there are not.
        CalibrationError: the model is in training mode, there are no batches, an input or a weight is NaN, there is
            no FFN, or the budget is smaller than the folded weights; ranks differ in what they are given or in what
            they compute, or one died.
        CheckpointError: the checkpoint is damaged, of another calibration, or cannot be written.
    """
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise ConfigError(f"config must be a tardis_fx.Config, not {type(config).__name__}")
    for _, method in config.methods:
        if method is not None:
            rewrite_named(method)  # before the model runs
    given, ranks, owner = checked(model, batches), Ranks.initialised(), ""
    if ranks.count > 1 or checkpoint is not None:
        owner = digest(dict(model.state_dict()), given, asdict(replace(config, progress=False)))
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
    plan = plan_for(observation, config)
    if ranks.count > 1:
        ranks.agree("hashes of the plans", digest(*map(vars, plan.sites)))
    return plan


def plan_for(observation: Observation, config: Config) -> Plan:
    """Plans from an observation; several plans of one observation share what does not depend on the config.

    Raises:
        ConfigError: as :func:`calibrate`.
        CalibrationError: as :func:`calibrate`.
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
    for method, group in groups.items():
        part = observation if isinstance(config.method, str) else Part(observation, group, method)
        planned |= {plan.fingerprint: plan for plan in rewrite_named(method).fit(part, group, config)}
    for site in observation.sites[len(sites) :]:
        _log.warning("%s is not planned: the first batch does not reach it", site.site.name)
    return Plan(tuple(planned.get(s.fingerprint) or refused(s, reasons[s.fingerprint]) for s in sites), config)


def _method_of(name: str, config: Config) -> str | None:
    """What is to become of the site of this name."""
    return next((method for pattern, method in config.methods if fnmatchcase(name, pattern)), None)


def refused(site: ObservedSite, reason: str | None) -> SitePlan:
    """The entry of a site that is not rewritten."""
    return SitePlan.of(site.site, site.parameters, reason=reason)
