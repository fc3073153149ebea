"""An observation of live calls: its tokens arrive with the calls, and each counts once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.observe import Observation, ObservedSite, SiteObserver

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from tardis_fx.observation.run import Fit, Run
    from tardis_fx.plan import Plan

#: Tokens of a site that are kept until the observer gets them together.
TOGETHER = 512

#: A site is left alone whose inputs are still too few after so many times the tokens, repeats among them.
PATIENCE = 16


class LiveObservation(Observation):
    """Sites whose inputs arrive call by call, and the fit that waits for them.

    A run counts, and shows, each token once; see :class:`Repeats`.

    Attributes:
        title: of the run that waits for tokens; empty before the first one.
        count: how many different tokens it has seen of the site that it has seen least of.
    """

    def __init__(self, sites: Sequence[ObservedSite], tokens: int, fit: Callable[[LiveObservation], Fit[Plan]]) -> None:
        """Starts without any run.

        Args:
            sites: the sites.
            tokens: how many each run shows of every site.
            fit: makes plans from this observation.
        """
        super().__init__()
        self._sites, self._tokens, self._fit = list(sites), tokens, fit(self)
        self.title, self.count = "", 0
        self._run: Run | None = None
        self._arrivals: dict[str, _Arrivals] = {}

    @property
    def sites(self) -> list[ObservedSite]:
        """All sites."""
        return self._sites

    @property
    def waits(self) -> bool:
        """Whether there is a run that waits for tokens."""
        return self._run is not None

    def advance(self, answer: Mapping[str, Any] | None = None) -> Plan | None:
        """Goes on with the fit until it needs tokens, and returns None, or to its end, and returns the plan.

        Args:
            answer: what :meth:`update` has returned; None at the beginning.
        """
        while True:
            try:
                run = self._fit.send(answer)  # type: ignore[arg-type]
            except StopIteration as done:
                plan: Plan = done.value
                return plan
            answer = self.recall(run)
            if answer is None:
                assert not run.replaced  # Options refuses sequential fits
                self._arrivals = {s.fingerprint: _Arrivals(run.make(s), s.weights.up.shape[1]) for s in run.sites}
                self._run, self.title, self.count = run, run.title, 0
                return None

    def update(self, inputs: Sequence[tuple[str, Tensor]]) -> Mapping[str, Any] | None:
        """Shows the inputs of one call to the observers of the current run.

        Args:
            inputs: fingerprints and inputs, [tokens, d].

        Returns:
            What the run has found, or None where it needs more tokens.

        Raises:
            CalibrationError: an input is NaN or infinite.
        """
        for identity, x in inputs:
            if identity in self._arrivals and len(x):
                if not torch.isfinite(x).all():
                    raise CalibrationError("inputs of a feed-forward network hold NaN or infinity")
                self._arrivals[identity].add(x.float().cpu())
        self.count = min((arrivals.count for arrivals in self._arrivals.values()), default=0)
        if self._run is None or self.count < self._tokens:
            return None
        for arrivals in self._arrivals.values():
            arrivals.show()
        run, observers = self._run, {identity: arrivals.observer for identity, arrivals in self._arrivals.items()}
        self._run, self._arrivals = None, {}
        return self.conclude(run, observers)

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
