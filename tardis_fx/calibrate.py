"""``tardis_fx.calibrate``: a model and some text in, a plan out."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch

from tardis_fx.calibration.checkpoint import Checkpoint
from tardis_fx.calibration.observe import Batch, BatchObservation, Observation, ObservedSite, checked
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
        ConfigError: the config names no registered rewrite.
        CalibrationError: the model is in training mode, there are no batches, an input or a weight is NaN, there is
            no FFN, or the budget is smaller than the folded weights; ranks differ in what they are given or in what
            they compute, or one died.
        CheckpointError: the checkpoint is damaged, of another calibration, or cannot be written.
    """
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise ConfigError(f"config must be a tardis_fx.Config, not {type(config).__name__}")
    rewrite_named(config.method)  # before the model runs
    given, ranks, owner = checked(model, batches), Ranks.initialised(), ""
    if ranks.count > 1 or checkpoint is not None:
        owner = digest(dict(model.state_dict()), given, asdict(replace(config, progress=False)))
    ranks.agree("arithmetic", arithmetic())
    ranks.agree("hashes of model, batches and config", owner)
    kept = ranks.attempt(lambda: Checkpoint(checkpoint, owner) if checkpoint is not None and ranks.rank == 0 else None)
    observation = BatchObservation(
        model, given, progress=config.progress and ranks.rank == 0, ranks=ranks, checkpoint=kept[ranks.rank]
    )
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
    rewrite = rewrite_named(config.method)
    fold = ExactFold()
    folded = {s.fingerprint: plan for s in observation.sites if (plan := fold.unaided(s.site, s.parameters))}
    reasons = {s.fingerprint: s.site.reason or rewrite.refuse(s.site) for s in observation.sites}
    accepted = [s for s in observation.sites if s.fingerprint not in folded and reasons[s.fingerprint] is None]
    for site in accepted:
        if not all(torch.isfinite(parameter).all() for parameter in site.parameters):
            raise CalibrationError(f"the weights of {site.site.name} hold NaN or infinity")
    fitted = {plan.fingerprint: plan for plan in (rewrite.fit(observation, accepted, config) if accepted else [])}
    fitted |= folded
    return Plan(
        tuple(fitted.get(s.fingerprint) or refused(s, reasons[s.fingerprint]) for s in observation.sites), config
    )


def refused(site: ObservedSite, reason: str | None) -> SitePlan:
    """The entry of a site that is not rewritten."""
    return SitePlan.of(site.site, site.parameters, reason=reason)
