"""A part of an observation: some of its sites, with runs and a memory of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tardis_fx.observation.observe import Observation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tardis_fx.observation.observe import O, ObservedSite, Seen


class Part(Observation):
    """What a rewrite gets to see that shares an observation with others.

    Rewrites remember what they measured under names of their own, and live calls tell runs apart by what they measure:
    neither may be mixed up between two sets of sites, or between a site and what another rewrite has made of it.
    """

    def __init__(self, whole: Observation, sites: Sequence[ObservedSite], label: str) -> None:
        """Shares the memory of a part with the same label and sites.

        Args:
            whole: the observation.
            sites: of it; their weights may differ, their fingerprints may not.
            label: tells parts of the same sites apart.
        """
        self._whole, self._sites, self._label = whole, list(sites), label
        key = f"part {label}: {' '.join(site.fingerprint for site in sites)}"
        self.memo = whole.memo.setdefault(key, {})

    @property
    def sites(self) -> Sequence[ObservedSite]:
        """The part's."""
        return self._sites

    def run(self, make: Callable[[ObservedSite], O], sites: Sequence[ObservedSite], what: str) -> dict[str, O]:
        """Shows the inputs of the original model; see :meth:`Observation.run`."""
        return self._whole.run(make, sites, f"{what} ({self._label})")

    def seen(self, site: ObservedSite) -> Seen | None:
        """See :meth:`Observation.seen`."""
        return self._whole.seen(site)
