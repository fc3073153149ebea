"""Plans whose rewrites read no matrix of the model, and models compiled with them."""

from typing import Any

import torch
from torch import nn

import tardis_fx
from builders.ffns import config, inputs
from tardis_fx import Plan

D, HIDDEN = 16, 64


def planned(model: nn.Module, **changes: Any) -> Plan:
    settings = {"budget": 0.6, "prefill": "rewritten", "fold_bits": 8, "row_bits": 8} | changes
    return tardis_fx.calibrate(model, [inputs(512, D)], config=config(**settings))


def compiled(model: nn.Module, plan: Plan, **options: Any) -> Any:
    arguments: dict[str, Any] = {"plan": plan, "inner": "eager", "strict": True} | options
    return torch.compile(model, backend="tardis", options=arguments)
