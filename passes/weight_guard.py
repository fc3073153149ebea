"""The weight guard: chooses folded constants by the weights that a call passes, never by the graph alone.

Dynamo lifts parameters to inputs and may run one graph for several modules. At every call the weights of all sites are
looked up by identity and compared with an earlier snapshot (:mod:`tardis_fx.runtime.snapshot`). Unknown weights are
fingerprinted; if the plan knows them they get their own constants, otherwise the call does not use a fold.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tardis_fx.errors import ConfigError, PlanMismatchError, StaleWeightError
from tardis_fx.graph.site import Site, SiteWeights, is_released
from tardis_fx.passes.base import Rewrite
from tardis_fx.plan import Planned, SitePlan
from tardis_fx.runtime.fingerprint import content_hash, fingerprint
from tardis_fx.runtime.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Constants:
    """One site's constants, shared by all graphs of the same entry and weights.

    Attributes:
        entry: held because its id identifies the constants.
        weights: snapshot of the weights that they were made from.
        tensors: the constants, by name.
    """

    entry: SitePlan
    weights: Snapshot
    tensors: dict[str, Tensor]


_SHARED: weakref.WeakValueDictionary[tuple[int, ...], Constants] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class SiteGuard:
    """Makes and shares the constants of one site.

    Attributes:
        site: as matched.
        positions: of the site's parameters among the graph's inputs.
        compiled_for: the entry that the graph was built for.
        find: finds the entry of a site with given weights, or None.
        rewrite: makes the constants.
    """

    site: Site
    positions: tuple[int, ...]
    compiled_for: SitePlan
    find: Callable[[Site, Sequence[Tensor]], Planned | None]
    rewrite: Rewrite

    @property
    def name(self) -> str:
        """Name of the site."""
        return self.compiled_for.name

    def fits(self, entry: Planned) -> TypeGuard[SitePlan]:
        """Whether the graph implements an entry: same type, method and settings."""
        built = self.compiled_for
        return isinstance(entry, type(built)) and (entry.method, entry.settings) == (built.method, built.settings)

    def constants(self, entry: SitePlan, weights: Sequence[Tensor]) -> Constants:
        """The constants for an entry and weights, shared with other graphs."""
        key = (id(entry), *map(id, weights))
        shared = _SHARED.get(key)
        if shared is None or not shared.weights.holds_throughout(weights):
            snapshot = Snapshot(weights)  # before the contents are read
            constants = self.rewrite.constants(entry, SiteWeights.from_site(self.site, weights))
            shared = _SHARED[key] = Constants(entry, snapshot, constants)
        return shared

    def made_for(self, entry: SitePlan, weights: Sequence[Tensor]) -> bool:
        """Whether weights are bit for bit those that an entry was made for; reads all of them."""
        identify = fingerprint if any(map(is_released, weights)) else content_hash
        return identify(weights, self.site.function) == entry.fingerprint


@dataclass(frozen=True)
class _Known:
    """One set of weights of a graph with its constants."""

    weights: Snapshot
    shared: tuple[Constants, ...]
    constants: tuple[Tensor, ...]
    run: Callable[..., Any]


class GuardedGraph:
    """A compiled graph that receives constants, chosen at every call, as further inputs."""

    def __init__(
        self,
        compiled: Callable[..., Any],
        guards: Sequence[SiteGuard],
        fallback: Callable[[list[str], bool], Callable[..., Any]],
        example_inputs: Sequence[Any],
    ) -> None:
        """Combines a compiled graph with the guards of its sites, in the order of their constants.

        Args:
            compiled: the graph.
            guards: one for each rewritten site.
            fallback: returns the function to run for weights that the graph was not compiled for, given the names of
                the sites with unknown weights, possibly none, and whether these have replaced known ones or belong to
                another module; may raise.
            example_inputs: inputs that the graph was compiled with.
        """
        self._compiled, self._guards, self._fallback = compiled, tuple(guards), fallback
        self._weights: Callable[[Sequence[Any]], tuple[Tensor, ...]] = itemgetter(
            *(position for guard in guards for position in guard.positions)
        )
        self._known: dict[tuple[int, ...], _Known] = {}
        self._admit(example_inputs)
        _GRAPHS.add(self)

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph with the constants of the weights.

        Raises:
            StaleWeightError: a weight was changed in place or replaced.
        """
        weights = self._weights(inputs)
        known = self._known.get(tuple(map(id, weights)))
        if known is None or not known.weights.holds(weights):
            known = self._admit(inputs)
        return known.run(*inputs, *known.constants)

    def served(self, tensors: Mapping[int, Tensor]) -> Iterator[tuple[SiteGuard, SitePlan, list[Tensor]]]:
        """The sites that ran with constants made from these tensors, by id, with their entries and weights."""
        for known in list(self._known.values()):
            if not known.weights.alive:  # other tensors may have their ids by now
                continue
            ids = iter(known.weights.ids)
            for guard, constants in zip(self._guards, known.shared, strict=False):  # none if the original ran
                members = [tensors.get(next(ids)) for _ in guard.positions]
                if len(weights := [tensor for tensor in members if tensor is not None]) == len(members):
                    yield guard, constants.entry, weights

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def _admit(self, inputs: Sequence[Any]) -> _Known:
        weights = self._weights(inputs)
        snapshot = Snapshot(weights)  # before the contents are read
        run, shared, unknown = self._compiled, [], []
        sites = [(guard, [inputs[position] for position in guard.positions]) for guard in self._guards]
        for guard, site_weights in sites:
            entry = guard.find(guard.site, site_weights)
            if entry is None:
                unknown.append(guard.name)
            elif guard.fits(entry):
                shared.append(guard.constants(entry, site_weights))
        if len(shared) < len(sites):
            for guard, site_weights in sites:
                refuse_released(guard.name, site_weights)
            run, shared = self._fallback(unknown, bool(unknown) and self._changed(weights)), []
        constants = tuple(tensor for site in shared for tensor in site.tensors.values())
        known = _Known(snapshot, tuple(shared), constants, run)
        for key in [key for key, entry in list(self._known.items()) if not entry.weights.alive]:
            self._known.pop(key, None)  # in place: Dynamo's wrapper around this object copies its attributes
        self._known[tuple(map(id, weights))] = known
        return known

    def _changed(self, weights: Sequence[Tensor]) -> bool:
        """Whether weights replace known ones: they share a tensor with them, or the known ones no longer exist."""
        return any(
            not known.weights.alive or not {*known.weights.ids}.isdisjoint(map(id, weights))
            for known in list(self._known.values())
        )


