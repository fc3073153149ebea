"""Checks an entry of a plan against its site before it is used.

The file that the entry was read from is not trusted.
"""

import weakref
from collections.abc import Sequence

from torch import Tensor

from tardis_fx.errors import ConfigError, PlanFileError, PlanMismatchError
from tardis_fx.graph.site import Site, SiteWeights
from tardis_fx.passes.base import Rewrite
from tardis_fx.passes.registry import rewrite_named
from tardis_fx.plan import SitePlan

# The weight shapes that each entry was checked with; one entry may serve two forms of the same weights.
_CHECKED: weakref.WeakKeyDictionary[SitePlan, set[tuple[object, ...]]] = weakref.WeakKeyDictionary()


def check_site(entry: SitePlan, site: Site, parameters: Sequence[Tensor]) -> None:
    """Checks that an entry's description of its site is true.

    Args:
        entry: found by the fingerprint of the parameters.
        site: as matched.
        parameters: of the site, in order.

    Raises:
        PlanFileError: its rewrite is not installed.
        PlanMismatchError: it is not, or its rewrite is for other sites.
    """
    shapes = tuple(tuple(parameter.shape) for parameter in parameters)
    for name, value in (("kind", site.kind), ("activation", site.activation), ("shapes", shapes)):
        if (planned := getattr(entry, name)) != value:
            raise PlanMismatchError(
                f"{site.name or 'an FFN'}: the plan's entry for these weights has {name} {planned!r:.200}, and the "
                f"model has {value!r}: the plan was changed, calibrate again"
            )
    if rewrite_of(entry).linear != (site.kind == "linear"):
        raise PlanMismatchError(
            f"{site.name or 'an FFN'}: the plan's entry names {entry.method}, which does not rewrite a site of kind "
            f"{site.kind!r}: the plan was changed, calibrate again"
        )


def rewrite_of(entry: SitePlan) -> Rewrite:
    """The rewrite that an entry names.

    Raises:
        PlanFileError: it is not installed, or is not a possible composition.
    """
    try:
        return rewrite_named(entry.method)
    except ConfigError as error:
        name = entry.name or "an FFN"
        raise PlanFileError(f"the plan's entry for {name} names an unknown rewrite: {error!s:.300}") from error


def check_entry(entry: SitePlan, weights: SiteWeights) -> None:
    """Lets an entry's rewrite check it, once for each entry.

    Args:
        entry: of a rewritten site.
        weights: of the site.

    Raises:
        PlanFileError: the rewrite is not installed, or could not have made the entry.
        PlanMismatchError: the entry is for another dtype.
    """
    name = entry.name or "an FFN"
    if entry.dtype != str(weights.up.dtype):
        raise PlanMismatchError(
            f"{name}: the plan's entry is for dtype {entry.dtype!r:.80}, the weights are {weights.up.dtype}"
        )
    shapes = tuple(None if tensor is None else tensor.shape for tensor in vars(weights).values())
    if shapes in _CHECKED.get(entry, ()):
        return
    rewrite = rewrite_of(entry)
    try:
        rewrite.validate(entry, weights)
    except Exception as error:
        raise PlanFileError(
            f"the plan's entry for {name} cannot be used by its rewrite, {rewrite.method}: "
            f"{error if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'}"
        ) from error
    _CHECKED.setdefault(entry, set()).add(shapes)
