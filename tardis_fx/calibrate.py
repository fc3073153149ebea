"""``tardis_fx.calibrate``: a model and some text in, a plan out."""

from __future__ import annotations

import gc
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
    from collections.abc import Iterable, Iterator, Sequence

    from torch import nn

_log = logging.getLogger("tardis_fx")


@torch.inference_mode(mode=False)
@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    config: Config | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    offload: bool = False,
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
        offload: fit one FFN after the other, so that what is measured and fitted is in memory for one at a time. Every
            run over the batches is made once for each of them, and ``Config.allocation`` is ``"per_site"``.

    Raises:
        ConfigError: the config names no registered rewrite, rewrites that do not compose, or sites that there are not;
            with ``offload``, one that decides about all FFNs together.
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
    if offload:
        config = _by_site(config)
    given, ranks, owner = checked(model, batches), Ranks.initialised(), ""
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
    fits = list(groups.items())
    if offload:
        fits = [(method, [site]) for method, group in fits for site in group]
    for i, (method, group) in enumerate(fits, 1):
        label = f"FFN {i} of {len(fits)}" if offload else method
        whole = isinstance(config.method, str) and not offload
        part = observation if whole else Part(observation, group, label)
        planned |= {plan.fingerprint: plan for plan in rewrite_named(method).fit(part, group, config)}
        if offload:
            part.memo.clear()
            gc.collect()  # drafts refer to themselves by what they cache
    for site in observation.sites[len(sites) :]:
        _log.warning("%s is not planned: the first batch does not reach it", site.site.name)
    entries = [planned.get(s.fingerprint) or refused(s, reasons[s.fingerprint]) for s in sites]
    return Plan(tuple(_stored_once(entries)), config)


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
