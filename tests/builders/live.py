"""Models that are compiled without a plan, and the calls that they serve."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from builders.ffns import inputs
from tardis_fx import Config

TOKENS = 1024
CONFIG = Config(method="guarded_fold", budget=0.5, prefill="rewritten", progress=False)


def compiled(model: Any, **options: Any) -> Any:
    given: Any = {"config": CONFIG, "inner": "eager", "profile_tokens": TOKENS, "tolerance": 0.5} | options
    return torch.compile(model, backend="tardis", options=given, fullgraph=True)


def serve(model: Callable[..., Any], calls: int, tokens: int = 256, seed: int = 0) -> list[Tensor]:
    return [model(inputs(tokens, 16, seed=seed + i)) for i in range(calls)]


RUNS = 4  # of the guarded fold: input moments, hot ranges, residuals, check
ENOUGH = RUNS * TOKENS // 256
