"""A torch.compile backend that makes transformer feed-forward networks partially linear.

``plan = tardis_fx.calibrate(model, batches)``, then ``torch.compile(model, backend="tardis", options={"plan": plan})``.
"""

from tardis_fx.calibrate import calibrate
from tardis_fx.config import Config
from tardis_fx.errors import (
    CalibrationError,
    CheckpointError,
    ConfigError,
    DemoError,
    PlanFileError,
    PlanMismatchError,
    ReleasedWeightError,
    RewriteError,
    StaleWeightError,
    TardisError,
)
from tardis_fx.explain import Report, explain
from tardis_fx.finetune import finetune
from tardis_fx.heal import heal
from tardis_fx.passes.weight_guard import verify
from tardis_fx.plan import Plan
from tardis_fx.release import release
from tardis_fx.runtime.touched import count_touched

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DemoError",
    "Plan",
    "PlanFileError",
    "PlanMismatchError",
    "ReleasedWeightError",
    "Report",
    "RewriteError",
    "StaleWeightError",
    "TardisError",
    "calibrate",
    "count_touched",
    "explain",
    "finetune",
    "heal",
    "release",
    "verify",
]
