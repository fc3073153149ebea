"""Observation of live calls, whose tokens arrive with the calls and count once each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.run import Fit, Observation, Run
from tardis_fx.observation.site import ObservedSite, SiteObserver
from tardis_fx.plan import Plan

#: Number of a site's tokens that are collected before the observer gets them.
TOGETHER = 512

#: A site is abandoned if it lacks distinct tokens after this many times the needed number, repeats included.
PATIENCE = 16


class LiveObservation(Observation):
    """Sites whose inputs arrive with calls, and the fit that waits for them.

    A run counts and shows each token once; see :class:`Repeats`.

    Attributes:
        title: of the run that waits for tokens; empty before the first run.
        count: smallest number of distinct tokens that the run has seen at a site.
    """

    def __init__(self, sites: Sequence[ObservedSite], tokens: int, fit: Callable[[LiveObservation], Fit[Plan]]) -> None:
        """Starts without any run.

        Args:
            sites: the sites.
            tokens: number of tokens that each run shows at every site.
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
        """Whether a run waits for tokens."""
        return self._run is not None

    def advance(self, answer: Mapping[str, Any] | None = None) -> Plan | None:
        """Continues the fit until it needs tokens, and returns None, or until its end, and returns the plan.

        Args:
            answer: returned by :meth:`update`; None at the beginning.
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
            The result of the run, or None if it needs more tokens.

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
        """Sites that keep repeating their inputs although another site has enough tokens."""
        enough = [arrivals.count >= self._tokens for arrivals in self._arrivals.values()]
        if not any(enough):
            return []
        late = {i for i, a in self._arrivals.items() if a.count < self._tokens and a.arrived >= PATIENCE * self._tokens}
        return [site for site in self._sites if site.fingerprint in late]


class _Arrivals:
    """Collects the tokens of one site for the observer of one run."""

    def __init__(self, observer: SiteObserver, d: int) -> None:
        self.observer, self._repeats = observer, Repeats(d)
        self.arrived, self.count = 0, 0
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Collects new tokens of [tokens, d], float32, and shows them once there are enough."""
        self.arrived += len(x)
        x = self._repeats.dropped(x)
        self.count += len(x)
        self._kept.append(x)
        if sum(map(len, self._kept)) >= TOGETHER:
            self.show()

    def show(self) -> None:
        """Shows the collected tokens to the observer."""
        kept, self._kept = self._kept, []
        if any(map(len, kept)):
            self.observer.update(torch.cat(kept))


class Repeats:
    """Finds repeated tokens: those with the direction of an earlier token, to about 2%.

    A service that is warmed up with constants, padding or a repeated text shows few distinct tokens, and a fit to these
    does not generalise. Directions are compared by eight random projections.
    """

    def __init__(self, d: int) -> None:
        """Draws the random projections; tokens are [tokens, d]."""
        generator = torch.Generator().manual_seed(0)
        self._projection = torch.randn(d, 8, generator=generator, dtype=torch.float32, device="cpu")
        self._weights = torch.randint(1, 1 << 62, (8,), generator=generator, dtype=torch.int64, device="cpu")
        self._known: set[int] = set()

    def dropped(self, x: Tensor) -> Tensor:
        """Drops repeats, also within x: [tokens, d], float32, to [distinct, d]."""
        directions = x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        cells = (directions @ self._projection * 64).round().long()
        new = []
        for row, cell in enumerate((cells * self._weights).sum(1).tolist()):
            if cell not in self._known:
                self._known.add(cell)
                new.append(row)
        return x if len(new) == len(x) else x[new]
