"""Every error that a user of tardis_fx can cause."""

from pydantic import ValidationError


class TardisError(Exception):
    """Base of all errors raised for bad input, a bad file, or a model that a plan does not fit."""


class ConfigError(TardisError, ValueError):
    """An option is unknown, of the wrong type, or out of range."""


class CalibrationError(TardisError, ValueError):
    """The model or the calibration batches cannot be used: training mode, no batches, no site, NaN or infinity."""


class PlanFileError(TardisError, ValueError):
    """A plan file is missing, damaged, foreign or of another version, or its rewrite does not make such an entry."""


class CheckpointError(TardisError, ValueError):
    """A checkpoint is damaged, cannot be written, or belongs to another model or plan, other batches or settings."""


class PlanMismatchError(TardisError, ValueError):
    """A plan was made for weights, a dtype or a device other than the model's."""


class StaleWeightError(PlanMismatchError):
    """A weight changed after the plan was made or after the model was compiled."""


class ReleasedWeightError(TardisError, RuntimeError):
    """Weights that :func:`tardis_fx.release` freed are about to be saved, copied or read."""


class RewriteError(TardisError, RuntimeError):
    """A rewrite raised an unexpected exception, which is the cause of this one."""


class DemoError(TardisError, RuntimeError):
    """The demo cannot run here: a library or the standard library's source is missing."""


class BenchError(TardisError, RuntimeError):
    """The comparison cannot run here: a library or memory is missing, or a file cannot be written."""


class ServingError(TardisError, RuntimeError):
    """A plan cannot be served with this model, or with the options of the engine."""


def reasons(error: ValidationError) -> str:
    """The errors that pydantic found, in a user's words: each names a field, its value and the allowed values."""
    lines = []
    for detail in error.errors():
        name, rule = ".".join(map(str, detail["loc"])), detail["msg"].replace("Input should", "must")
        lines.append(f"{name} {rule.removeprefix('Value error, ')}, not {detail['input']!r:.80}")
    return "; ".join(lines)
