"""The weight guard: folded constants are chosen by the weights that a call passes, never by the graph alone.

Dynamo lifts parameters to inputs and may run one graph for several modules. At every call the weights of all sites are
looked up by address and version. Unknown ones are fingerprinted; where the plan knows them they get constants of their
own, else the call is not answered from a fold at all.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tardis_fx.errors import PlanMismatchError, StaleWeightError
from tardis_fx.graph.site import Site, SiteWeights, is_released

if TYPE_CHECKING:
    from tardis_fx.passes.base import Rewrite
    from tardis_fx.plan import SitePlan

#: The entry of a site with certain weights, or None.
Find = Callable[[Site, Sequence[Tensor]], "SitePlan | None"]

_version = attrgetter("_version")
_address = Tensor.data_ptr


@dataclass(frozen=True, eq=False)
class Constants:
    """One site's constants, shared by all graphs of the same entry and weights; holds the entry, whose id finds it."""

    entry: SitePlan
    tensors: dict[str, Tensor]


_SHARED: weakref.WeakValueDictionary[tuple[int, ...], Constants] = weakref.WeakValueDictionary()


class SiteGuard:
    """Makes one site's constants.

    Attributes:
        positions: of the site's parameters among the graph's inputs.
        name: of the site.
    """

    def __init__(
        self, site: Site, positions: Sequence[int], compiled_for: SitePlan, find: Find, rewrite: Rewrite
    ) -> None:
        """Prepares the guard.

        Args:
            site: as matched.
            positions: of the site's parameters among the graph's inputs.
            compiled_for: the entry that the graph was built for.
            find: the entry of other weights of the site, or None.
            rewrite: makes the constants.
        """
        self.positions, self.name = tuple(positions), compiled_for.name
        self._site, self._compiled_for, self._find, self._rewrite = site, compiled_for, find, rewrite

    def entry(self, weights: Sequence[Tensor]) -> SitePlan | None:
        """What is planned for these weights, or None where nothing is known of them."""
        return self._find(self._site, weights)

    def fits(self, entry: SitePlan) -> bool:
        """Whether the graph does what an entry plans."""
        return (entry.method, entry.settings) == (self._compiled_for.method, self._compiled_for.settings)

    def constants(self, entry: SitePlan, weights: Sequence[Tensor]) -> Constants:
        """The tensors that an entry makes of weights."""
        key = (id(entry), *map(_address, weights), *_versions(weights))
        found = _SHARED.get(key)
        if found is None:
            found = Constants(entry, self._rewrite.constants(entry, SiteWeights.of(self._site, weights)))
            _SHARED[key] = found
        return found


@dataclass(frozen=True)
class _Known:
    """One set of weights of a graph; the aliases keep the addresses from another's use."""

    versions: tuple[int, ...]
    aliases: tuple[Tensor, ...]
    tensors: tuple[weakref.ref[Tensor], ...]
    shared: tuple[Constants, ...]
    constants: tuple[Tensor, ...]
    run: Callable[..., Any]

    @property
    def alive(self) -> bool:
        """Whether all weights still exist."""
        return all(ref() is not None for ref in self.tensors)


@dataclass(frozen=True)
class Unknown:
    """A site whose weights nothing is known of.

    Attributes:
        name: of the site that the graph was built for.
        changed: the call's weights have taken the place of known ones; else they are another module's.
    """

    name: str
    changed: bool


class GuardedGraph:
    """A compiled graph whose constants are passed as further inputs, chosen anew at every call."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        guards: Sequence[SiteGuard],
        other: Callable[[list[Unknown]], Callable[..., Any]],
        example_inputs: Sequence[Any],
    ) -> None:
        """Joins a compiled graph and the guards of its sites, in the order of their constants.

        Args:
            compiled: the graph.
            guards: one a rewritten site.
            other: what runs in its place for weights that it was not compiled for, given the sites of unknown weights,
                of which there may be none; may raise.
            example_inputs: what the graph was compiled with.
        """
        self._compiled, self._guards, self._other = compiled, tuple(guards), other
        self._weights: Callable[[Sequence[Any]], tuple[Tensor, ...]] = itemgetter(
            *(position for guard in guards for position in guard.positions)
        )
        self._known: dict[tuple[int, ...], _Known] = {}
        self._admit(example_inputs)

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph.

        Raises:
            StaleWeightError: a weight was changed in place, or another one took its place.
        """
        weights = self._weights(inputs)
        known = self._known.get(tuple(map(_address, weights)))
        if known is None or known.versions != _versions(weights):
            known = self._admit(inputs)
        return known.run(*inputs, *known.constants)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _admit(self, inputs: Sequence[Any]) -> _Known:
        weights = self._weights(inputs)
        versions = _versions(weights)  # before the contents are read
        sites = [(guard, tuple(inputs[position] for position in guard.positions)) for guard in self._guards]
        entries = [guard.entry(own) for guard, own in sites]
        run, shared = self._compiled, []
        for (guard, own), entry in zip(sites, entries, strict=True):
            if entry is not None and guard.fits(entry):
                shared.append(guard.constants(entry, own))
        if len(shared) < len(sites):
            unknown = [guard for guard, entry in zip(self._guards, entries, strict=True) if entry is None]
            for guard, own in sites:
                refuse_released(guard.name, own)
            run, shared = self._other([Unknown(guard.name, self._changed(weights)) for guard in unknown]), []
        self._known = {key: known for key, known in self._known.items() if known.alive}
        known = self._known[tuple(map(_address, weights))] = _Known(
            versions,
            tuple(weight.detach() for weight in weights),
            tuple(map(weakref.ref, weights)),
            tuple(shared),
            tuple(tensor for one in shared for tensor in one.tensors.values()),
            run,
        )
        return known

    def _changed(self, weights: Sequence[Tensor]) -> bool:
        """Whether weights took the place of known ones: they share a tensor with them, or the known ones are gone."""
        return any(
            not known.alive or any(ref() is weight for ref in known.tensors for weight in weights)
            for known in self._known.values()
        )


class FrozenGraph:
    """A compiled graph with its weights inside, as Inductor's freezing leaves it."""

    def __init__(self, compiled: Callable[..., Any], weights: Sequence[Tensor]) -> None:
        """Notes addresses and versions of the weights.

        Args:
            compiled: the graph.
            weights: of its rewritten sites.
        """
        self._compiled, self._weights = compiled, tuple(weights)
        self._made_from = self._state

    @property
    def _state(self) -> tuple[int, ...]:
        return (*map(_address, self._weights), *_versions(self._weights))

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph.

        Raises:
            StaleWeightError: a weight was written to, or its data replaced.
        """
        if self._state != self._made_from:
            raise StaleWeightError("a weight changed, and freezing holds copies: call torch.compiler.reset() first")
        return self._compiled(*inputs)


def refuse_released(name: str, weights: Sequence[Tensor], reason: str = "its plan does not apply") -> None:
    """Nothing, or an error where a site would run as it was, and cannot.

    Raises:
        PlanMismatchError: a weight was released.
    """
    if any(map(is_released, weights)):
        raise PlanMismatchError(f"{name} would run with its original weights, which were released: {reason}")


def _versions(weights: Sequence[Tensor]) -> tuple[int, ...]:
    try:
        return tuple(map(_version, weights))
    except RuntimeError as error:
        raise StaleWeightError(f"a weight is an inference tensor, whose changes cannot be noticed: {error}") from error