class FrozenGraph:
    """A compiled graph that contains its weights, as made by Inductor's freezing."""

    def __init__(self, compiled: Callable[..., Any], sites: Sequence[tuple[SiteGuard, Sequence[Tensor]]]) -> None:
        """Takes a snapshot of the weights of the rewritten sites."""
        self._compiled, self._sites = compiled, list(sites)
        self._weights = tuple(weight for _, weights in sites for weight in weights)
        self._made_from = Snapshot(self._weights)
        _GRAPHS.add(self)

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph with the constants of the weights.

        Raises:
            StaleWeightError: a weight was written to, or its data was replaced.
        """
        if not self._made_from.holds(self._weights):
            raise StaleWeightError("a weight changed, but freezing holds copies: call torch.compiler.reset() first")
        return self._compiled(*inputs)

    def served(self, tensors: Mapping[int, Tensor]) -> Iterator[tuple[SiteGuard, SitePlan, list[Tensor]]]:
        """See :meth:`GuardedGraph.served`."""
        for guard, weights in self._sites:
            if all(id(weight) in tensors for weight in weights):
                yield guard, guard.compiled_for, list(weights)


_GRAPHS: weakref.WeakSet[GuardedGraph | FrozenGraph] = weakref.WeakSet()


@torch.no_grad()
def verify(compiled: nn.Module) -> list[str]:
    """Checks bit for bit that the weights of a model's rewritten FFNs are those that the plan was made for.

    A call only compares versions and a few cache lines of each weight. This function also finds a write that PyTorch
    does not count and that changed only a small part of a weight. The next call then finds the changed weights as well.

    Args:
        compiled: a model that has run, compiled or with compiled parts.

    Returns:
        Names of the FFNs that were compared.

    Raises:
        ConfigError: ``compiled`` is not a module.
        PlanMismatchError: no rewritten FFN of the model has run.
        StaleWeightError: weights differ from those that the plan was made for.
    """
    if not isinstance(compiled, nn.Module):
        raise ConfigError(f"verify takes the compiled model, not {type(compiled).__name__}")
    tensors = {id(tensor): tensor for tensor in (*compiled.parameters(), *compiled.buffers())}
    compared: dict[str, bool] = {}
    for graph in list(_GRAPHS):
        for guard, entry, weights in graph.served(tensors):
            same = guard.made_for(entry, weights)
            compared[entry.name] = compared.get(entry.name, True) and same
            if not same:
                torch.autograd.graph.increment_version(weights)
    if not compared:
        raise PlanMismatchError("no rewritten FFN of this model has run: compile it with a plan and call it once")
    if changed := [name for name, same in compared.items() if not same]:
        raise StaleWeightError(f"{', '.join(changed)}: the weights are not those that the plan was made for")
    return list(compared)


def refuse_released(name: str, weights: Sequence[Tensor], reason: str = "its plan does not apply") -> None:
    """Raises an error if a site would run with its original weights but they were released.

    Raises:
        PlanMismatchError: a weight was released.
    """
    if any(map(is_released, weights)):
        raise PlanMismatchError(f"{name} would run with its original weights, which were released: {reason}")
