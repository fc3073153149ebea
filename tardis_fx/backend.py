"""The torch.compile backend ``"tardis"``."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import InvalidBackend, ShortenTraceback

from tardis_fx.config import Options
from tardis_fx.errors import ConfigError, TardisError
from tardis_fx.passes import pipeline
from tardis_fx.plan import resolve
from tardis_fx.runtime.guard import GuardedGraph

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, fx

_log = logging.getLogger("tardis_fx")


def tardis(
    gm: fx.GraphModule, example_inputs: list[Tensor], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compiles a Dynamo graph: rewrites the FFNs that a plan covers and hands the rest to Inductor.

    Used as ``torch.compile(model, backend="tardis", options={"plan": plan})``; see :class:`tardis_fx.config.Options`.

    Args:
        gm: the graph.
        example_inputs: its inputs, parameters among them.
        options: see above.
        mode: what ``torch.compile`` passes where no options are given.

    Raises:
        ConfigError: an option is unknown or out of range, or there is no plan.
        PlanFileError: the plan's file cannot be read.
        PlanMismatchError: the plan knows none of the graph's sites, or ``strict`` and one was left out.
    """
    try:
        parsed = Options.parse({"mode": mode} | (options or {}))
        plan = resolve(parsed.plan)
        inner = _inner(parsed.inner, parsed.mode)
        rewritten = pipeline.apply(gm, example_inputs, plan, parsed.prefill or plan.config.prefill)
        left = pipeline.check(rewritten.outcomes, plan, strict=parsed.strict)
    except TardisError as error:
        raise _surfaced(error) from error.__cause__
    for outcome in left:
        _log.warning("%s is not rewritten: %s", outcome.site.name or "an FFN", outcome.reason)
    compiled = inner(rewritten.gm, [*example_inputs, *rewritten.constants])
    return GuardedGraph(compiled, rewritten.guards) if rewritten.modified else compiled


def _inner(name: str, mode: str | None) -> Callable[..., Any]:
    """The inner backend; a mode is Inductor's, and stands for some of its options."""
    if name == "tardis":
        raise ConfigError("inner must be another backend than 'tardis'")
    try:
        backend: Callable[..., Any] = lookup_backend(name)
        if mode is None:
            return backend
        if name != "inductor":
            raise ConfigError(f"mode {mode!r} needs the inner backend 'inductor', not {name!r}")
        return partial(backend, config_patches=torch._inductor.list_mode_options(mode))
    except (InvalidBackend, RuntimeError) as error:
        raise ConfigError(f"no such inner backend or mode: {name!r}, {mode!r} ({error})") from error


def _surfaced(error: TardisError) -> TardisError:
    """The same error in a form that Dynamo raises as it is, not wrapped in BackendCompilerFailed."""
    kind = type(error)
    names = {"__module__": kind.__module__, "__init__": Exception.__init__, "first_useful_frame": None}
    surfaced: type[TardisError] = type(kind.__name__, (kind, ShortenTraceback), names)
    return surfaced(str(error))
