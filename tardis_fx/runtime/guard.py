"""The weight guard: folded constants are chosen by the weights that a call passes, never by the graph alone.

Dynamo lifts parameters to inputs and may run one graph for several modules. At every call each site's weights are
looked up by address and version. Unknown ones are fingerprinted and must be in the plan; there they get constants of
their own, else the call is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tardis_fx.errors import PlanMismatchError, StaleWeightError
from tardis_fx.fingerprint import fingerprint
from tardis_fx.graph.site import Site, SiteWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from tardis_fx.passes.base import Rewrite
    from tardis_fx.plan import Plan, SitePlan


@dataclass(frozen=True)
class _Entry:
    """Constants of one set of weights; the aliases keep the addresses from being used again."""

    versions: tuple[int, ...]
    aliases: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]


class SiteGuard:
    """Chooses one site's constants.

    Attributes:
        names: of the constants, in the order in which they are passed to the graph.
    """

    def __init__(
        self, site: Site, positions: Sequence[int], compiled_for: SitePlan, plan: Plan, rewrite: Rewrite
    ) -> None:
        """Prepares the guard; :meth:`constants` does the work.

        Args:
            site: as matched.
            positions: of the site's parameters among the graph's inputs.
            compiled_for: the entry of the plan that the graph was built for.
            plan: where entries of other weights are looked for.
            rewrite: makes the constants.
        """
        self.names: tuple[str, ...] = ()
        self._site, self._positions, self._compiled_for, self._plan, self._rewrite = (
            site,
            tuple(positions),
            compiled_for,
            plan,
            rewrite,
        )
        self._entries: dict[tuple[int, ...], _Entry] = {}

    def constants(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """The constants that belong to the weights among a call's inputs.

        Raises:
            StaleWeightError: a weight was changed in place, or another one took its place, and the plan has no entry.
        """
        weights = [inputs[i] for i in self._positions]
        key = tuple([weight.data_ptr() for weight in weights])
        entry = self._entries.get(key)
        if entry is not None and all(w._version == v for w, v in zip(weights, entry.versions)):  # noqa: B905 - hot path
            return entry.constants
        return self._admit(key, weights).constants

    def _admit(self, key: tuple[int, ...], weights: list[Tensor]) -> _Entry:
        versions = tuple(weight._version for weight in weights)  # before the contents are read
        found = self._plan.find(fingerprint(weights))
        if found is None or found.method is None:
            self._entries.pop(key, None)
            raise StaleWeightError(
                f"{self._compiled_for.name}: a weight is not the one that the plan was made for "
                f"({', '.join(node.name for node in self._site.parameters)}): it changed since calibration. "
                f"Restore it, or calibrate again and compile with the new plan"
            )
        if (found.method, found.settings) != (self._compiled_for.method, self._compiled_for.settings):
            raise PlanMismatchError(
                f"{found.name} and {self._compiled_for.name} share a graph, but the plan rewrites them differently"
            )
        constants = self._rewrite.constants(found, SiteWeights.of(self._site, weights))
        self.names = tuple(constants)
        entry = _Entry(versions, tuple(w.detach() for w in weights), tuple(constants.values()))
        self._entries[key] = entry
        return entry


class GuardedGraph:
    """A compiled graph whose constants are passed as further inputs, chosen anew at every call."""

    def __init__(self, compiled: Callable[..., Any], guards: Sequence[SiteGuard]) -> None:
        """Joins a compiled graph and the guards of its sites, in the order of their constants."""
        self._compiled, self._guards = compiled, tuple(guards)

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph.

        Raises:
            StaleWeightError: see :meth:`SiteGuard.constants`.
        """
        constants: list[Tensor] = []
        for guard in self._guards:
            constants += guard.constants(inputs)
        return self._compiled(*inputs, *constants)
