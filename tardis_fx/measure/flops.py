"""FLOPs of the rewritten sites if every token takes them, as in a prefill with ``prefill="rewritten"``."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from tardis_fx.observation.run import Observation
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import Plan, SitePlan
from tardis_fx.runtime import flops  # noqa: F401 - the correction op's formula

#: Number of tokens to run: too many for a decode step.
TOKENS = 32


@torch.no_grad()
def prefill_share(plan: Plan, observation: Observation) -> float:
    """FLOPs of a plan made from the observation, relative to the original sites; refused sites count in full."""
    total = dense = 0
    for site in observation.sites:
        original = 2 * TOKENS * sum(p.numel() for p in site.parameters if p.dim() == 2)
        dense += original
        entry = plan.find(site.fingerprint)
        if not isinstance(entry, SitePlan):
            total += original
            continue
        rewrite = rewrite_named(entry.method)
        x = site.weights.up.new_zeros(TOKENS, site.weights.up.shape[1])
        constants = rewrite.constants(entry, site.weights)
        with FlopCounterMode(display=False) as counter:
            rewrite.forward(x, constants, entry)
        total += counter.get_total_flops()
    return total / dense
