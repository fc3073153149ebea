"""``tardis_fx.calibrate``: makes a plan from a model and calibration text."""

import os
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Never

import torch
from torch import nn

from tardis_fx.config import MOVED, Config
from tardis_fx.digest import digest
from tardis_fx.errors import ConfigError
from tardis_fx.observation.batches import Batch, checked, split, uncompiled
from tardis_fx.observation.checkpoint import Checkpoint
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.ranks import Ranks, arithmetic
from tardis_fx.passes.registry import check_rewrites, rewrite_named
from tardis_fx.plan import Plan
from tardis_fx.planning import plan_for
from tardis_fx.target_kl import plan_to_target


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

    With ``Config.linear_bits``, the linear layers outside of FFNs are planned from the same batches.

    Memory beyond the model: the batches, and for each site sums whose size does not depend on the text (see Concepts).

    If ``torch.distributed`` is initialised, all its ranks must call this with the same model, batches and config: each
    runs its share of the batches, and all return the same plan.

    Args:
        model: in eval mode; it is neither changed nor compiled for later use. For a compiled model, the original is
            used.
        batches: each a tensor, the model's first argument, or a dict of keyword arguments. 16,000 tokens or more; a
            warning is logged for fewer than 2,048, or than the columns of the widest matrix. Padding is excluded if
            ``attention_mask`` or ``decoder_attention_mask``, [batch, tokens], marks it.
        config: how to fit; None means the defaults.
        checkpoint: a folder for the statistics of finished runs over the batches. An interrupted calibration that is
            given the same folder resumes after the last finished run.
        offload: fit one FFN at a time, so that statistics and fits of only one are in memory. Every run over the
            batches is then made once for each FFN, and ``Config.allocation`` is ``"per_site"``.
        unknown: refused; fields of the config belong in ``Config(...)``.

    Raises:
        ConfigError: the config names an unregistered rewrite, rewrites that cannot be composed, or sites that do not
            exist; with ``offload``, a rewrite that compares all FFNs; an argument is unknown.
        CalibrationError: the model is not a module, on the meta device or in training mode, or fails; there are no
            batches, or the model does not take one; an input or a weight is NaN, there is no FFN, or the budget is
            smaller than the folded weights; a target is out of reach, or the model has no logits or only one batch to
            measure ``target_kl`` with; a rewrite fails, or these tokens do not suffice to measure any error; ranks have
            different inputs or results, or one died.
        CheckpointError: the checkpoint is damaged, belongs to another calibration, or cannot be written.
    """
    if unknown:
        raise ConfigError(_misplaced(unknown))
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise ConfigError(f"config must be a tardis_fx.Config, not {type(config).__name__}")
    check_rewrites(config)  # before the model runs
    if offload:
        config = _by_site(config)
    ranks = Ranks.initialised()
    with ranks.together():
        model, owner, first = uncompiled(model), "", ranks.rank == 0
        batches = checked(model, batches)
        if ranks.count > 1 or checkpoint is not None:
            owner = digest(dict(model.state_dict()), batches, asdict(replace(config, progress=False)), offload)
        ranks.agree("arithmetic", arithmetic())
        ranks.agree("hashes of model, batches and config", owner)
        folders = ranks.attempt(lambda: Checkpoint(checkpoint, owner) if checkpoint is not None and first else None)
        fitted, held_back = (batches, []) if config.target_kl is None else split(batches)
        linear, progress = config.linear_bits is not None, config.progress and first
        observation = BatchObservation(
            model, fitted, progress=progress, ranks=ranks, checkpoint=folders[ranks.rank], linear=linear
        )
        names = [site.site.name for site in observation.sites if site.site.kind != "linear"]
        for pattern, _ in config.methods:
            if pattern != "*" and not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(f"method: {pattern!r} matches no site; there are {', '.join(names)}")
        if config.target_kl is None:
            plan = plan_for(observation, config, offload=offload)
        else:
            measured = BatchObservation(model, held_back, progress=False, ranks=ranks, linear=linear)
            plan = plan_to_target(observation, measured, config, ranks, offload=offload)
        if ranks.count > 1:
            ranks.agree("hashes of the plans", digest(*map(vars, plan.sites)))
        return plan


def _misplaced(unknown: dict[str, Any]) -> str:
    """Error message for unknown arguments."""
    if moved := {name: value for name, value in unknown.items() if name in MOVED}:
        return f"{', '.join(moved)}: give calibrate config=Config(options={moved!r})"
    if known := [f"{name}={value!r}" for name, value in unknown.items() if name in {f.name for f in fields(Config)}]:
        return f"{', '.join(known)}: give calibrate config=Config({', '.join(known)})"
    return f"calibrate has no argument {', '.join(unknown)}: it has model, batches, config, checkpoint and offload"


def _by_site(config: Config) -> Config:
    """The config with a separate budget for every FFN, so that each is fitted without the others.

    Raises:
        ConfigError: the config needs all FFNs at once.
    """
    if config.sequential or config.target_error is not None:
        option = "sequential" if config.sequential else "target_error"
        raise ConfigError(f"{option} needs all FFNs at once, and offload has one at a time: leave one of them out")
    for _, method in config.methods:
        if method is not None and rewrite_named(method).compares_sites:
            raise ConfigError(f"{method} compares all FFNs before it replaces one: calibrate without offload")
    return replace(config, allocation="per_site")
