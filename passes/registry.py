"""Looks up registered rewrites and their compositions by name."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache, wraps
from importlib.metadata import entry_points
from typing import Any

from tardis_fx.config import Config
from tardis_fx.errors import ConfigError
from tardis_fx.observation.foreign import raising_typed
from tardis_fx.observation.run import Fit, Run, advance, steps
from tardis_fx.observation.site import ObservedSite
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.coded_linear import CodedLinearLayer
from tardis_fx.passes.composed import Composed
from tardis_fx.plan import Planned

#: Entry points of this group name subclasses of :class:`Rewrite`.
GROUP = "tardis_fx.passes"


@cache
def rewrite_named(method: str) -> Rewrite:
    """The registered rewrite of this name, or the composition of the rewrites joined with ``+``.

    Raises:
        ConfigError: it is not registered or not a :class:`Rewrite`, or the rewrites cannot be composed.
    """
    names = method.split("+")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"{name} appears twice in {method}: name each rewrite once")
    rewrite, *following = map(_registered, names)
    for second in following:
        rewrite = second.applied_after(rewrite) or Composed(rewrite, second)
    return rewrite


def check_rewrites(config: Config) -> None:
    """Checks every rewrite that a config names, and its options, before anything is measured.

    Raises:
        ConfigError: as :func:`rewrite_named`, or an option is unknown or out of range.
    """
    for _, method in config.methods:
        if method is not None:
            rewrite_named(method)
    for name in config.rewrites:
        rewrite = rewrite_named(name)
        if rewrite.linear:
            raise ConfigError(f"{name} rewrites linear layers outside of FFNs: give linear_bits, not method")
        rewrite.options(config)


def owners_of_options(method: str) -> dict[str, list[str]]:
    """Options of a method's rewrites, each with the names of the rewrites that have it.

    Raises:
        ConfigError: as :func:`rewrite_named`.
    """
    owners: dict[str, list[str]] = {}
    for name in method.split("+"):
        for option in fields(rewrite_named(name).Options):
            owners.setdefault(option.name, []).append(name)
    return owners


def _registered(name: str) -> Rewrite:
    registered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name == CodedLinearLayer.name:  # no method that a config could name
        rewrite: Any = CodedLinearLayer
    elif name in registered:
        rewrite = registered[name].load()
    else:
        raise ConfigError(f"no rewrite named {name!r}; registered are {', '.join(sorted(registered)) or 'none'}")
    if not (isinstance(rewrite, type) and issubclass(rewrite, Rewrite)):
        raise ConfigError(f"the entry point {name!r} of group {GROUP} is not a subclass of Rewrite: {rewrite!r}")
    with raising_typed(f"the rewrite {name!r}"):
        created: Rewrite = rewrite()
    for step in ("refuse", "constants", "forward", "parts"):
        setattr(created, step, _typed(name, step, getattr(created, step)))
    created.fit = _typed_fit(name, created.fit)  # type: ignore[method-assign]
    return created


def _typed(name: str, step: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a step of a rewrite so that its exceptions name rewrite, step and site."""

    @wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with raising_typed(f"the rewrite {name!r}: {step}{_of_sites([*args, *kwargs.values()])}"):
            return method(*args, **kwargs)

    return call


def _typed_fit(
    name: str, method: Callable[..., Fit[list[Planned]] | list[Planned]]
) -> Callable[..., Fit[list[Planned]]]:
    """Wraps ``fit``, its steps and the callbacks of its runs likewise; other errors during a run pass unchanged."""

    @wraps(method)
    def fit(sites: Sequence[ObservedSite], config: Config) -> Fit[list[Planned]]:
        where = f"the rewrite {name!r}: fit{_of_sites([sites])}"
        with raising_typed(where):
            fit = steps(method(sites, config))
            step = advance(fit)
        while isinstance(step, Run):
            answer = yield replace(step, make=_typed(name, "fit", step.make), finish=_typed(name, "fit", step.finish))
            with raising_typed(where):
                step = advance(fit, answer)
        return step.result

    return fit


def _of_sites(arguments: Sequence[Any]) -> str:
    """Names the sites among a step's arguments, for an error message."""
    values = [
        value for argument in arguments for value in (argument if isinstance(argument, (list, tuple)) else [argument])
    ]
    sites = [getattr(value, "site", value) for value in values]
    names = [site.name for site in sites if isinstance(getattr(site, "name", None), str)]
    return f" of {', '.join(names[:4])}{', …' if len(names) > 4 else ''}" if names else ""
