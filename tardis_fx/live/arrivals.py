"""Observation of live calls, whose tokens arrive with the calls and count once each."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from tardis_fx.errors import CalibrationError
from tardis_fx.observation.run import Fit, Observation, Run, advance
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

    def __init__(
        self, sites: Sequence[ObservedSite], tokens: int, fit: Callable[["LiveObservation"], Fit[Plan]]
    ) -> None:
        """Prepares a fit whose runs each show a number of tokens at every site; the first update starts it."""
        super().__init__()
        self._sites, self._tokens, self._fit = list(sites), tokens, fit(self)
        self.title, self.count = "", 0
        self._run: Run | None = None
        self._arrivals: dict[str, _Arrivals] = {}

    @property
    def sites(self) -> list[ObservedSite]:
        """All sites."""
        return self._sites

    def update(self, inputs: Sequence[tuple[str, Float[Tensor, "_ _"]]]) -> Plan | None:
        """Shows the inputs of one call to the observers of the current run.

        Args:
            inputs: fingerprints of sites and their inputs.

        Returns:
            The plan, or None if the fit needs more tokens.

        Raises:
            CalibrationError: an input is NaN or infinite.
        """
        if self._run is None and (plan := self._advance(None)) is not None:
            return plan
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
        return self._advance(self.conclude(run, observers))

    def _advance(self, answer: Mapping[str, Any] | None) -> Plan | None:
        """Continues the fit until it needs tokens or ends."""
        step = advance(self._fit, answer)
        while isinstance(step, Run):
            answer = {} if step.moved else self.recall(step)
            if answer is None:
                assert not step.replaced  # Options refuses sequential fits
                self._arrivals = {s.fingerprint: _Arrivals(step.make(s), s.weights.up.shape[1]) for s in step.sites}
                self._run, self.title, self.count = step, step.title, 0
                return None
            step = advance(self._fit, answer)
        return step.result

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
        self._collected: list[Tensor] = []

    def add(self, x: Float32[Tensor, "tokens d"]) -> None:
        """Collects new tokens and shows them once there are enough."""
        self.arrived += len(x)
        x = self._repeats.dropped(x)
        self.count += len(x)
        self._collected.append(x)
        if sum(map(len, self._collected)) >= TOGETHER:
            self.show()

    def show(self) -> None:
        """Shows the collected tokens to the observer."""
        collected, self._collected = self._collected, []
        if any(map(len, collected)):
            self.observer.update(torch.cat(collected))


class Repeats:
    """Finds repeated tokens: those with the direction of an earlier token, to about 2%.

    A service that is warmed up with constants, padding or a repeated text shows few distinct tokens, and a fit to these
    does not generalise. Directions are compared by eight random projections.
    """

    def __init__(self, d: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._projection = torch.randn(d, 8, generator=generator, dtype=torch.float32, device="cpu")
        self._weights = torch.randint(1, 1 << 62, (8,), generator=generator, dtype=torch.int64, device="cpu")
        self._known: set[int] = set()

    def dropped(self, x: Float32[Tensor, "tokens d"]) -> Float32[Tensor, "distinct d"]:
        """Drops repeats, also within x."""
        directions = x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        cells = (directions @ self._projection * 64).round().long()
        new = []
        for row, cell in enumerate((cells * self._weights).sum(1).tolist()):
            if cell not in self._known:
                self._known.add(cell)
                new.append(row)
        return x if len(new) == len(x) else x[new]
