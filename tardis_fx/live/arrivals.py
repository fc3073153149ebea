"""An observation of live calls: its tokens arrive with the calls, and each counts once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.observe import O, Observation, ObservedSite, SiteObserver, Suspended

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

#: Tokens of a site that are kept until the observer gets them together.
TOGETHER = 512

#: A site is left alone whose inputs are still too few after so many times the tokens, repeats among them.
PATIENCE = 16


class LiveObservation(Observation):
    """Sites whose inputs arrive call by call.

    A run cannot wait for them, so it suspends the fit, which is begun again when the tokens are there: runs that are
    done then answer at once. A run counts, and shows, each token once; see :class:`Repeats`.
    """

    def __init__(self, sites: Sequence[ObservedSite], tokens: int) -> None:
        """Starts without any run.

        Args:
            sites: the sites.
            tokens: how many each run shows of every site.
        """
        self._sites, self._tokens, self.memo = list(sites), tokens, {}
        self.what, self.count = "", 0
        self._done: dict[str, dict[str, Any]] = {}
        self._arrivals: dict[str, _Arrivals] = {}

    @property
    def sites(self) -> list[ObservedSite]:
        """All sites."""
        return self._sites

    def run(self, make: Callable[[ObservedSite], O], sites: Sequence[ObservedSite], what: str) -> dict[str, O]:
        """Answers when the tokens have been seen; see :meth:`Observation.run`.

        Raises:
            Suspended: they have not.
        """
        if what not in self._done:
            self._arrivals = {s.fingerprint: _Arrivals(make(s), s.weights.up.shape[1]) for s in sites}
            self.what, self.count = what, 0
            raise Suspended
        return self._done[what]

    @property
    def waits(self) -> bool:
        """Whether there is a run that waits for tokens."""
        return bool(self._arrivals)

    def update(self, inputs: Sequence[tuple[str, Tensor]]) -> bool:
        """Shows the inputs of one call to the observers of the current run.

        Args:
            inputs: fingerprints and inputs, [tokens, d].

        Returns:
            Whether the run is done.

        Raises:
            CalibrationError: an input is NaN or infinite.
        """
        for identity, x in inputs:
            if identity in self._arrivals and len(x):
                if not torch.isfinite(x).all():
                    raise CalibrationError("inputs of a feed-forward network hold NaN or infinity")
                self._arrivals[identity].add(x.float().cpu())
        self.count = min((arrivals.count for arrivals in self._arrivals.values()), default=0)
        if not self._arrivals or self.count < self._tokens:
            return False
        for arrivals in self._arrivals.values():
            arrivals.show()
        self._done[self.what] = {identity: arrivals.observer for identity, arrivals in self._arrivals.items()}
        self._arrivals = {}
        return True

    def monotonous(self) -> list[ObservedSite]:
        """Sites that go on repeating their inputs while all that the others need has been seen."""
        enough = [arrivals.count >= self._tokens for arrivals in self._arrivals.values()]
        if not any(enough):
            return []
        late = {i for i, a in self._arrivals.items() if a.count < self._tokens and a.arrived >= PATIENCE * self._tokens}
        return [site for site in self._sites if site.fingerprint in late]


class _Arrivals:
    """The tokens of one site on their way to the observer of one run."""

    def __init__(self, observer: SiteObserver, d: int) -> None:
        self.observer, self._repeats = observer, Repeats(d)
        self.arrived, self.count = 0, 0
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Takes tokens, [tokens, d], float32; shows those that are new when there are enough of them."""
        self.arrived += len(x)
        x = self._repeats.dropped(x)
        self.count += len(x)
        self._kept.append(x)
        if sum(map(len, self._kept)) >= TOGETHER:
            self.show()

    def show(self) -> None:
        """Shows what is kept to the observer."""
        kept, self._kept = self._kept, []
        if any(map(len, kept)):
            self.observer.update(torch.cat(kept))


class Repeats:
    """Finds tokens that say what another one has said: those whose direction is that of an earlier one, to about 2%.

    A service that is warmed up with constants, with padding or with one text again and again shows few tokens, however
    often it is called, and a fit to these holds for nothing else. Directions are compared by eight random projections.
    """

    def __init__(self, d: int) -> None:
        """Has seen nothing; tokens are [tokens, d]."""
        generator = torch.Generator().manual_seed(0)
        self._projection = torch.randn(d, 8, generator=generator, dtype=torch.float32, device="cpu")
        self._weights = torch.randint(1, 1 << 62, (8,), generator=generator, dtype=torch.int64, device="cpu")
        self._known: set[int] = set()

    def dropped(self, x: Tensor) -> Tensor:
        """Those of some tokens, [tokens, d], float32, that are no repeats, of each other neither."""
        directions = x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        cells = (directions @ self._projection * 64).round().long()
        new = []
        for row, cell in enumerate((cells * self._weights).sum(1).tolist()):
            if cell not in self._known:
                self._known.add(cell)
                new.append(row)
        return x if len(new) == len(x) else x[new]
