"""Finds the smallest budget at which a rewritten model's output diverges from the dense one's by a target at most."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from tardis_fx.config import Config
from tardis_fx.errors import CalibrationError
from tardis_fx.observation.batches import Batch, real_tokens
from tardis_fx.observation.observe import BatchObservation
from tardis_fx.observation.ranks import Ranks
from tardis_fx.observation.run import Fit, drive
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import Plan
from tardis_fx.planning import fit_plan
from tardis_fx.statistics.divergence import kl_divergence, logits_of
from tardis_fx.statistics.target import minimum_budget

_log = logging.getLogger("tardis_fx")

#: The first budget that is tried.
START = 0.1


def plan_to_target(
    fitted: BatchObservation, held_back: BatchObservation, config: Config, ranks: Ranks, *, offload: bool
) -> Plan:
    """The plan of the smallest budget at which ``config.target_kl`` is met.

    Args:
        fitted: the batches that the fits see.
        held_back: other batches through the same model, on which the divergence is measured.
        config: with the target.
        ranks: that share the batches.
        offload: fit one site at a time.

    Raises:
        CalibrationError: no budget meets the target, a fit fails even with all bytes, or the model gives no logits.
    """
    target = config.target_kl
    assert target is not None
    found: dict[float, Plan] = {}

    def divergence(budget: float) -> Fit[float]:
        try:
            plan = yield from fit_plan(fitted, replace(config, budget=budget, target_kl=None), offload=offload)
        except CalibrationError:
            if budget == 1:
                raise
            return math.inf  # too small for the rewrite
        entries = {entry.fingerprint: entry for entry in plan.rewritten}
        replaced = {
            site.fingerprint: rewrite_named(entry.method).replacement(entry, site.weights)
            for site in fitted.sites
            if (entry := entries.get(site.fingerprint))
        }
        kl = _divergence(held_back, replaced, ranks)
        _log.info("a budget of %.2f%%: KL %.4g nats per token on the held-back batches", 100 * budget, kl)
        if kl <= target:  # below every budget that has met it
            found.clear()
            found[budget] = replace(plan, kl=kl)
        return kl

    search = minimum_budget("target_kl", divergence, target, START, lowest=False)
    return found[drive(fitted, search)]


def _divergence(held_back: BatchObservation, replaced: Mapping[str, Callable[[Tensor], Tensor]], ranks: Ranks) -> float:
    """KL(dense || rewritten) per token, with every token on the rewritten path.

    Raises:
        CalibrationError: the model fails, or its output has no logits, or only those of padding, NaN or infinity.
    """
    sums = ranks.attempt(lambda: [_sum(*outputs) for outputs in held_back.outputs(replaced)])
    total = sum(divergence for batches in sums for divergence, _ in batches)
    count = sum(tokens for batches in sums for _, tokens in batches)
    if not count:
        raise CalibrationError("all tokens of the held-back batches are padding: give more batches")
    if not math.isfinite(total):
        raise CalibrationError(f"the KL divergence on the held-back batches is {total}: logits hold NaN or infinity")
    return max(0.0, total / count)


def _sum(batch: Batch, dense: Any, rewritten: Any) -> tuple[float, int]:
    """Sum of the divergence over the tokens of a batch that are not padding, and their number."""
    before, after = logits_of(dense), logits_of(rewritten)
    if before is None or after is None:
        raise CalibrationError(
            f"target_kl needs logits, in the output's attribute or item of that name or as the only output, and the "
            f"model returns {type(dense).__name__}"
        )
    real = real_tokens(batch, before.shape[:-1])
    kept: list[Tensor] = [t.flatten(0, -2) for t in (before, after)]
    if real is not None:
        kept = [t[real.flatten().to(t.device)] for t in kept]
    return float(kl_divergence(kept[1], kept[0]).double().sum()), len(kept[0])
