"""The torch.compile backend ``"tardis"``, which rewrites FFNs and calls Inductor."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Never

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import InvalidBackend, ShortenTraceback
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import GlobalStateSource
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import is_fake

from tardis_fx.config import Config, Options
from tardis_fx.errors import ConfigError, PlanMismatchError, StaleWeightError, TardisError
from tardis_fx.graph.frozen import freeze, lift
from tardis_fx.graph.surgery import copy
from tardis_fx.live import profiles
from tardis_fx.live.profiled import ProfiledGraph, return_inputs
from tardis_fx.live.profiles import Settings, extended
from tardis_fx.live.retrace import Retrace
from tardis_fx.observation.capture import own_code
from tardis_fx.passes import pipeline, selection
from tardis_fx.passes.selection import Selection
from tardis_fx.passes.weight_guard import FrozenGraph, GuardedGraph, refuse_released
from tardis_fx.plan import Plan, resolve
from tardis_fx.runtime.cuda.dispatch import show_kernels

_log = logging.getLogger("tardis_fx")


def tardis(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """Compiles a Dynamo graph: rewrites the FFNs that a plan covers and hands the rest to Inductor.

    Used as ``torch.compile(model, backend="tardis", options={"plan": plan})``; see :class:`tardis_fx.config.Options`.

    Args:
        gm: the graph.
        example_inputs: its inputs, including parameters.
        options: see above.
        mode: passed by ``torch.compile`` if no options are given.

    Raises:
        ConfigError: an option is unknown or out of range.
        PlanFileError: the plan's file cannot be read.
        PlanMismatchError: the plan has no entry for any of the graph's sites, or ``strict`` and a site was skipped.
        StaleWeightError: a weight differs from the one that the plan was made for.
    """
    with _surfaced():
        parsed = Options(**{"mode": mode} | {str(name): value for name, value in (options or {}).items()})
    return _compile(gm, example_inputs, parsed)


def _reset() -> None:
    profiles.reset()
    selection.reset()


tardis.reset = _reset  # type: ignore[attr-defined]  # called by torch.compiler.reset()


@contextmanager
def _surfaced() -> Iterator[None]:
    """Raises errors of the package so that Dynamo passes them on, not wrapped in BackendCompilerFailed."""
    try:
        yield
    except TardisError as error:
        kind = type(error)
        names = {"__module__": kind.__module__, "__init__": Exception.__init__, "first_useful_frame": None}
        names |= {"frame_exec_strategy": None, "_torch_dynamo_tracer_output": None}  # set by TorchDynamoException
        names["remove_dynamo_frames"] = _raise_with_cause
        surfaced: type[TardisError] = type(kind.__name__, (kind, ShortenTraceback), names)
        raise surfaced(str(error)) from error.__cause__


def _raise_with_cause(error: TardisError) -> Never:
    """Replaces ``ShortenTraceback.remove_dynamo_frames``, whose result Dynamo raises without the cause."""
    raise error from error.__cause__


@_surfaced()
def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, *, nested: bool = False
) -> Callable[..., Any]:
    """Compiles a graph with the plan entries of its sites; ``nested`` leaves unknown sites alone, silently."""
    passed, example_inputs = example_inputs, _real_inputs(gm, example_inputs)
    in_parts = any(map(is_fake, passed))
    if in_parts:
        _refuse_parts(options)
    inner = _inner(options.inner, options.mode)
    plan = None if options.plan is None else resolve(options.plan)
    config = options.config or (Config() if plan is None else plan.config)
    config = dataclasses.replace(config, sequential=False, progress=False)  # no progress bars in a service
    settings = Settings(config, options.profile_tokens, options.tolerance)
    plan = extended(plan, settings) if options.observes else plan
    assert plan is not None
    if options.observes and not (nested or in_parts):
        profiled = _profiled(gm, example_inputs, plan, settings, options)
        if profiled is not None:
            return profiled
    lifted, frozen = (gm, []) if options.observes else lift(gm)
    inputs = [*example_inputs, *frozen]
    select = Selection(inner, f"{options.inner} {options.mode}", bool(frozen)) if options.select == "fastest" else None
    rewritten = pipeline.apply(lifted, inputs, plan, options.prefill or plan.config.prefill, select)
    if not (nested or (in_parts and options.observes)):
        lenient = options.observes or options.on_change == "original"
        for outcome in pipeline.check(rewritten.outcomes, plan, strict=options.strict, lenient=lenient):
            _log.warning("%s is not rewritten: %s", outcome.site.name or "an FFN", outcome.reason)
    if not rewritten.modified:
        return inner(gm, list(passed))  # type: ignore[no-any-return]
    if TracingContext.try_get() is not None:  # Dynamo does not check this, and rewritten code has no derivatives
        install_guard(GlobalStateSource().make_guard(GuardBuilder.DUAL_LEVEL))  # type: ignore[arg-type]
    if frozen:
        freeze(rewritten.gm, [*frozen, *rewritten.constants])
        sites = [(guard, [inputs[p] for p in guard.positions]) for guard in rewritten.guards]
        return FrozenGraph(inner(rewritten.gm, list(passed)), sites)
    compiled: Callable[..., Any] = inner(rewritten.gm, [*passed, *rewritten.constants])
    guarded = GuardedGraph(compiled, rewritten.guards, _Fallback(gm, options), example_inputs)
    if in_parts:
        return lambda *inputs: (
            compiled(*inputs, *rewritten.constants) if any(map(is_fake, inputs)) else guarded(*inputs)
        )
    return guarded


def _real_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """The inputs, with fake ones replaced by the real tensors that Dynamo holds.

    DistributedDataParallel cuts a graph into parts and compiles these with fake tensors for all inputs.
    """
    arguments = [node.meta.get("grapharg") for node in gm.graph.find_nodes(op="placeholder")]
    return [
        argument.example if argument is not None and is_fake(value) else value
        for argument, value in zip(arguments, example_inputs, strict=True)
    ]


def _refuse_parts(options: Options) -> None:
    """Warns that an FFN may have been cut in two.

    Raises:
        PlanMismatchError: ``strict``.
    """
    cause = "DistributedDataParallel compiles the graph in parts"
    remedy = "set torch._dynamo.config.optimize_ddp = False, which costs nothing under torch.no_grad()"
    if options.strict:
        raise PlanMismatchError(f"strict, but {cause}, and an FFN cut in two would be missed: {remedy}")
    _warn_once(f"{cause}: FFNs cut in two are not rewritten, and without a plan none is: {remedy}")


@cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _profiled(
    gm: fx.GraphModule, example_inputs: Sequence[Any], plan: Plan, settings: Settings, options: Options
) -> ProfiledGraph | None:
    """The graph with its unplanned sites observed, or None if all are planned."""
    observed = copy(gm)
    sites = [o.site for o in pipeline.outcomes(observed, example_inputs, plan) if o.plan is None and o.fits]
    if not sites:
        return None
    position = {node: i for i, node in enumerate(observed.graph.find_nodes(op="placeholder"))}
    positions = [[position[node] for node in site.parameters] for site in sites]
    for site, indices in zip(sites, positions, strict=True):
        refuse_released(site.name, [example_inputs[i] for i in indices])
    return_inputs(observed, sites)
    compiled = _inner(options.inner, options.mode)(observed, list(example_inputs))
    return ProfiledGraph(compiled, sites, positions, settings, _retraced(gm, options))


def _retraced(gm: fx.GraphModule, options: Options) -> Callable[[], Callable[..., Any] | None]:
    """A function that replaces a graph whose profiles are finished: by nothing, if Dynamo can trace its code again.

    If other threads prevent that, the graph is traced as separate code.
    """
    original, retrace = copy(gm), Retrace()
    return lambda: None if retrace() else _compiled_anew(original, partial(_compile, options=options))


class _Fallback:
    """Chooses the function to run for weights that a graph was not compiled for; see :class:`GuardedGraph`."""

    def __init__(self, gm: fx.GraphModule, options: Options) -> None:
        self._gm, self._options = copy(gm), options
        self._retraced = _retraced(gm, options) if options.observes else None
        self._variant: Callable[..., Any] | None = None

    def __call__(self, unknown: list[str], changed: bool) -> Callable[..., Any]:
        names = ", ".join(unknown)
        if unknown and self._retraced:
            _log.warning("weights changed: the original runs until %s is fitted again", names)
            return self._retraced() or self._gm.forward
        if changed and self._options.on_change == "error":
            raise StaleWeightError(
                f"{names}: a weight changed since calibration. Restore it, calibrate again and compile with the new "
                "plan, or compile with on_change='original' or on_change='refit'"
            )
        if unknown:
            if self._options.strict:
                raise PlanMismatchError(f"strict, but the plan has no entry for the weights of {names}")
            _log.warning("the plan has no entry for the weights of %s: the original runs", names)
        if self._variant is None:
            self._variant = _compiled_anew(self._gm, partial(_compile, options=self._options, nested=True))
        return self._variant


def _compiled_anew(gm: fx.GraphModule, backend: Callable[..., Any]) -> Callable[..., Any]:
    """A graph as separate code, which Dynamo compiles when it is called."""
    compiled = torch.compile(own_code(_run), backend=backend)

    def run(*inputs: Any) -> Any:
        if torch._dynamo.eval_frame._stance.stance == "fail_on_recompile":  # would fail although nothing is recompiled
            return gm(*inputs)
        return compiled(gm, inputs)

    return run


def _run(gm: fx.GraphModule, inputs: tuple[Any, ...]) -> Any:
    return gm(*inputs)


def _inner(name: str, mode: str | None) -> Callable[..., Any]:
    """The inner backend; a mode is a set of options of Inductor."""
    if name == "tardis":
        raise ConfigError("inner must name another backend, not 'tardis'")
    try:
        backend: Callable[..., Any] = lookup_backend(name)
        if name == "inductor":
            backend = partial(_with_kernels, backend)
        if mode is None:
            return backend
        if name != "inductor":
            raise ConfigError(f"mode {mode!r} needs the inner backend 'inductor', not {name!r}")
        return partial(backend, config_patches=torch._inductor.list_mode_options(mode))
    except (InvalidBackend, RuntimeError) as error:
        raise ConfigError(f"no such inner backend or mode: {name!r}, {mode!r} ({error})") from error


def _with_kernels(backend: Callable[..., Any], gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Any:
    """Calls Inductor with a graph that shows it the CUDA kernels."""
    if any(isinstance(value, Tensor) and value.is_cuda for value in inputs):
        show_kernels(gm)
    return backend(gm, inputs, **options)
